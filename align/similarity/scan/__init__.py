"""Exact similarity of all layers in one pass over a store, on Dask, in bounded memory."""
