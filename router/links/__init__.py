"""Links: authenticated connections between exactly two processes, which carry rows and tokens."""
