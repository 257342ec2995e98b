"""How many types are right for what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from tests.support.architectures.kinds import Kind
from tests.support.table.measuring import Row

#: They write from left to right, but every token of a text sees its slots for a prompt, or is sorted with all others.
WRITE_THOUGH_NOT_CAUSAL = ("cpmant", "reformer")


def is_decoder(name: str, row: Row) -> bool:
    """Whether a type is one of those that the counts are of: neither a variant, an encoder nor part of a larger model.

    Args:
        name: Of the type.
        row: Its row.
    """
    if "@" in name or "not_built" in row:
        return False
    return row["kind"] == Kind.DECODER or name in WRITE_THOUGH_NOT_CAUSAL


def decoders(rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows that the counts are of.

    Args:
        rows: All rows.
    """
    return {name: rows[name] for name in sorted(rows) if is_decoder(name, rows[name])}


def layers(row: Row) -> list[int]:
    """All layers of a type.

    Args:
        row: Its row, not refused.
    """
    return list(range(row["blocks"] + 1))


def extracts(row: Row) -> bool:
    """Whether states are stored, and with them closed forms are computed."""
    return "refused" not in row and row["commands"]["extract"] and "disagrees" not in row


def injects_anywhere(row: Row) -> bool:
    """Whether states can be put in at every layer: its own to the bit, and nothing leaks past them."""
    return extracts(row) and row["commands"]["stitch"] == layers(row)


def injects_inside(row: Row) -> bool:
    """Whether states can be put in at one layer at least that has a block before it and one after."""
    return extracts(row) and any(0 < layer < row["blocks"] for layer in row["commands"]["stitch"])


def generates(row: Row) -> bool:
    """Whether text is continued from states at every layer, and from two branches of one prompt."""
    return injects_anywhere(row) and row["commands"]["generate"] == layers(row)


def pads(row: Row) -> bool:
    """Whether prompts of several lengths share a batch."""
    return extracts(row) and bool(row["continuing"].get("padded"))


def hides(row: Row) -> bool:
    """Whether the prompt can be hidden at every layer, in one pass and from a cache."""
    return injects_anywhere(row) and row["commands"]["stitch_hide"] == layers(row)


def everything(row: Row) -> bool:
    """Whether all of it holds."""
    return generates(row) and pads(row) and hides(row)


COUNTS: dict[str, Callable[[Row], bool]] = {
    "right for extraction and closed forms": extracts,
    "right for injection at every layer: its own states back to the bit, and a leak of exactly 0": injects_anywhere,
    "right for injection at one inner layer at least": injects_inside,
    "right for generation from states at every layer": generates,
    "right for prompts of several lengths in a batch, padded at the left": pads,
    "right for `--keep hide` at every layer, in one pass and from a cache": hides,
    "right in everything": everything,
    "refused for extraction, with the reason": lambda row: "refused" in row and "disagrees" not in row,
    "silently wrong: the independent truth disagrees": lambda row: "disagrees" in row,
}


def counted(rows: Mapping[str, Row]) -> dict[str, int]:
    """Every count, over the decoders.

    Args:
        rows: All rows.
    """
    chosen = decoders(rows).values()
    return {words: _number(chosen, holds) for words, holds in COUNTS.items()}


def _number(rows: Iterable[Row], holds: Callable[[Row], bool]) -> int:
    return sum(map(holds, rows))
