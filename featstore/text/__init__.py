"""Text to tokens: corpus and splits, windows, token ids with byte ends, and the plan that fixes every row."""
