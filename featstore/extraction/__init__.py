"""Models and text to a store: settings, the resolved job, its cost, and the passes that write rows or sums."""
