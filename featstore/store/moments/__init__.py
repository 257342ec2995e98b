"""Sums over paired rows, and those that a store keeps."""
