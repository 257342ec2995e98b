"""A window's source states as a few latents, and the target's states of that window from these latents alone."""
