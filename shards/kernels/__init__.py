"""CPU kernels whose result for a row never depends on the rows beside it."""
