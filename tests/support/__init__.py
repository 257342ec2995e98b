"""What several test files share: fixtures that need no pytest, and where the checkout is."""

from pathlib import Path

#: Top of the checkout.
ROOT = Path(__file__).parents[2]
