"""What was compared, and provenance: title, models, store, corpus, files, versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evaluate.reporting.reading.inputs import Node, Run, SourceFile, portable
from evaluate.reporting.reading.numbers import count, percent, say, show
from featstore.text.roles import of_roles

_HASH_DIGITS = 12
_SHAPE = (("depth", "layers"), ("width", "wide"))


@dataclass(frozen=True)
class Fact:
    """A line of the list of what was compared."""

    name: str
    values: tuple[Markup, ...]


def title(runs: Sequence[Run]) -> str:
    """The page's title: the models compared.

    Args:
        runs: What was read.
    """
    pairs = [(p.source, p.target) for run in runs for p in run.pairs if p.source]
    # A model beside itself is the ceiling of the others.
    ways = dict.fromkeys([way for way in pairs if way[0] != way[1]] or pairs)
    arrows = [
        f"{source} {'↔' if (target, source) in ways else '→'} {target}"
        for source, target in ways
        if (target, source) not in list(ways)[: list(ways).index((source, target))]
    ]
    for run in runs:
        names = [model.text for model in run.file("cka.json").get("models")]
        if len(names) == 2 and not any(set(names) == set(pair) for pair in pairs):
            arrows.append(" × ".join(names))
    return ", ".join(dict.fromkeys(arrows)) or ", ".join(run.label for run in runs)


def compared(runs: Sequence[Run]) -> list[Fact]:
    """List models, store, corpus and policies, each distinct value once.

    Args:
        runs: What was read.
    """
    facts: dict[str, dict[str, Markup]] = {}
    for run in runs:
        card = run.file("adapter.json")
        for name, model in card.get("models").items():
            _add(facts, "Models", _model(name, model))
        for owner in (card, run.file("cka.json")):
            if (store := owner.get("store")).value:
                _add(facts, "Store", _store(store))
        if corpus := _corpus(card.get("corpus")):
            _add(facts, "Corpus", corpus)
        if policy := _policy(card):
            _add(facts, "Pairs", policy)
        if words := _flat(card.get("mask")):
            _add(facts, "Mask", say("{}", words))
    return [Fact(name, tuple(values.values())) for name, values in facts.items()]


def _add(facts: dict[str, dict[str, Markup]], name: str, value: Markup) -> None:
    # What two runs say in the same words is one fact, though its numbers stand in two files.
    facts.setdefault(name, {}).setdefault(value.striptags(), value)


def files(runs: Sequence[Run]) -> list[SourceFile]:
    """List every file that was read.

    Args:
        runs: What was read.
    """
    return [source for run in runs for source in run.sources]


def versions(runs: Sequence[Run]) -> list[tuple[str, tuple[str, ...], bool]]:
    """Tabulate seed and library versions by run, and whether the runs differ.

    Args:
        runs: What was read.
    """
    found = []
    for run in runs:
        owner = run.file("adapter.json").get("provenance")
        row = {"seed": owner.get("seed").text} if owner.get("seed").text else {}
        found.append(row | {name: node.text for name, node in owner.get("versions").items()})
    names = dict.fromkeys(name for row in found for name in row)
    table = [(name, tuple(row.get(name, "") for row in found)) for name in names]
    return [(name, row, len(set(row) - {""}) > 1) for name, row in table]


def _model(name: str, model: Node) -> Markup:
    parts = [portable(model.get("reference").text), model.get("revision").text[:_HASH_DIGITS], model.get("family").text]
    parts += [f"{model.get(k).text} {word}" for k, word in _SHAPE if model.get(k).text]
    parts.append(model.get("compute_dtype").text)
    if isinstance(model.value, dict) and model.value.get("start_token", "unknown") is None:
        parts.append("no start token: the first token of each window is masked")
    return say("<b>{}</b> {}", name, ", ".join(part for part in parts if part))


def _store(store: Node) -> Markup:
    name = portable(store.get("path").text or store.text)
    return say("{} {}", name, _hash(store.get("fingerprint").text))


def _corpus(corpus: Node) -> Markup:
    origin = corpus.get("source")
    if origin.value is None:
        return say("{}", _flat(corpus))
    place = origin.text or " ".join(t for t in (origin.get("kind").text, portable(origin.get("location").text)) if t)
    sizes = [
        say("{} {}", show(corpus.get(key), count), key)
        for key in ("documents", "windows", "bytes")
        if corpus.get(key).number is not None
    ]
    return say("{} {}", Markup(", ").join([portable(place), *sizes]), _hash(corpus.get("sha256").text))


def _policy(card: Node) -> Markup:
    policy = card.get("pair_policy").text
    if not policy:
        return Markup("")
    words = {
        "end": "tokens that end at the same byte",
        "word": "last tokens of the same word",
        "byte": "tokens that end at the same byte, inside characters as well",
    }.get(policy, policy)
    shares = [say("{} of {}’s tokens", show(node, percent), name) for name, node in card.get("coverage").items()]
    of = of_roles([node.text for node in card.get("roles")])
    return say("{}{}{}{}", words, of, ": " if shares else "", Markup(", ").join(shares))


def _hash(digest: str) -> Markup:
    return say('<code title="{}">{}</code>', digest, digest[:_HASH_DIGITS]) if digest else Markup("")


def _flat(node: Node, limit: int = 39) -> str:
    if node.text:
        return portable(node.text)
    parts = [(key.replace("_", " "), portable(child.text)) for key, child in node.items()]
    parts = [(key, text if len(text) <= limit else text[:12] + "…") for key, text in parts]
    return ", ".join(f"{key} {text}" for key, text in parts if text)
