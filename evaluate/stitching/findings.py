"""What a careful reader would object to in stitched losses: pure functions over the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from align.statistics import FEW_DOCUMENTS, FEWEST
from align.statistics.linearised import FEWEST_EFFECTIVE
from featstore.runtime.sheets import counted

#: The map adds nothing that can be told from zero to the prediction from the token alone.
EXPLAINED = "token-explains"
#: The interval rests on few documents.
FEW = "few-documents"


def findings(key: str, entry: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Find what limits the figures of a layer pair.

    Args:
        key: Of the layer pair.
        entry: Its part of ``stitch.json``.
    """
    documents, effective = entry["n_documents"], entry["effective_documents"]
    if documents < FEWEST or effective < FEWEST_EFFECTIVE:
        yield {
            "code": FEW,
            "message": f"{key}: {_counted(documents, effective)} of stitched losses: too few for an interval, and no "
            "figure can be told from chance; extract more documents",
        }
    elif effective < FEW_DOCUMENTS:
        yield {
            "code": FEW,
            "message": f"{key}: the intervals of stitched losses come from {_counted(documents, effective)}; they are "
            "wide, and what holds of these documents need not hold of others; extract more documents",
        }
    beyond = entry["beyond_token"]
    if beyond["beaten"] is False:
        low, high = beyond["ci95"]
        yield {
            "code": EXPLAINED,
            "message": f"{key}: mapped states lower the loss by {beyond['nats']:.3f} nats per token [{low:.3f}, "
            f"{high:.3f}] from where the source token alone brings it, an interval that is not above 0: what is "
            "recovered may be the token's, and nothing is shown about its context",
        }


def _counted(documents: int, effective: float) -> str:
    """The documents, and how many equally long ones would say as much where that is fewer."""
    said = counted(documents, "document")
    return said if round(effective, 1) >= documents else f"{said} (as much as {effective:.1f} equally long ones)"
