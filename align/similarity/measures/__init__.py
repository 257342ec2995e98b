"""Measures over a sample of rows, each with floors, ceilings and intervals."""
