"""The target's loss with mapped states injected."""
