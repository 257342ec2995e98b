"""Many runs: a grid of them, and one table of their results."""
