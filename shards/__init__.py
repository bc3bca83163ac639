"""What does one process hold and compute? Weights, kernels, the decoder: no Ray, no HTTP."""
