"""Mutations of a JSON document: what a slip, a bug or a stranger may have written instead, seeded and described.

    for described, text in mutations(document, random.Random(7), 100):
        path.write_bytes(text)

A mutation is text and not a value: some have no value (a number of 10,000 digits, a key twice, nesting beyond what a
parser follows). Nothing here attacks other software; the point is what our readers make of it.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

#: Path of keys and indices to a value within a document.
Place = tuple[Any, ...]


class Mutation(NamedTuple):
    """One mutated document.

    Attributes:
        description: What was changed, and where.
        text: The document's new content.
    """

    description: str
    text: bytes


#: Takes the place of a value or key that is written as raw text once the rest is serialised.
_RAW = "\x01raw\x01"

#: Values of every JSON type, at the borders of what readers expect.
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 255, 2**31, 2**63, 2**64, 10**30, -(10**30), 1.5, -0.0, 0.0, 1e-300, 1e308,
    float("nan"), float("inf"), -float("inf"), "", " ", "x", "float64", "int8", "bfloat16", "0", "1", "true", "NaN",
    [], [0], [None], [[]], [1, 2], ["x"], {}, {"x": 1}, {"name": "x"}, [{}], [[0, 1], [1, 0]],
)  # fmt: skip

#: Strings that are more than text to somebody: to a terminal, a file system, markup or an encoder.
STRINGS = (
    "\ud800", "a\udfffb", "a\x00b", "\x1b[31mred", "a\nb\r", "\u202eabc", "../..", "../../outside", "/etc/passwd",
    "a/../b", "~root", "c:\\x", "file:///x", "[bold]x[/bold]", "[/m]", "<script>x</script>", "{{7*7}}", "%s%n",
    "n" * 5000, "\N{GRINNING FACE}", "e\u0301",
)  # fmt: skip

#: Text that stands for a value and that Python's encoder would not write: by name.
RAW_VALUES = {
    "an integer of 5,000 digits": "7" * 5000,
    "a number with exponent 999": "1e999",
    "a negative number with exponent 999": "-1e999",
    "lists nested 100 deep": "[" * 100 + "]" * 100,
    "lists nested 900 deep": "[" * 900 + "]" * 900,
    "objects nested 4,000 deep": '{"a":' * 4000 + "1" + "}" * 4000,
    "lists nested 20,000 deep": "[" * 20_000 + "]" * 20_000,
    "a number that starts with zero": "007",
    "a trailing comma": "[1,]",
    "nothing": "",
}


def places(value: Any, at: Place = ()) -> list[Place]:
    """Paths to everything in a JSON value, itself first.

    Args:
        value: Any JSON value.
        at: Path of the value.
    """
    found = [at]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*at, key))
    return found


def mutations(document: Any, rng: random.Random, n: int) -> Iterator[Mutation]:
    """Mutated copies of a document, every kind of mutation in turn.

    Places are drawn from the root downwards, so that a long list deep inside does not hide the members above it.

    Args:
        document: An object or list; it is not changed.
        rng: Decides everything.
        n: How many.

    Yields:
        What was changed, and the document's new text.
    """
    kinds = list(_KINDS if document else (_add, _whole))
    rng.shuffle(kinds)
    made = turn = 0
    while made < n:
        found = kinds[turn % len(kinds)](copy.deepcopy(document), rng)
        turn += 1
        # Not every kind has a place in every document: one without a list has none to reorder.
        if found is not None:
            made += 1
            yield found


def mutate(document: Any, place: Place, value: Any) -> bytes:
    """The text of a document with one value replaced.

    Args:
        document: An object or list; it is not changed.
        place: Path of the value.
        value: The new one.
    """
    document = copy.deepcopy(document)
    _put(document, place, value)
    return _text(document)


def without(document: Any, place: Place) -> bytes:
    """The text of a document with one member or element left out.

    Args:
        document: An object or list; it is not changed.
        place: Path of the value.
    """
    document = copy.deepcopy(document)
    del _at(document, place[:-1])[place[-1]]
    return _text(document)


# Kinds --------------------------------------------------------------------------------------------------------------


def _value(document: Any, rng: random.Random) -> Mutation | None:
    """Another value of any type."""
    place = _descend(document, rng)
    value = rng.choice(VALUES)
    return Mutation(f"{_shown(place)} is {_short(value)}", mutate(document, place, copy.deepcopy(value)))


def _string(document: Any, rng: random.Random) -> Mutation | None:
    """A hostile string in the place of a string, or of anything."""
    strings = [place for place in places(document) if place and isinstance(_at(document, place), str)]
    place = rng.choice(strings) if strings and rng.random() < 0.7 else _descend(document, rng)
    value = rng.choice(STRINGS)
    return Mutation(f"{_shown(place)} is {_short(value)}", mutate(document, place, value))


def _swap_type(document: Any, rng: random.Random) -> Mutation | None:
    """The same content as another type: a number as text, a scalar as a list, a list as an object."""
    place = _descend(document, rng)
    old = _at(document, place)
    if isinstance(old, dict):
        value: Any = rng.choice([list(old), list(old.values()), json.dumps(old)[:50]])
    elif isinstance(old, list):
        value = rng.choice([{str(i): each for i, each in enumerate(old)}, old[0] if old else 0, len(old)])
    elif isinstance(old, bool) or old is None:
        value = rng.choice([int(bool(old)), str(old).lower(), [old]])
    elif isinstance(old, int | float):
        value = rng.choice([str(old), float(old), [old], {"value": old}, bool(old)])
    else:
        value = rng.choice([[old], {"value": old}, len(old), list(old)[:5]])
    return Mutation(f"{_shown(place)} becomes {_short(value)}", mutate(document, place, value))


def _number(document: Any, rng: random.Random) -> Mutation | None:
    """A number that is near, negated, halved, huge or not an integer."""
    place = _some(document, rng, lambda value: isinstance(value, int | float) and not isinstance(value, bool))
    if place is None:
        return None
    old = _at(document, place)
    value = rng.choice(
        [old + 1, old - 1, -old, old * 2, old * 1000 + 7, old / 2, old + 0.5, 0, -1, 2**40, 4_000_000, float("nan")]
    )
    return Mutation(f"{_shown(place)} is {_short(value)} instead of {_short(old)}", mutate(document, place, value))


def _near_string(document: Any, rng: random.Random) -> Mutation | None:
    """A string that is almost the one it was."""
    place = _some(document, rng, lambda value: isinstance(value, str) and value != "")
    if place is None:
        return None
    old = _at(document, place)
    value = rng.choice([old[:-1], old + "x", old.upper(), old[:-1] + rng.choice("08a/"), f" {old}", old + "\n"])
    return Mutation(f"{_shown(place)} is {_short(value)} instead of {_short(old)}", mutate(document, place, value))


def _drop(document: Any, rng: random.Random) -> Mutation | None:
    """A member or element left out."""
    place = _descend(document, rng)
    return Mutation(f"{_shown(place)} is left out", without(document, place))


def _rename(document: Any, rng: random.Random) -> Mutation | None:
    """A member under another name."""
    place = _descend(document, rng)
    holder = _at(document, place[:-1])
    if not isinstance(holder, dict):
        return None
    old = place[-1]
    new = rng.choice([*STRINGS, "", old + "x", old.upper(), *(str(key) for key in holder)])
    holder[new] = holder.pop(old)
    return Mutation(f"{_shown(place)} is called {_short(new)}", _text(document))


def _add(document: Any, rng: random.Random) -> Mutation | None:
    """A member that nobody knows, or one more element."""
    place = _some(document, rng, lambda value: isinstance(value, dict | list))
    holder = _at(document, place or ())
    if isinstance(holder, dict):
        key = rng.choice(["extra", "", *STRINGS[:6]])
        holder[key] = copy.deepcopy(rng.choice(VALUES))
        return Mutation(f"{_shown(place or ())} has {_short(key)} besides", _text(document))
    holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice([*holder, *VALUES])))
    return Mutation(f"{_shown(place or ())} has another element", _text(document))


def _lists(document: Any, rng: random.Random) -> Mutation | None:
    """A list emptied, reordered, cut or with elements repeated."""
    place = _some(document, rng, lambda value: isinstance(value, list))
    if place is None:
        return None
    old = _at(document, place)
    value, what = rng.choice(
        [([], "emptied"), (old[::-1], "reversed"), (old + old, "repeated"), (old[:-1], "cut"),
         ([*old, *old[:1]], "with its first element again"), (old * 300, "repeated 300 times")]
    )  # fmt: skip
    return Mutation(f"{_shown(place)} is {what}", mutate(document, place, value))


def _objects(document: Any, rng: random.Random) -> Mutation | None:
    """An object emptied, or two of its members exchanged."""
    place = _some(document, rng, lambda value: isinstance(value, dict) and len(value) > 1)
    holder = _at(document, place or ())
    if not isinstance(holder, dict) or len(holder) < 2:
        return None
    if place and rng.random() < 0.3:
        return Mutation(f"{_shown(place)} is emptied", mutate(document, place, {}))
    first, second = rng.sample(sorted(holder, key=str), 2)
    holder[first], holder[second] = holder[second], holder[first]
    return Mutation(f"{_shown(place or ())} has {first!r} and {second!r} exchanged", _text(document))


def _raw(document: Any, rng: random.Random) -> Mutation | None:
    """A value that no encoder of ours would write."""
    place = _descend(document, rng)
    name = rng.choice(sorted(RAW_VALUES))
    text = mutate(document, place, _RAW).replace(json.dumps(_RAW).encode(), RAW_VALUES[name].encode())
    return Mutation(f"{_shown(place)} is {name}", text)


def _twice(document: Any, rng: random.Random) -> Mutation | None:
    """A key that stands twice, with another value the second time."""
    place = _some(document, rng, lambda value: isinstance(value, dict) and len(value) > 0)
    holder = _at(document, place or ())
    if not isinstance(holder, dict) or not holder:
        return None
    key = rng.choice(sorted(holder, key=str))
    holder[_RAW] = copy.deepcopy(rng.choice([holder[key], *VALUES]))
    text = _text(document).replace(json.dumps(_RAW).encode(), json.dumps(key).encode())
    return Mutation(f"{_shown((*(place or ()), key))} stands twice", text)


def _whole(document: Any, rng: random.Random) -> Mutation | None:
    """Text that is no such document at all."""
    text = _text(document)
    name, value = rng.choice(
        [("cut short", text[: rng.randrange(len(text))]), ("empty", b""), ("null", b"null"), ("an empty list", b"[]"),
         ("an empty object", b"{}"), ("in a list", b"[" + text + b"]"), ("followed by a brace", text + b"}"),
         ("preceded by a null byte", b"\0" + text), ("in UTF-16", text.decode().encode("utf-16")),
         ("with a byte order mark", b"\xef\xbb\xbf" + text), ("not UTF-8", text.replace(b'"', b'"\xff', 1)),
         ("nested 20,000 deep", b"[" * 20_000), ("a number", b"7"), ("twice", text + text)]
    )  # fmt: skip
    return Mutation(f"the document is {name}", value)


_KINDS: tuple[Callable[[Any, random.Random], Mutation | None], ...] = (
    _value, _value, _string, _swap_type, _number, _number, _near_string, _drop, _drop, _rename, _add, _lists, _lists,
    _objects, _raw, _twice, _whole,
)  # fmt: skip


# Places -------------------------------------------------------------------------------------------------------------


def _descend(document: Any, rng: random.Random) -> Place:
    """A place below the root: at every level a member is drawn, and often the walk goes on into it."""
    place: Place = ()
    value = document
    while isinstance(value, dict | list) and len(value):
        key = rng.choice(sorted(value, key=str)) if isinstance(value, dict) else rng.randrange(len(value))
        place, value = (*place, key), value[key]
        if rng.random() < 0.35:
            break
    return place or next(iter(places(document)[1:]), ())


def _some(document: Any, rng: random.Random, fits: Callable[[Any], bool]) -> Place | None:
    """A place whose value fits, by a few walks and else by looking everywhere; None where nothing fits."""
    for _ in range(10):
        place = _descend(document, rng)
        if fits(_at(document, place)):
            return place
    found = [place for place in places(document) if place and fits(_at(document, place))]
    return rng.choice(found) if found else None


def _at(document: Any, place: Place) -> Any:
    for key in place:
        document = document[key]
    return document


def _put(document: Any, place: Place, value: Any) -> None:
    _at(document, place[:-1])[place[-1]] = value


def _text(document: Any) -> bytes:
    """With escapes for everything beyond ASCII, so that lone surrogates can be written."""
    return json.dumps(document, indent=1).encode()


def _shown(place: Place) -> str:
    return "/" + "/".join(_short(key) if isinstance(key, str) and not key.isprintable() else str(key) for key in place)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:39]}~"
