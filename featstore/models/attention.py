"""The closed list of attention implementations, and the check of every name that comes from anywhere.

transformers takes any name: one of the form ``org/repo`` goes to a loader that fetches code from a hub and runs it, and
a name in a model's own ``config.json`` is stronger than the one that was asked for. So names are compared with the list
before transformers sees them, wherever they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from featstore.errors import AttentionError

AUTO = "auto"
#: Every attention that can be asked for; ``auto`` is sdpa where a model has it, else its own.
ATTENTIONS = (AUTO, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
#: Loops over experts that transformers has in itself; the others come from a hub.
EXPERTS = ("eager", "batched_mm", "grouped_mm")

#: Entries of a configuration that name an implementation, at any depth, with what they may name.
_ENTRIES = {
    f"{prefix}{kind}_implementation{suffix}": (kind, allowed)
    for kind, allowed in (("attn", ATTENTIONS), ("experts", EXPERTS))
    for prefix, suffix in (("", ""), ("_", ""), ("_", "_internal"))
}
_KINDS = {"attn": "attention", "experts": "experts implementation"}


def parse_attention(value: Any, place: str) -> str:
    """Check the name of an attention implementation.

    Args:
        value: As typed, or as a file has it.
        place: Where it stands, for the message: an option, a store, a card.

    Raises:
        AttentionError: It is not in :data:`ATTENTIONS`; the message has the value, the place and the list.
    """
    if isinstance(value, str) and value in ATTENTIONS:
        return value
    raise AttentionError(f"attention {value!r} in {place}: choose one of {', '.join(ATTENTIONS)}")


def refuse_names(config: Mapping[str, Any], place: str) -> None:
    """Check every implementation that a ``config.json`` names, in all its parts.

    A name in the list does no harm, and is not followed either: what runs is what was chosen.

    Args:
        config: The whole document.
        place: Where it stands, for the message.

    Raises:
        AttentionError: One is not in its list.
    """
    for entry, value in _named(config):
        kind, allowed = _ENTRIES[entry]
        # transformers also takes a mapping from parts of a model to names.
        for name in value.values() if isinstance(value, Mapping) else (value,):
            if name is not None and not (isinstance(name, str) and name in allowed):
                raise AttentionError(
                    f"{_KINDS[kind]} {name!r} in {place} ({entry}): choose one of {', '.join(allowed)}, or take the "
                    "entry out of the file"
                )


def _named(value: Any) -> Iterator[tuple[str, Any]]:
    """Every entry that names an implementation, at any depth; without recursion, which a deep file would exhaust."""
    waiting = [value]
    while waiting:
        at = waiting.pop()
        if isinstance(at, Mapping):
            yield from ((key, held) for key, held in at.items() if key in _ENTRIES)
            waiting += at.values()
        elif isinstance(at, list):
            waiting += at
