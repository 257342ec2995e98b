"""Generated texts side by side, the words marked in which one differs from the target's own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup

from evaluate.reporting.reading.inputs import Node, Pair, Run
from evaluate.reporting.reading.names import control_name, leak_of
from evaluate.reporting.reading.numbers import exact, nats, say, show

#: A stretch of text, and whether it differs from what it was compared with.
Part = tuple[str, bool]


@dataclass(frozen=True)
class Text:
    """A generated text and what is remarkable about it."""

    title: str
    run: str
    head: str
    parts: tuple[Part, ...] | None
    notes: tuple[tuple[str, str], ...] = ()
    controls: tuple[Text, ...] = ()
    #: Nats per token of the writer's own text under this condition: the figure, and as it is shown.
    likelihood: float | None = None
    cost: Markup = field(default=Markup(""), compare=False)


@dataclass
class Prompt:
    """Everything generated for one prompt between two models."""

    prompt: str
    source: str
    target: str
    alone: list[Text] = field(default_factory=list)
    forward: list[Text] = field(default_factory=list)
    backward: list[Text] = field(default_factory=list)


def differing(text: str, own: str) -> tuple[Part, ...]:
    """Cut a text where it starts and stops to differ from another, word by word.

    Words are compared with the punctuation at their end as words of their own; white space never differs by itself.
    The longest common subsequence is that of :class:`difflib.SequenceMatcher`.

    Args:
        text: What is shown.
        own: What the writer says without injection.

    Returns:
        Stretches that together are ``text``, none of them empty.
    """
    ours, theirs = (re.findall(r"\s+|\w+|[^\w\s]", one) for one in (text, own))
    words = [[(place, word) for place, word in enumerate(one) if not word.isspace()] for one in (ours, theirs)]
    bare = [[word for _, word in one] for one in words]
    matcher = difflib.SequenceMatcher(None, bare[0], bare[1], autojunk=False)
    alike = {words[0][k][0] for block in matcher.get_matching_blocks() for k in range(block.a, block.a + block.size)}
    parts: list[Part] = []
    for place, word in enumerate(ours):
        if word.isspace():
            # Between two differing words it belongs to the stretch; at its edges it does not.
            differs = 0 < place < len(ours) - 1 and place - 1 not in alike and place + 1 not in alike
        else:
            differs = place not in alike
        if parts and parts[-1][1] == differs:
            parts[-1] = (parts[-1][0] + word, differs)
        else:
            parts.append((word, differs))
    return tuple(parts)


def prompts(runs: Sequence[Run]) -> list[Prompt]:
    """Gather the texts of all runs by prompt and models.

    Args:
        runs: What was read.
    """
    found: dict[tuple[str, str, str], Prompt] = {}
    for run in runs:
        for entry in run.file("generations.json").get("entries"):
            key = (entry.get("prompt").text, entry.get("source").text, entry.get("target").text)
            prompt = found.setdefault(key, Prompt(*key))
            _gather(prompt, run, entry)
    return list(found.values())


def decodings(runs: Sequence[Run]) -> list[Markup]:
    """Say how the texts were generated, each distinct way once.

    Args:
        runs: What was read.
    """
    found: dict[tuple[str, str], Markup] = {}
    for run in runs:
        texts = run.file("generations.json")
        if texts.value is not None:
            way = (texts.get("decoding").text, texts.get("max_new_tokens").text)
            text = "{}, at most {} new tokens"
            found.setdefault(way, say(text, way[0] or "unnamed", show(texts.get("max_new_tokens"), exact)))
    return list(found.values())


def _gather(prompt: Prompt, run: Run, entry: Node) -> None:
    alone = {side: entry.get(f"{side}_alone") for side in ("source", "target")}
    for side, model in (("source", prompt.source), ("target", prompt.target)):
        text = _text(f"{model} alone", run.label, prompt.prompt, alone[side])
        same = [t for t in prompt.alone if (t.title, t.head, t.parts) == (text.title, text.head, text.parts)]
        if not same:
            prompt.alone.append(text)
    for side, writer, into in (
        ("source_to_target", alone["target"], prompt.forward),
        ("target_to_source", alone["source"], prompt.backward),
    ):
        for key, texts in entry.get(side).items():
            text = _mapped(Pair.parse(key), run, prompt.prompt, texts, writer, entry.get("likelihood", side, key))
            equal = [k for k, other in enumerate(into) if replace(text, run=other.run) == other]
            if equal:  # two runs that say the same, controls and all, share a card
                into[equal[0]] = replace(text, run=f"{into[equal[0]].run}, {run.label}")
            else:
                into.append(text)


def _mapped(pair: Pair, run: Run, prompt: str, texts: Node, writer: Node, costs: Node) -> Text:
    mapped = texts.get("mapped")
    leak = leak_of(run.file("generations.json").get("leaks"), pair.key).words
    others = [(name, node) for name, node in texts.items() if name != "mapped"]
    notes = [("caution", leak)] if leak else []
    if mapped.text and mapped.text == writer.text:
        notes.append(("plain", "the same as without injection"))
    twins = [control_name(n) for n, node in others if n != "self" and node.text == mapped.text]
    if mapped.text and twins:
        notes.append(("caution", f"the same as control: {', '.join(twins)}"))
    own = texts.get("self")
    if own.text and writer.text and own.text != writer.text:
        notes.append(("caution", "self-injection changed the text: compare with care"))
    # Other versions put figures beside the texts: what is no text is not shown as one.
    controls = tuple(
        _with(_text(control_name(n), "", prompt, node, writer.text), costs.get(n))
        for n, node in others
        if node.value is None or isinstance(node.value, str)
    )
    base = _text(str(pair), run.label, prompt, mapped, writer.text)
    return _with(replace(base, notes=tuple(notes), controls=controls), costs.get("mapped"))


def _with(text: Text, cost: Node) -> Text:
    return text if cost.number is None else replace(text, likelihood=cost.number, cost=show(cost, nats))


def _text(name: str, run: str, prompt: str, node: Node, own: str | None = None) -> Text:
    if not isinstance(node.value, str):
        return Text(name, run, "", None)
    head = prompt if prompt and node.text.startswith(prompt) else ""
    body = node.text[len(head) :].rstrip()
    body = body if head else body.lstrip(" ")
    if not body:
        return Text(name, run, head, ())
    if not own:
        return Text(name, run, head, ((body, False),))
    compared = own[len(prompt) :] if prompt and own.startswith(prompt) else own
    return Text(name, run, head, differing(body, compared))
