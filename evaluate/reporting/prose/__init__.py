"""What the figures mean, in sentences."""
