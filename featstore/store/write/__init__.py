"""Writing a store: whole units aside, renamed into place, committed in the manifest."""
