"""Fitted maps: tensors, card, apply, save, load."""
