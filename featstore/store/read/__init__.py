"""Reading a store: rows, tables, pairs, text and minibatches, from mapped files or through zarr."""
