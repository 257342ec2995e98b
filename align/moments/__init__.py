"""Sufficient statistics of paired rows, from arrays or from one scan of a store."""
