"""How alike layers are: many measures over the same rows, each with what it says of nothing and of the same."""
