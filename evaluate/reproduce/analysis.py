"""``ANALYSIS.md``: the programme's questions, each claim beside its measurement, with the figures behind it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluate.reproduce.answers import answer_all
from evaluate.reproduce.answers.base import Answer, Table
from evaluate.reproduce.evidence import Evidence
from evaluate.reproduce.places import Places
from evaluate.reproduce.plots import draw_all
from featstore.runtime.console import human, human_seconds
from featstore.runtime.provenance import write_atomic, write_json
from featstore.store import Store
from featstore.text.splits import SPLITS

NAME = "ANALYSIS.md"


def write_analysis(
    out: Path,
    store: Store,
    places: Places,
    *,
    seconds: Mapping[str, float],
    failed: Mapping[str, str],
    commands: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """Answer the questions and write ``ANALYSIS.md``, its plots and ``analysis.json``.

    Args:
        out: The programme's directory.
        store: Its store.
        places: Its layer pairs.
        seconds: Of every finished step.
        failed: Why others are not done.
        commands: Of every step.

    Returns:
        The answers, as ``analysis.json`` holds them.
    """
    evidence = Evidence(out, places)
    drawn = draw_all(evidence, out)
    answers = answer_all(evidence)
    parts = [
        _head(store, places),
        _summary(answers),
        *(_section(number, answer, drawn, out) for number, answer in enumerate(answers, 1)),
        _warnings(evidence),
        _programme(seconds, failed, commands),
    ]
    write_atomic(out / NAME, "\n\n".join(part for part in parts if part) + "\n")
    blocks = [answer.block() for answer in answers]
    write_json(out / "analysis.json", {"answers": blocks, "seconds": dict(seconds), "failed": dict(failed)})
    return blocks


def _head(store: Store, places: Places) -> str:
    pairs = store.pairs(places.source, places.target)
    counts = ", ".join(f"{human(int((pairs.split == i).sum()))} {name}" for i, name in enumerate(SPLITS))
    models = "; ".join(
        f"`{name}` ({store.model(name).depth} blocks of width {store.model(name).width})"
        for name in (places.source, places.target)
    )
    others = [name for name in store.models if name not in (places.source, places.target)]
    left_out = f" Not compared, since the programme takes the store's first two: {', '.join(others)}." if others else ""
    layers = ", ".join(f"{pair.source_layer}:{pair.target_layer}" for pair in places.pairs)
    return (
        f"# What connects {places.source} and {places.target}\n\n"
        f"Models: {models}. Layer pairs: {layers}. Pairs of token states: {counts}.{left_out}\n\n"
        "Maps are fitted on train documents, chosen on validation, and every figure below is of test documents unless "
        "it says otherwise. Brackets are 95 % intervals over documents, of accuracies over questions. A claim is about "
        "one figure, the mean over all layer pairs where there are several. It is *supported* where the whole interval "
        "lies inside the claimed range, *contradicted* where it lies wholly outside, and *undecided* elsewhere, with "
        "the number of documents that would decide it if the figure stayed as it is. The claims are those of the "
        "experiment that this programme repeats, as they were written down before it; it had neither validation nor "
        "controls."
    )


def _summary(answers: Sequence[Answer]) -> str:
    rows = [
        (
            f"[{answer.question}](#{number}-{_anchor(answer.question)})",
            answer.expected,
            answer.found,
            _verdict(answer),
        )
        for number, answer in enumerate(answers, 1)
    ]
    return f"## The questions\n\n{_markdown(Table('', ('question', 'expected', 'measured', 'verdict'), rows))}"


def _verdict(answer: Answer) -> str:
    needed = "" if answer.decided_by is None else f" (about {human(answer.decided_by)} {answer.unit} would decide)"
    return f"**{answer.verdict}**{needed}"


def _section(number: int, answer: Answer, drawn: Sequence[str], out: Path) -> str:
    parts = [
        f"## {number}. {answer.question}",
        f"Claimed: {answer.expected}\n\nMeasured: {answer.found}\n\nVerdict: {_verdict(answer)}",
        " ".join(answer.words),
    ]
    parts += [f"![{Path(name).stem}]({name})" for name in answer.plots if name in drawn]
    parts += [f"*{table.title}*\n\n{_markdown(table)}" for table in answer.tables]
    if answer.sources:
        # A pattern stands for many files, which a link cannot.
        links = (
            f"`{name}`" if "*" in name or not (out / name).exists() else f"[{name}]({name})" for name in answer.sources
        )
        parts.append(f"From {', '.join(dict.fromkeys(links))}.")
    return "\n\n".join(part for part in parts if part)


def _warnings(evidence: Evidence) -> str:
    """What the commands objected to, by kind: a reader must not have to open every file to learn of it."""
    runs: dict[str, Counter[str]] = {}
    texts: dict[str, str] = {}
    for run in evidence.runs:
        for entry in evidence.pairs(run).values():
            for warning in entry.warnings:
                runs.setdefault(warning.code, Counter())[run] += 1
                texts.setdefault(warning.code, warning.sentence)
    if not runs:
        return "## Warnings\n\nNone."
    rows = [
        (f"`{code}`", ", ".join(f"{run} {count}" for run, count in runs[code].items()), texts[code])
        for code in sorted(runs)
    ]
    table = _markdown(Table("", ("code", "layer pairs by run", "the first of them"), rows))
    return f"## Warnings\n\nOf the fits, as their `metrics.json` have them.\n\n{table}"


def _programme(seconds: Mapping[str, float], failed: Mapping[str, str], commands: Mapping[str, Sequence[str]]) -> str:
    rows = [
        (
            name,
            human_seconds(seconds[name]) if name in seconds else failed.get(name, "before an interruption"),
            f"`{shlex.join(command)}`",
        )
        for name, command in commands.items()
    ]
    return (
        f"## The programme\n\n{len(commands)} commands, {human_seconds(sum(seconds.values()))}; `OUT` is this "
        f"directory.\n\n{_markdown(Table('', ('step', 'took', 'command'), rows))}"
    )


def _markdown(table: Table) -> str:
    lines = [table.header, tuple("---" for _ in table.header), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _anchor(heading: str) -> str:
    """As the renderers of Markdown name a heading."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")
