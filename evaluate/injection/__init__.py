"""Mapped states in a target's forward pass: positions, hiding, continuing, controls."""
