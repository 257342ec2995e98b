"""The demo pair whose map is known, the whole road on it, and the check of this machine."""
