"""Inject mapped states into the full models, measure what they can do with them, and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featstore.errors import SpecError
from featstore.models.references import Allowed
from featstore.runtime.console import add_version, check_directory, emit, run_app
from featstore.runtime.options import (
    COMPUTATION,
    MODELS,
    OUTPUT,
    STORE,
    TEXT,
    TRUST,
    Device,
    DeviceMap,
    Dtype,
    Json,
    MovedModels,
    Pickles,
    Yes,
    option,
)
from featstore.text.roles import ROLES
from featstore.text.splits import SPLITS

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
add_version(app, "evaluate")

#: Panels of the help that these commands alone have.
QUESTIONS, TRAINING = "Questions and answers", "Training"

Run = Annotated[Path, option("Run directory of `align train`, whose maps are evaluated.", "--adapter", panel=MODELS)]
Layers = Annotated[
    str | None,
    option(
        "Source layers whose maps are evaluated: 8,16 or depths in percent.", panel=MODELS, default="all of the run"
    ),
]
SideChannel = Annotated[
    bool,
    option(
        "Accept layers past which later blocks still learn of the text. The size of that leak stands beside figures.",
        "--allow-side-channel",
        panel=TRUST,
    ),
]
_WHERE = "the run directory"


@app.command()
def stitch(
    store: Annotated[Path, option("Store that the run was fitted from.", panel=STORE)],
    adapter: Run,
    layers: Layers = None,
    split: Annotated[str, option("Documents to score on.", panel=TEXT, choices=SPLITS)] = "test",
    max_tokens: Annotated[
        str, option("Maximum number of target tokens: a number, an amount such as 20k, or all.", panel=TEXT)
    ] = "20k",
    keep: Annotated[
        str,
        option(
            "What later blocks read at positions that take no state.",
            panel=MODELS,
            choices=("own (the target's own states)", "hide (nothing)"),
        ),
    ] = "own",
    roles: Annotated[
        str | None,
        option(
            "Roles whose target tokens are scored, such as user,assistant. States are injected at every position, "
            "whatever its role.",
            panel=TEXT,
            choices=(*ROLES, "all"),
            default="those that the run was fitted to",
        ),
    ] = None,
    source_alone: Annotated[
        bool, option("Also load the source model and score it by itself.", "--source-alone", panel=MODELS)
    ] = False,
    allow_side_channel: SideChannel = False,
    model: MovedModels = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    seed: Annotated[int, option("Seed of the random controls.", panel=COMPUTATION, least=0)] = 0,
    out: Annotated[
        Path | None, option("Directory for stitch.json and stitch_documents.json.", panel=OUTPUT, default=_WHERE)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the target's loss when the states of a layer come from the source through the map, beside controls."""
    from evaluate import api
    from evaluate.stitching.words import describe

    result = api.stitch(
        store,
        adapter,
        layers=layers,
        split=split,
        max_tokens=max_tokens,
        keep=keep,
        roles=roles,
        source_alone=source_alone,
        allow_side_channel=allow_side_channel,
        models=model,
        device=device,
        device_map=device_map,
        dtype=dtype,
        yes=yes,
        allow_pickle_weights=allow_pickle_weights,
        seed=seed,
        out=out,
    ).content()
    emit(result, describe(result), as_json=as_json)


@app.command()
def generate(
    adapter: Run,
    prompts: Annotated[
        Path | None, option("File with one prompt a line.", panel=TEXT, default="five prompts that come along")
    ] = None,
    layers: Layers = None,
    max_new_tokens: Annotated[int, option("Number of tokens in each continuation.", panel=TEXT, least=1)] = 32,
    sample: Annotated[
        bool, option("Draw tokens instead of taking the most likely one.", "--sample", panel=TEXT)
    ] = False,
    temperature: Annotated[
        float, option("Number, above 0, that divides the logits. It needs --sample.", panel=TEXT)
    ] = 1.0,
    top_p: Annotated[
        float,
        option(
            "Draw from the fewest most likely tokens that together have this probability, above 0 and at most 1. It "
            "needs --sample.",
            "--top-p",
            panel=TEXT,
        ),
    ] = 1.0,
    allow_side_channel: SideChannel = False,
    model: MovedModels = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    seed: Annotated[int, option("Seed of sampling and of the random controls.", panel=COMPUTATION, least=0)] = 0,
    out: Annotated[Path | None, option("Directory for generations.json.", panel=OUTPUT, default=_WHERE)] = None,
    as_json: Json = False,
) -> None:
    """Continue prompts in four conditions (each model alone, and each direction through the map), beside controls."""
    from evaluate import api
    from evaluate.generation.generate import describe

    result = api.generate(
        adapter,
        prompts,
        layers=layers,
        max_new_tokens=max_new_tokens,
        sample=sample,
        temperature=temperature,
        top_p=top_p,
        allow_side_channel=allow_side_channel,
        models=model,
        device=device,
        device_map=device_map,
        dtype=dtype,
        yes=yes,
        allow_pickle_weights=allow_pickle_weights,
        seed=seed,
        out=out,
    ).content()
    emit(result, describe(result), as_json=as_json)


