"""`python -m featstore`."""

from featstore.cli import main

main()
