"""Similarity kernels: a float64 reference, Triton on a GPU, and the choice between forms."""
