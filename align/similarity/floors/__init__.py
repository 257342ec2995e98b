"""Floors that keep what documents, positions and tokens have in common: partners exchanged, and what a value is then."""
