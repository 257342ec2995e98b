"""Floors that keep what documents, positions and tokens have in common: values under exchanged partners."""
