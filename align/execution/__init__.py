"""Where tasks run: threads of this process, processes over pipes, the workers of a Dask scheduler."""
