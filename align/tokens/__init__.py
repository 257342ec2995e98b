"""The best prediction of a target's state from the source's current token alone: what a map has to add to."""
