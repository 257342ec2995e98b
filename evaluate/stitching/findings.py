"""What a careful reader would object to in stitched losses: pure functions over the contents of ``stitch.json``.

All that decides is in the file, so that one which was not judged when it was made is judged when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from align.judging.findings import Finding, finding
from align.judging.table import JUDGED, limit
from align.statistics import FEWEST, FEWEST_EFFECTIVE
from evaluate.injection.verified import side_channels
from evaluate.results import Stitched


def rejudged(stitched: Stitched) -> Stitched:
    """What was read, judged now if its file was not when it was made.

    Args:
        stitched: From any version's file.
    """
    if stitched.judged is not None:
        return stitched
    content = stitched.content()
    for key, entry in content.get("pairs", {}).items():
        entry["warnings"] = list(findings(key, entry))
    return Stitched.parse({**content, "judged": JUDGED})


def findings(key: str, entry: Mapping[str, Any]) -> Iterator[Finding]:
    """Find what limits the figures of a layer pair.

    Args:
        key: Of the layer pair.
        entry: Its part of ``stitch.json``; what it lacks is no finding.
    """
    where = {"pair": key}
    yield from _self_injection(where, entry)
    if "leak" in entry:
        yield from side_channels({key: entry["leak"]})
    documents = entry.get("n_documents")
    effective = entry.get("effective_documents", documents)
    if documents is not None and effective is not None and effective < limit("few-documents", "wanted"):
        needed = FEWEST if documents < FEWEST or effective < FEWEST_EFFECTIVE else None
        yield finding("few-documents", where, documents=documents, effective=effective, needed=needed)
    beyond = entry.get("beyond_token") or {}
    if beyond.get("beaten") is False:
        low, high = beyond["ci95"]
        yield finding("token-explains", where, nats=beyond["nats"], low=low, high=high)


def _self_injection(where: Mapping[str, str], entry: Mapping[str, Any]) -> Iterator[Finding]:
    conditions = entry.get("conditions") or {}
    clean, own = ((conditions.get(name) or {}).get("nats_per_token") for name in ("clean", "self"))
    identical = entry.get("self_bit_identical")
    if identical is None and clean is not None and own is not None:
        # Files of early versions hold losses alone; rounding in an average over tokens stays below the limit.
        identical = abs(own - clean) <= limit("self-injection", "nats")
    # Where the prompt is hidden, a model loses by its own states as well; they were put in bit by bit all the same.
    if identical is False:
        yield finding("self-injection", where, clean=clean, own=own)
