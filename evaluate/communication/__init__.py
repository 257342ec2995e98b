"""Whether a target can answer what only the source has read."""
