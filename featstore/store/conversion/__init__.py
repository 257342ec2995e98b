"""A store in another format or layout."""
