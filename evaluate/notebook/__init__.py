"""Results of `evaluate` as a notebook meets them: records that print as tables and draw themselves."""
