"""The ranks of one tensor-parallel engine, and what they add up and gather."""
