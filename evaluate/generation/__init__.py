"""Texts that a target writes from mapped states."""
