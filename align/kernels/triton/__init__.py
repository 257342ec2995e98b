"""The Triton kernels, and how they are launched and compiled."""
