"""What commands run on: the terminal, provenance, processes, a writing thread. Knows neither models nor stores."""
