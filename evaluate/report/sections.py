"""What was compared, training curves, generated texts and provenance: the report's other sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from evaluate.report.inputs import Node, Pair, Run, SourceFile, portable
from evaluate.report.numbers import count, exact, fixed, percent, say, show
from evaluate.report.svg import Mark, Series, chart_key, line_chart
from evaluate.report.words import control_name

_HASH_DIGITS = 12
_SHAPE = (("depth", "layers"), ("width", "wide"))

#: Where an epoch's number stands, and where its figures stand.
_Epoch = tuple[Node, Node]


@dataclass(frozen=True)
class Fact:
    """A line of the list of what was compared."""

    name: str
    values: tuple[Markup, ...]


@dataclass(frozen=True)
class Training:
    """One layer pair's epochs."""

    run: str
    title: str
    source: str
    svg: Markup
    key: Markup
    notes: tuple[Markup, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[Markup, ...], ...]


@dataclass(frozen=True)
class Text:
    """A generated text and what is remarkable about it."""

    title: str
    run: str
    head: str
    body: str | None
    notes: tuple[tuple[str, str], ...] = ()
    controls: tuple[Text, ...] = ()


@dataclass
class Prompt:
    """Everything generated for one prompt between two models."""

    prompt: str
    source: str
    target: str
    alone: list[Text] = field(default_factory=list)
    forward: list[Text] = field(default_factory=list)
    backward: list[Text] = field(default_factory=list)


def title(runs: Sequence[Run]) -> str:
    """The page's title: the models compared.

    Args:
        runs: What was read.
    """
    pairs = [(p.source, p.target) for run in runs for p in run.pairs if p.source]
    ways = dict.fromkeys(pairs)
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
    facts: dict[str, dict[Markup, None]] = {}
    for run in runs:
        card = run.file("adapter.json")
        for name, model in card.get("models").items():
            facts.setdefault("Models", {})[_model(name, model)] = None
        for owner in (card, run.file("cka.json")):
            if (store := owner.get("store")).value:
                facts.setdefault("Store", {})[_store(store)] = None
            if corpus := _corpus(owner.get("corpus")):
                facts.setdefault("Corpus", {})[corpus] = None
        if policy := _policy(card):
            facts.setdefault("Pairs", {})[policy] = None
        if words := _flat(card.get("mask")):
            facts.setdefault("Mask", {})[say("{}", words)] = None
    return [Fact(name, tuple(values)) for name, values in facts.items()]


def trainings(run: Run) -> list[Training]:
    """Draw every layer pair's losses by epoch.

    Args:
        run: The run.
    """
    if not run.trained:
        return []  # a closed form logs itself as epoch 0: one point is no curve
    keys = [pair.key for pair in run.pairs]
    keys += [event.get("pair").text for event in run.log]
    keys += [key for epoch in run.epochs for key, _ in epoch.get("pairs").items()]
    found = [_training(run, key, _epochs(run, key)) for key in dict.fromkeys(keys) if key]
    curves = [training for training in found if training is not None]
    if curves or not run.epochs:
        return curves
    mean = _training(run, "", [(epoch.get("epoch"), epoch) for epoch in run.epochs])
    return [mean] if mean else []


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
        owner = run.file("adapter.json" if run.holds_a_map else "cka.json").get("provenance")
        row = {"seed": owner.get("seed").text} if owner.get("seed").text else {}
        found.append(row | {name: node.text for name, node in owner.get("versions").items()})
    names = dict.fromkeys(name for row in found for name in row)
    table = [(name, tuple(row.get(name, "") for row in found)) for name in names]
    return [(name, row, len(set(row) - {""}) > 1) for name, row in table]


def _model(name: str, model: Node) -> Markup:
    parts = [portable(model.get("reference").text), model.get("revision").text[:_HASH_DIGITS], model.get("family").text]
    parts += [f"{model.get(k).text} {word}" for k, word in _SHAPE if model.get(k).text]
    parts.append(model.get("compute_dtype").text)
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
    words = {"end": "tokens that end at the same byte", "word": "last tokens of the same word"}.get(policy, policy)
    shares = [say("{} of {}’s tokens", show(node, percent), name) for name, node in card.get("coverage").items()]
    return say("{}{}{}", words, ": " if shares else "", Markup(", ").join(shares))


def _hash(digest: str) -> Markup:
    return say('<code title="{}">{}</code>', digest, digest[:_HASH_DIGITS]) if digest else Markup("")


def _flat(node: Node, limit: int = 39) -> str:
    if node.text:
        return portable(node.text)
    parts = [(key.replace("_", " "), portable(child.text)) for key, child in node.items()]
    parts = [(key, text if len(text) <= limit else text[:12] + "…") for key, text in parts]
    return ", ".join(f"{key} {text}" for key, text in parts if text)


