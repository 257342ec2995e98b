"""Questions that only someone who has read the context can answer, made by code from a seed or read from a file."""
