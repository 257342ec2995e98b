"""HTML pages: one document frame, one set of charts and one kind of table, which every page is made of."""