def _epochs(run: Run, key: str) -> list[_Epoch]:
    """The epochs from the log, or else the epoch files; a resumed run's last word counts."""
    logged = {
        event.get("epoch").number: (event.get("epoch"), event)
        for event in run.log
        if event.get("event").value == "epoch" and event.get("pair").text == key
    }
    if logged:
        return [entry for epoch, entry in sorted(logged.items(), key=lambda e: e[0] or 0.0)]
    blocks = [(epoch.get("epoch"), epoch.get("pairs", key)) for epoch in run.epochs]
    return [(epoch, block) for epoch, block in blocks if block.value is not None]


def _training(run: Run, key: str, epochs: Sequence[_Epoch]) -> Training | None:
    lines = []
    for name, figure in (("training", "train_loss"), ("validation", "val_loss")):
        points = [
            (epoch.number, Mark(node.get(figure).number, name=f"{name}, epoch {epoch.text}")) for epoch, node in epochs
        ]
        known = [(x, mark) for x, mark in points if x is not None]
        if any(mark.value is not None for _, mark in known):
            lines.append(Series(name, known))
    if not lines:
        return None
    closed = run.file("metrics.json").get("pairs", key, "baselines", "closed_form", "r2")
    references, notes = [], []
    if closed.number is not None:
        references = [(1 - closed.number, "closed form")]
        text = (
            "Dashed: the closed form’s error on the test split, 1 − R² = {} (R² {}). "
            "The validation loss is on the same scale."
        )
        notes.append(say(text, fixed(1 - closed.number, 3), show(closed)))
    notes += _stops(run, key)
    label = str(Pair.parse(key)) if key else "mean over layer pairs"
    svg = line_chart(
        lines,
        label=f"Loss by epoch, {label}, {run.label}",
        axes=("epoch", "loss"),
        references=references,
    )
    columns = ("train_loss", "val_loss", "cka", "cosine_sim", "lr", "seconds")
    shown = [c for c in columns if any(node.get(c).number is not None for _, node in epochs)]
    rows = tuple((_figure(epoch), *(_figure(node.get(c)) for c in shown)) for epoch, node in epochs)
    sources = dict.fromkeys(node.at.split("#")[0] for _, node in epochs)
    return Training(
        run=run.label,
        title=label,
        source=_span(list(sources)),
        svg=svg,
        key=chart_key([line.name for line in lines]),
        notes=tuple(notes),
        header=("epoch", *(control_name(c) for c in shown)),
        rows=rows,
    )


def _figure(node: Node) -> Markup:
    return show(node, exact, "not given for this epoch")


def _stops(run: Run, key: str) -> list[Markup]:
    stops = [event for event in run.log if event.get("event").value == "stop" and event.get("pair").text == key]
    return [
        say(
            "{}. Kept is epoch {}.",
            (reason[:1].upper() + reason[1:]) or "No reason is given for the end",
            show(stop.get("best_epoch"), exact),
        )
        for stop in stops[-1:]
        for reason in [stop.get("reason").text.rstrip(".")]
    ]


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1].rsplit('/', 1)[-1]}"


def _gather(prompt: Prompt, run: Run, entry: Node) -> None:
    alone = {side: entry.get(f"{side}_alone") for side in ("source", "target")}
    for side, model in (("source", prompt.source), ("target", prompt.target)):
        text = _text(f"{model} alone", run.label, prompt.prompt, alone[side])
        same = [t for t in prompt.alone if (t.title, t.head, t.body) == (text.title, text.head, text.body)]
        if not same:
            prompt.alone.append(text)
    for side, writer, into in (
        ("source_to_target", alone["target"], prompt.forward),
        ("target_to_source", alone["source"], prompt.backward),
    ):
        for key, texts in entry.get(side).items():
            into.append(_mapped(Pair.parse(key), run, prompt.prompt, texts, writer))


def _mapped(pair: Pair, run: Run, prompt: str, texts: Node, writer: Node) -> Text:
    mapped = texts.get("mapped")
    others = [(name, node) for name, node in texts.items() if name != "mapped"]
    notes = []
    if mapped.text and mapped.text == writer.text:
        notes.append(("plain", "the same as without injection"))
    twins = [control_name(n) for n, node in others if n != "self" and node.text == mapped.text]
    if mapped.text and twins:
        notes.append(("caution", f"the same as control: {', '.join(twins)}"))
    own = texts.get("self")
    if own.text and writer.text and own.text != writer.text:
        notes.append(("caution", "self-injection changed the text: compare with care"))
    controls = tuple(_text(control_name(n), run.label, prompt, node) for n, node in others)
    base = _text(str(pair), run.label, prompt, mapped)
    return Text(base.title, base.run, base.head, base.body, tuple(notes), controls)


def _text(name: str, run: str, prompt: str, node: Node) -> Text:
    if not isinstance(node.value, str):
        return Text(name, run, "", None)
    head = prompt if prompt and node.text.startswith(prompt) else ""
    body = node.text[len(head) :].rstrip()
    return Text(name, run, head, body if head else body.lstrip(" "))
