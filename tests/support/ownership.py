"""Models that the user of a test has named before, so that nothing asks about them."""

from __future__ import annotations

from pathlib import Path

from featstore.models.references import ModelSpec
from featstore.models.trust import remember


def mine(*places: Path | str) -> None:
    """Note references in the ledger, as commands do with those that are typed."""
    remember(ModelSpec("mine", str(place)) for place in places)
