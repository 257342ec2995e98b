"""``docs/models.md``, made of the measured rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from featstore.models.probe.words import numbers
from tests.support.architectures.kinds import Kind
from tests.support.table import counting
from tests.support.table.measuring import Row

_HEAD = """# Models

What the instrument finds on every causal type of transformers {transformers} (torch {torch}), measured and not listed
by hand: each type is built tiny and random, so that every kind of its blocks acts, and put through the tests that run
when a command first meets a model ([why](decisions/0023-the-instrument-proves-itself.md)). A second instrument
(`tests/support/truth.py`), which has the place of every type's blocks written down and shares no code with the first,
measures the same; where the two disagree, this page is not made.

`scripts/models` builds and measures all of them, in a few minutes, and writes `docs/models.json` (a line a test) and
this page. A type that a newer transformers brings and nobody looked at fails the tests. A model of yours is tested when
a command first meets it: its weights and settings decide, not its type.

Figures have one digit and differences that are rounding are 0, so that another processor gives the same page. Widths
and numbers of blocks are those of the tiny models.
"""

_COLUMNS = """| column | says |
|---|---|
| blocks | where the model keeps its stack of blocks |
| stream | its axes; where a token has several streams, they stand end to end in one row |
| attn | the implementation that ran: sdpa where the type has it, otherwise its own choice |
| extract | ✓ rows are those of the stream, each a function of its own text; or why there are none |
| layer 0 | *table*: what enters the first block depends on the token alone; *rows*: on the position too |
| inject | where states can be put in (`stitch`, `generate`, `communicate`): the model's own to the bit, and later \
blocks know nothing of the text past the stream. A layer that leaks is refused unless `--allow-side-channel` is typed |
| goes on | how a text is continued so that it has the logits of one pass: from a cache, from a cache token by token, \
or the whole text anew |
| pad | ✓ prompts of several lengths share a batch, padded at the left; ✗ they do not, and go one by one |
| hide | where the prompt can be hidden (`--keep hide`): two prompts with the same states put in give the same answer |
"""

_AHEAD = (
    "\n**Injection: they read ahead.** What follows a token changes its states, so states of a text know its end. They "
    "are stored, window by window, and not put in: "
)
_CHANNELS = (
    "**Injection: side channels.** At these layers later blocks learn of the text past the stream. The leak is the "
    "part of the difference between two texts that is left when the whole stream of one is put into the other.\n"
)
_PADDING = (
    "\n**Left padding.** It changes what follows by this much, so prompts of several lengths do not share a batch: "
)
_NO_CACHE = (
    "**No cache.** What follows from a cache is not what one pass over the whole text says, or there is no cache; the "
    "whole text is passed again for each token, which is slow and right: "
)


def page(versions: Mapping[str, str], rows: Mapping[str, Row]) -> str:
    """The whole page.

    Args:
        versions: Of transformers and torch.
        rows: By type, and ``type@variant``.
    """
    types = {name: row for name, row in sorted(rows.items()) if "@" not in name}
    variants = {name: row for name, row in sorted(rows.items()) if "@" in name}
    parts = [
        _HEAD.format(**versions),
        "## Counts\n\n" + _counts(rows),
        "## How to read the table\n\n" + _COLUMNS,
        "## All types\n\n" + _table(types),
        "## Variants\n\nOther models of a type, where settings change what happens to the stream.\n\n"
        + _table(variants),
        "## What is refused, and why\n\n" + _refused(rows),
        "## Not built\n\n" + _not_built(types),
    ]
    return "\n".join(f"{part.rstrip()}\n" for part in parts)


def _counts(rows: Mapping[str, Row]) -> str:
    built = [row for name, row in rows.items() if "@" not in name and "not_built" not in row]
    chosen = counting.decoders(rows)
    other = {kind: sum(row["kind"] == kind for row in built) for kind in (Kind.ENCODER_DECODER, Kind.NOT_CAUSAL)}
    encoders = other[Kind.NOT_CAUSAL] - len(counting.WRITE_THOUGH_NOT_CAUSAL)
    types = sum("@" not in name for name in rows)
    although = " and ".join(counting.WRITE_THOUGH_NOT_CAUSAL)
    lines = [
        (
            f"transformers lists {types} causal types. {types - len(built)} cannot be built, {encoders} are encoders, "
            f"{other[Kind.ENCODER_DECODER]} are decoders of encoder-decoders; the counts are of the other "
            f"**{len(chosen)}**, {although} among them, which write from left to right although their tokens see what "
            "follows.\n"
        ),
        "| | types |",
        "|---|---|",
        *(f"| {words} | {number} |" for words, number in counting.counted(rows).items()),
    ]
    return "\n".join(lines)


def _table(rows: Mapping[str, Row]) -> str:
    lines = ["| type | blocks | stream | attn | extract | layer 0 | inject | goes on | pad | hide |", "|---" * 10 + "|"]
    for name, row in rows.items():
        if "not_built" in row:
            lines.append(f"| `{name}` | not built" + " |" * 9)
        elif "refused" in row:
            lines.append(f"| `{name}` | | | | ✗ {_short(row)}" + " |" * 6)
        else:
            cells = [f"`{row['stack']}`", _stream(row), row["attention"] or "", _extract(row), _layer_0(row)]
            cells += [_inject(row), _goes_on(row), _pad(row), _hide(row)]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(row: Row) -> str:
    """A refusal without the class, and without what holds for all of them."""
    words: str = row["refused"].partition(": ")[2]
    return words.partition("; ")[0].replace("|", "\\|")


def _stream(row: Row) -> str:
    axes = row["axes"]
    last = max(place for place, axis in enumerate(axes) if isinstance(axis, int))
    words = ["token" if axis == "tokens" else "width" if place == last else axis for place, axis in enumerate(axes)]
    return " × ".join(map(str, words))


def _extract(row: Row) -> str:
    reading = row["reading"]
    words = ["✓"]
    if not reading["causal"]:
        words.append("reads ahead")
    if reading["batching"] == "equal":
        words.append("windows of one length share a pass")
    elif reading["batching"] == "single":
        words.append("each window in a pass of its own")
    elif reading["switch"] is not None:
        words.append(f"windows up to {reading['switch']} tokens and longer ones apart")
    return words[0] + (f" {', '.join(words[1:])}" if words[1:] else "")


def _layer_0(row: Row) -> str:
    return "table" if row["reading"]["layer_0_is_table"] else "rows"


def _every(row: Row, layers: list[int]) -> str:
    if layers == counting.layers(row):
        return "✓"
    return f"{'layer' if len(layers) == 1 else 'layers'} {numbers(layers)}" if layers else "✗"


def _inject(row: Row) -> str:
    if not row["reading"]["causal"]:
        return "✗ reads ahead"
    leaking = {layer: leak for layer, leak in enumerate(row["layers"]["leak"]) if leak != 0}
    words = _every(row, row["commands"]["stitch"])
    return f"{words}; {numbers(leaking)} leak {_span(leaking.values())}" if leaking else words


def _goes_on(row: Row) -> str:
    way = row["continuing"]
    if way["kind"] == "none":
        return "✗ reads ahead" if not row["reading"]["causal"] else "✗"
    words = {"cached": "cache", "stepwise": "cache, token by token", "recomputed": "whole text anew"}[way["kind"]]
    if way["positions"]:
        words += ", told positions"
    if way["branching"] == "reread" and way["kind"] != "recomputed":
        words += ", anew for each branch"
    return words


def _pad(row: Row) -> str:
    if row["continuing"]["kind"] == "none":
        return ""
    return "✓" if row["continuing"]["padded"] else "✗"


def _hide(row: Row) -> str:
    return _every(row, row["layers"]["hide"]) if "hide" in row["layers"] else ""


def _span(values: Iterable[float | None]) -> str:
    found = sorted(float("inf") if value is None else value for value in values)
    low, high = f"{found[0]:g}", f"{found[-1]:g}"
    return low if low == high else f"{low} to {high}"


def _refused(rows: Mapping[str, Row]) -> str:
    built = {name: row for name, row in sorted(rows.items()) if "not_built" not in row}
    run = {name: row for name, row in built.items() if "refused" not in row}
    ahead = [name for name, row in run.items() if not row["reading"]["causal"]]
    causal = {name: row for name, row in run.items() if row["reading"]["causal"]}
    parts = [
        "**Extraction.** There is no row for each token and layer:\n",
        *(f"- `{name}`: {_short(row)}." for name, row in built.items() if "refused" in row),
        _AHEAD + _names(ahead) + ".\n",
        _CHANNELS,
        "| type | layers | leak | what is left |",
        "|---|---|---|---|",
        *(_leak(name, row) for name, row in causal.items() if any(leak != 0 for leak in row["layers"]["leak"])),
        "\n**Hide.** Two prompts with the same states put in do not give the same answer:\n",
        *_by_reason(causal),
        _PADDING + _names(_figures(causal, lambda row: not row["continuing"].get("padded", True))) + ".\n",
        _NO_CACHE + _names(name for name, row in causal.items() if row["continuing"]["kind"] == "recomputed") + ".",
    ]
    return "\n".join(parts)


def _leak(name: str, row: Row) -> str:
    leaking = {layer: leak for layer, leak in enumerate(row["layers"]["leak"]) if leak != 0}
    left = row["commands"]["stitch"]
    words = f"layer {left[0]}" if len(left) == 1 else f"layers {numbers(left)}" if left else "none"
    return f"| `{name}` | {numbers(leaking)} | {_span(leaking.values())} | {words} |"


def _figures(rows: Mapping[str, Row], holds: Callable[[Row], bool]) -> list[str]:
    return [f"{name} ({row['continuing']['padding'] or 'it raises'})" for name, row in rows.items() if holds(row)]


def _by_reason(rows: Mapping[str, Row]) -> list[str]:
    recurrent, other = [], list[str]()
    for name, row in rows.items():
        for entry in row["layers"]["hide_refused"]:
            reason = entry["reason"]
            if "keep a recurrent" in reason or "keeps a recurrent" in reason:
                recurrent.append(name)
            else:
                layers = _every(row, entry["layers"])
                at = "every layer" if layers == "✓" else layers
                other.append(f"- `{name}`, {at}: {reason.partition('; use ')[0]}.")
    first = "- Blocks keep a recurrent or convolution state, which no attention mask can hide: "
    return [first + _names(dict.fromkeys(recurrent)) + ".", *other]


def _names(values: Iterable[str]) -> str:
    found = [f"`{name.partition(' ')[0]}`{' ' * (' ' in name)}{name.partition(' ')[2]}" for name in values]
    return ", ".join(found)


def _not_built(rows: Mapping[str, Row]) -> str:
    reasons: dict[str, Any] = {}
    for name, row in rows.items():
        if "not_built" in row:
            reasons.setdefault(row["not_built"], []).append(name)
    return "\n".join(f"- {_names(names)}: {reason}." for reason, names in reasons.items())
