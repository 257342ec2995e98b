"""What a careful reader would object to in a result: one table of codes, one record, one sentence for each."""
