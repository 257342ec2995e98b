"""Figures of fitted maps on a split, from rows or from moments."""
