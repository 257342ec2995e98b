"""One run directory from a store: resolve, fit or train, judge, write."""
