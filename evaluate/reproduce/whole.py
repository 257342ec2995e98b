"""The programme from one end to the other: a store, its steps, the analysis, the report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate.reproduce.analysis import NAME, write_analysis
from evaluate.reproduce.places import LAYERS, places
from evaluate.reproduce.programme import Scale, Step, programme
from evaluate.reproduce.running import Record, carry_out
from featstore.errors import SpecError
from featstore.extraction.named import references_of
from featstore.models.references import NOTHING, Allowed, parse_models
from featstore.runtime.console import human_seconds
from featstore.runtime.extras import require
from featstore.runtime.quantities import parse_budget
from featstore.runtime.subcommands import run_stage
from featstore.runtime.visible import inline
from featstore.runtime.writing import check_folder, make_folder
from featstore.store import Store, open_store
from featstore.text.roles import roles_text

#: Text of the demo pair: small enough for two cores, large enough that every figure means something.
_DEMO_TEXT = ("--max-documents", "60", "--max-document-bytes", "1200")
_CACHE = Path(".cache/demo")
#: Of a store that is made, below the programme's directory.
_STORE = "store.zarr"
#: Blocks times width squared of models of which two commands at a time may hold one each: a few hundred MB.
_SMALL = 30 * 576**2
#: Commands that load models.
_LOADING = ("extract", "stitch", "generate", "communicate")


@dataclass(frozen=True)
class Corpus:
    """What a store is made from, as ``featstore extract`` takes it.

    Attributes:
        models: ``NAME=REF``, two; empty for the demo pair.
        dataset: Text; None for the default of ``featstore extract``, or the demo's sample.
        max_tokens: Tokens of each model at most.
        layers: Depths or numbers.
    """

    models: tuple[str, ...] = ()
    dataset: str | None = None
    max_tokens: str | None = None
    layers: str = LAYERS


def parse_scale(
    *,
    stitch_tokens: str,
    tasks: tuple[str, ...],
    examples: int,
    epochs: int,
    ranks: str,
    latents: str,
    roles: str | None = None,
) -> Scale:
    """Read a scale as it is typed.

    Args:
        stitch_tokens: A number, 20k, or all.
        tasks: As ``evaluate communicate --task`` takes them.
        examples: Questions of every task.
        epochs: Of every training.
        ranks: ``8,32``.
        latents: ``8x32,32x64``: how many, by their width.
        roles: ``user,assistant``; None for all.

    Raises:
        SpecError: Something of it does not parse, or a task is unknown.
    """
    from evaluate.communication.tasks.named import make

    parse_budget(stitch_tokens)
    for task in tasks:
        make(task, examples, 0)
    try:
        shapes = [tuple(int(side) for side in shape.split("x")) for shape in latents.split(",")]
        pairs = tuple((count, width) for count, width in shapes)
    except ValueError as error:
        raise SpecError(f"--latents {latents!r}: write LATENTSxWIDTH, such as 8x32,32x64") from error
    if not all(rank.strip().isdecimal() and int(rank) for rank in ranks.split(",")):
        raise SpecError(f"--ranks {ranks!r}: write numbers from 1, such as 8,32")
    if not all(count > 0 and width > 0 for count, width in pairs):
        raise SpecError(f"--latents {latents!r}: both numbers must be 1 or more")
    numbers = tuple(sorted({int(rank) for rank in ranks.split(",")}))
    return Scale(stitch_tokens, examples, tasks, epochs, numbers, tuple(dict.fromkeys(pairs)), roles_text(roles))


def reproduce(
    out: Path,
    scale: Scale,
    *,
    store: Path | None,
    corpus: Corpus,
    allowed: Allowed = NOTHING,
    workers: int | None = None,
    run: Callable[..., Any] = run_stage,
) -> dict[str, Any]:
    """Carry out the programme, or what is left of it, and write its analysis.

    Args:
        out: Directory for everything.
        scale: How much of everything.
        store: An existing store; None to make one in ``out``.
        corpus: What to make it from.
        allowed: Whether models are loaded that the store names and the user has not, and pickled weights read. It does
            not make a step another one.
        workers: Commands at a time; None for :func:`default_workers`.
        run: Runs a command; raises :class:`StageError` where it fails.

    Returns:
        ``analysis`` and ``report`` (paths), ``answers`` (what was asked, expected, found and concluded), ``seconds`` by
        step, and ``failed`` (why, by step).

    Raises:
        MissingPackageError: What writes the report in the end is not installed.
        StrangeReferenceError: The store names models that the user has not named.
        StageError: The report could not be written.
        SpecError: The store could not be made, the programme cannot be run on it, or ``out`` holds results of other
            options.
        StoreNotFoundError: There is no store where it should be.
        KeyboardInterrupt: Interrupted; the same command goes on.
    """
    require("jinja2", "matplotlib")
    if store is not None:
        references_of(open_store(store), (), allowed)  # before the steps that need no model, which take hours
    run = _allowing(run, allowed)
    first = [] if store is not None else [_extraction(out, corpus, build=True)]
    for name in ("runs", _STORE):
        check_folder(out, name, make=False)
    make_folder(out)
    record = Record(out)
    if failed := carry_out(first, record, out, run=run):
        raise SpecError(f"the store could not be made ({failed['extract']}); mend that and give the same command")
    store = store or out / _STORE
    opened = open_store(store)
    steps = [*first, *plan(opened, store, out, scale)]
    failed = carry_out(steps, record, out, run=run, workers=workers or default_workers(opened))
    seconds = {step.name: took for step in steps if (took := record.of(step)["seconds"]) is not None}
    commands_run = {step.name: record.of(step)["command"] for step in steps}
    told = {"seconds": seconds, "failed": failed, "commands": commands_run}
    answers = write_analysis(out, opened, places(opened), **told)
    report = out / "report.html"
    run("evaluate", "report", *map(str, _reported(steps, failed, out)), "--out", str(report))
    return {
        "analysis": str(out / NAME),
        "report": str(report),
        "answers": answers,
        "seconds": seconds,
        "failed": failed,
    }


def default_workers(opened: Store) -> int:
    """How many commands run at a time where nobody says.

    Args:
        opened: The store.

    Returns:
        Two where models are no larger than those of the demo pair; one elsewhere, since each command holds a model.
    """
    size = max(opened.model(name).depth * opened.model(name).width ** 2 for name in opened.models)
    return 2 if size <= _SMALL and (os.cpu_count() or 1) > 1 else 1


def _allowing(run: Callable[..., Any], allowed: Allowed) -> Callable[..., Any]:
    """Runs commands, those that load models with what the user allows."""
    flags = (("--yes", allowed.references), ("--allow-pickle-weights", allowed.pickles))
    given = tuple(flag for flag, set_ in flags if set_)

    def run_allowing(tool: str, *arguments: str) -> Any:
        return run(tool, *arguments, *(given if arguments[0] in _LOADING else ()))

    return run_allowing


def plan(opened: Store, store: Path, out: Path, scale: Scale) -> list[Step]:
    """The commands of the programme over a store.

    Args:
        opened: The store.
        store: Its path.
        out: Where everything goes.
        scale: How much of everything.

    Raises:
        SpecError: A store that the programme cannot be run on.
    """
    found = places(opened)
    widths = (opened.model(found.source).width, opened.model(found.target).width)
    return programme(store, out, found, scale, widths)


def commands(out: Path, scale: Scale, *, store: Path | None, corpus: Corpus) -> dict[str, Any]:
    """What :func:`reproduce` would run; nothing is run, built or written.

    Args:
        out: As there.
        scale: As there.
        store: As there.
        corpus: As there.

    Returns:
        ``commands``, each ``{"step", "command"}``; ``complete``, whether these are all: the rest depends on the store.

    Raises:
        SpecError: As :func:`reproduce`.
        StoreNotFoundError: There is no store where it should be.
    """
    steps = [] if store is not None else [_extraction(out, corpus, build=False)]
    path = store or out / _STORE
    known = store is not None or path.exists()
    if known:
        steps += plan(open_store(path), path, out, scale)
    listed = [{"step": step.name, "command": shlex.join((step.tool, *step.arguments))} for step in steps]
    return {"commands": listed, "complete": known}


def describe_commands(listed: Mapping[str, Any]) -> str:
    """The commands, a line each.

    Args:
        listed: From :func:`commands`.
    """
    lines = [entry["command"] for entry in listed["commands"]]
    if not listed["complete"]:
        lines.append("(the other commands depend on the store; add --dry-run to this one to see its size)")
    return "\n".join(lines)


def describe(result: Mapping[str, Any]) -> str:
    """What came of the questions, a line each, for people.

    Args:
        result: From :func:`reproduce`.
    """
    lines = [f"{answer['verdict']:18} {answer['question']} {answer['found']}" for answer in result["answers"]]
    lines += [f"not done: {name}: {inline(why)}" for name, why in result["failed"].items()]
    lines.append(f"steps took {human_seconds(sum(result['seconds'].values()))}; read {result['analysis']}")
    return "\n".join(lines)


def _extraction(out: Path, corpus: Corpus, *, build: bool) -> Step:
    """The command that makes the store; where no models are named it is of the demo pair, which is built first."""
    models: Sequence[str] = corpus.models
    text: tuple[str, ...] = () if corpus.dataset is None else ("--dataset", corpus.dataset)
    if not models:
        from featstore.demo.pair import build_pair
        from featstore.demo.sample import sample_path

        if build:
            build_pair(_CACHE, _CACHE / "assets")
        models = (f"smollm2={_CACHE / 'smollm2'}", f"twin={_CACHE / 'twin'}")
        text = text or ("--dataset", f"jsonl:{sample_path()}", *_DEMO_TEXT)
    elif len(parse_models(models)) != 2:
        raise SpecError(f"--model: the programme connects two models, not {len(models)}; name two")
    named = tuple(part for model in models for part in ("--model", model))
    cap = () if corpus.max_tokens is None else ("--max-tokens", corpus.max_tokens)
    arguments = ("extract", *named, *text, *cap, "--layers", corpus.layers, "--store", str(out / _STORE))
    return Step("extract", "featstore", arguments, (f"{_STORE}/zarr.json",))


def _reported(steps: Sequence[Step], failed: Mapping[str, str], out: Path) -> list[Path]:
    """Directories of finished fits and of CKA."""
    shown = (step for step in steps if step.name not in failed and (step.fits or step.name == "cka"))
    return [out / Path(step.makes[0]).parent for step in shown]
