"""Which maps of low rank there can be."""

from __future__ import annotations

from featstore.errors import FitError

#: The fixed maps that a map can be added to.
SKIPS = ("procrustes", "ridge", "identity", "none")


def check_low_rank(rank: int, skip: str, dx: int, dy: int) -> None:
    """Refuse a low-rank map that does not fit the widths, before any row is read.

    Args:
        rank: Its rank.
        skip: What it is added to.
        dx: Source width.
        dy: Target width.

    Raises:
        FitError: Unknown skip, identity between different widths, or a rank above the smaller width.
    """
    if skip not in SKIPS:
        raise FitError(f"skip {skip!r}: choose one of {', '.join(SKIPS)}")
    if skip == "identity" and dx != dy:
        raise FitError(f"skip 'identity' needs equal widths, not {dx} and {dy}; use --skip procrustes")
    if not 1 <= rank <= min(dx, dy):
        raise FitError(f"rank {rank} does not fit widths {dx} and {dy}: use 1 to {min(dx, dy)}")
