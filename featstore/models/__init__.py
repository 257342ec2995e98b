"""Models: what a reference names, how it is loaded, and where its residual stream is."""