@app.command()
def communicate(
    adapter: Run,
    task: Annotated[
        list[str] | None,
        option(
            "Task whose questions are asked; repeat it for several.",
            panel=QUESTIONS,
            choices=("countries", "tipsheets", "lookup", "lookup:PAIRS", "jsonl:PATH"),
            default="countries",
        ),
    ] = None,
    examples: Annotated[
        int, option("Number of examples of each task; of a file, the maximum.", panel=QUESTIONS, least=1)
    ] = 50,
    layers: Layers = None,
    itself: Annotated[
        bool,
        option("Also let the target communicate with itself, with the identity as the map.", "--itself", panel=MODELS),
    ] = False,
    form: Annotated[
        str,
        option(
            "Number format in which states are sent. Latents keep their own.",
            "--format",
            panel=MODELS,
            choices=("bfloat16", "float16", "float32", "fp8"),
        ),
    ] = "bfloat16",
    summary_tokens: Annotated[
        int, option("Number of tokens in each summary that the source writes.", panel=QUESTIONS, least=1)
    ] = 16,
    max_new_tokens: Annotated[int, option("Maximum number of tokens in a free answer.", panel=QUESTIONS, least=1)] = 8,
    allow_side_channel: SideChannel = False,
    model: MovedModels = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    seed: Annotated[int, option("Seed of the examples and of the controls.", panel=COMPUTATION, least=0)] = 0,
    out: Annotated[Path | None, option("Directory for communicate.json.", panel=OUTPUT, default=_WHERE)] = None,
    as_json: Json = False,
) -> None:
    """Ask the target what only the source has read: from the source's states, from text and from nothing."""
    from evaluate import api
    from evaluate.communication.verdicts import describe

    result = api.communicate(
        adapter,
        task or "countries",
        examples=examples,
        layers=layers,
        itself=itself,
        format=form,
        summary_tokens=summary_tokens,
        max_new_tokens=max_new_tokens,
        allow_side_channel=allow_side_channel,
        models=model,
        device=device,
        device_map=device_map,
        dtype=dtype,
        yes=yes,
        allow_pickle_weights=allow_pickle_weights,
        seed=seed,
        out=out,
    ).content()
    emit(result, describe(result), as_json=as_json)


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Directories of runs, similarities and sweeps to report.")],
    out: Annotated[Path, option("HTML file to write.", panel=OUTPUT)] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page of everything that was measured."""
    from evaluate import api

    result = api.report(directories, out=out)
    emit(result.content(), f"written: {out}", as_json=as_json)


@app.command()
def reproduce(
    store: Annotated[
        Path | None, option("Store to experiment on.", panel=STORE, default="a new one, made in --out")
    ] = None,
    model: Annotated[
        list[str] | None,
        option("A model of a new store, as NAME=REF; give two.", panel=STORE, default="the demo pair"),
    ] = None,
    dataset: Annotated[
        str | None,
        option(
            "Text of a new store, as in `featstore extract`.",
            panel=STORE,
            default="that of `featstore extract`, or the demo's sample",
        ),
    ] = None,
    max_tokens: Annotated[
        str | None,
        option("Maximum number of tokens per model of a new store.", panel=STORE, default="as in `featstore extract`"),
    ] = None,
    layers: Annotated[str | None, option("Layers of a new store.", panel=STORE, default="seven depths")] = None,
    stitch_tokens: Annotated[
        str,
        option(
            "Number of target tokens behind every stitched loss: a number, an amount such as 20k, or all.", panel=TEXT
        ),
    ] = "1200",
    task: Annotated[
        list[str] | None,
        option(
            "Task of `evaluate communicate`; repeat it for several.",
            panel=QUESTIONS,
            choices=("countries", "tipsheets", "lookup", "lookup:PAIRS", "jsonl:PATH"),
            default="countries",
        ),
    ] = None,
    examples: Annotated[int, option("Number of questions of each task.", panel=QUESTIONS, least=1)] = 40,
    epochs: Annotated[
        int,
        option(
            "Number of epochs of every training. None stops earlier, so that its curve is whole.",
            panel=TRAINING,
            least=1,
        ),
    ] = 10,
    ranks: Annotated[str, option("Ranks of low-rank maps, separated by commas.", panel=TRAINING)] = "8,32,128",
    latents: Annotated[
        str, option("Sizes of compressed runs, each as LATENTSxWIDTH, separated by commas.", panel=TRAINING)
    ] = "8x32,32x64",
    roles: Annotated[
        str | None,
        option(
            "Roles whose rows are in every fit and figure, such as user,assistant.",
            panel=TEXT,
            choices=ROLES,
            default="all",
        ),
    ] = None,
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    workers: Annotated[
        int | None,
        option(
            "Number of commands that run at a time and share the cores.",
            panel=COMPUTATION,
            least=1,
            default="2 for models no larger than the demo's, else 1",
        ),
    ] = None,
    dry_run: Annotated[bool, option("List the commands and run none.", "--dry-run", panel=OUTPUT)] = False,
    out: Annotated[Path, option("Directory for everything that is made.", panel=OUTPUT)] = Path("reproduction"),
    as_json: Json = False,
) -> None:
    """Run the whole programme of experiments, or resume it, and answer its questions in ANALYSIS.md."""
    from evaluate import reproduce as programme

    check_directory(out)
    given = programme.parse_scale(
        stitch_tokens=stitch_tokens,
        tasks=tuple(dict.fromkeys(task or ["countries"])),
        examples=examples,
        epochs=epochs,
        ranks=ranks,
        latents=latents,
        roles=roles,
    )
    corpus = programme.Corpus(tuple(model or ()), dataset, max_tokens, layers or programme.LAYERS)
    if store is not None and corpus != programme.Corpus():
        raise SpecError("--model, --dataset, --max-tokens and --layers make a store; leave them out with --store")
    if dry_run:
        listed = programme.commands(out, given, store=store, corpus=corpus)
        emit(listed, programme.describe_commands(listed), as_json=as_json)
        return
    allowed = Allowed(yes, allow_pickle_weights)
    result = programme.reproduce(out, given, store=store, corpus=corpus, allowed=allowed, workers=workers)
    emit(result, programme.describe(result), as_json=as_json)
    if result["failed"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `evaluate` command."""
    run_app(app, "evaluate", extra="evaluate")
