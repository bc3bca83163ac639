"""Admission, continuous batching and the paged KV cache's book-keeping: no Ray."""
