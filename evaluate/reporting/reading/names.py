"""How runs, conditions and shares are called, wherever the page speaks of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from align.maps.registry import map_types
from evaluate.injection.verified import leak_mark, leak_words
from evaluate.reporting.reading.inputs import Node, Run
from evaluate.reporting.reading.numbers import interval, nats, percent, percent_number, say, show
from featstore.runtime.records import Record


def type_name(run: Run) -> str:
    """The map's type as a word that can open a sentence.

    Args:
        run: The run.
    """
    titles = {type_.name: type_.title for type_ in map_types()}
    return titles.get(run.type) or run.type.capitalize() or "The map"


def share(block: Node, leak: Markup | None = None, why: str = "") -> Markup:
    """A recovered share with its interval, ``85 % [82, 88]``.

    Args:
        block: With ``value`` and ``ci95``.
        leak: The tag of a leak at its layer.
        why: What a dash says where there is none.
    """
    ends = interval(block.get("ci95"), percent_number)
    return say("{} {}{}" if ends else "{}{}{}", show(block.get("value"), percent, why), ends, leak or "")


def gain(block: Node, leak: Markup | None = None) -> Markup:
    """A difference of losses with its interval, ``0.94 nats/token [0.55, 1.33]``.

    Args:
        block: With ``nats`` and ``ci95``.
        leak: The tag of a leak at its layer.
    """
    ends = interval(block.get("ci95"), nats)
    return say("{} nats/token{}{}{}", show(block.get("nats"), nats), " " if ends else "", ends, leak or "")


@dataclass(frozen=True)
class Leak:
    """What stands beside every figure of a layer pair whose target layer leaks; empty where it does not.

    Attributes:
        text: In a drawing, ``leak 0.21``.
        words: With what it means.
        tag: On the page, with a space before it.
    """

    text: str
    words: str
    tag: Markup


NO_LEAK = Leak("", "", Markup(""))


def leak_of(entry: Node, name: str = "leak") -> Leak:
    """What a file says of the leak at a layer pair's target.

    Args:
        entry: What has it: the layer pair's part of a file, or an object of leaks by layer pair.
        name: Under which it has it.
    """
    given = entry.value
    known = given.has(name) if isinstance(given, Record) else isinstance(given, Mapping) and name in given
    # Files of earlier versions say nothing; a leak without a finite number is null.
    leak = entry.get(name).number if known else 0.0
    text, words = leak_mark(leak), leak_words(leak)
    if not text:
        return NO_LEAK
    return Leak(text, words, say(' <span class="leak" title="{}">{}</span>', words, text))


def control_name(name: str) -> str:
    """A control's or condition's name for people.

    Args:
        name: As in the files, for instance ``random_norm``.
    """
    return "PCA" if name == "pca" else name.replace("_", " ").replace("->", " → ")
