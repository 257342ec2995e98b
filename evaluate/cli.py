"""Inject mapped states into the full models, measure what they can do with them, and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featstore.errors import SpecError
from featstore.models.references import Allowed
from featstore.runtime.console import add_version, check_directory, emit, run_app

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
add_version(app, "evaluate")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Run = Annotated[Path, typer.Option("--adapter", help="Run directory of `align train`.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", help="NAME=REF of a model that has moved; may be repeated.")
]
Layers = Annotated[str | None, typer.Option(help="Only the maps of these source layers; all by default.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Places = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Spread a model over devices: auto, balanced, or a JSON file with {MODULE: DEVICE}; instead of --device.",
    ),
]
SideChannel = Annotated[
    bool,
    typer.Option(
        "--allow-side-channel",
        help="Take layers at which later blocks learn of the text past the stream; the leak stands beside figures.",
    ),
]
Yes = Annotated[
    bool, typer.Option("--yes", help="Use models that the run's files name and you have not named: they are shown.")
]
Pickles = Annotated[
    bool,
    typer.Option(
        "--allow-pickle-weights", help="Read pickled weights, which can run code, where a model has no others."
    ),
]
Dtype = Annotated[str, typer.Option(help="Compute dtype: auto, bfloat16, float16 or float32.")]


@app.command()
def stitch(
    store: Annotated[Path, typer.Option(help="The store that the run was fitted from.")],
    adapter: Run,
    layers: Layers = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    max_tokens: Annotated[
        str, typer.Option(help="Maximum number of target tokens: a number, such as 20k, or all.")
    ] = "20k",
    keep: Annotated[
        str, typer.Option(help="What later blocks read of positions that take no state: own or hide.")
    ] = "own",
    roles: Annotated[
        str | None,
        typer.Option(
            help="Score only target tokens of these roles, such as assistant, or all; default the roles that the run "
            "was fitted to. States are put in at all positions, whatever their roles."
        ),
    ] = None,
    source_alone: Annotated[
        bool, typer.Option("--source-alone", help="Also load the source model and score it by itself.")
    ] = False,
    allow_side_channel: SideChannel = False,
    model: Models = None,
    device: Device = "auto",
    device_map: Places = None,
    dtype: Dtype = "auto",
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random controls.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for stitch.json and stitch_documents.json; the run directory by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the target's loss when a layer's states come from the source through the map, with controls."""
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
        Path | None, typer.Option(help="File with one prompt a line; five prompts of our own by default.")
    ] = None,
    layers: Layers = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of each continuation in tokens.")] = 32,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens instead of taking the most likely one.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Divides the logits; needs --sample.")] = 1.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the smallest set of this total probability; needs --sample.")
    ] = 1.0,
    allow_side_channel: SideChannel = False,
    model: Models = None,
    device: Device = "auto",
    device_map: Places = None,
    dtype: Dtype = "auto",
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling and of the random controls.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Directory for generations.json; the run directory by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue prompts in four conditions (each model alone, and each direction through the map), with controls."""
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
        typer.Option(help="countries (default), tipsheets, lookup, lookup:PAIRS or jsonl:PATH; may be repeated."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Number of examples of each task; of a file, the maximum.")] = 50,
    layers: Layers = None,
    itself: Annotated[
        bool, typer.Option("--itself", help="Also let the target communicate with itself, the identity as the map.")
    ] = False,
    form: Annotated[
        str,
        typer.Option(
            "--format", help="Format in which states travel: bfloat16, float16, float32 or fp8. Latents keep their own."
        ),
    ] = "bfloat16",
    summary_tokens: Annotated[int, typer.Option(min=1, help="Length of the source's summaries in tokens.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of each free answer in tokens.")] = 8,
    allow_side_channel: SideChannel = False,
    model: Models = None,
    device: Device = "auto",
    device_map: Places = None,
    dtype: Dtype = "auto",
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the examples and the controls.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Directory for communicate.json; the run directory by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask the target what only the source has read: from its states, from text and from nothing, with controls."""
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
    directories: Annotated[list[Path], typer.Argument(help="Run, CKA and sweep directories.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page of everything that was measured."""
    from evaluate import api

    result = api.report(directories, out=out)
    emit(result.content(), f"written: {out}", as_json=as_json)


@app.command()
def reproduce(
    store: Annotated[Path | None, typer.Option(help="An existing store; by default one is made in --out.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=REF for a new store, given twice; the demo pair by default.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Text for a new store, as in `featstore extract`.")] = None,
    max_tokens: Annotated[str | None, typer.Option(help="Tokens of each model in a new store.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers of a new store; seven depths by default.")] = None,
    stitch_tokens: Annotated[str, typer.Option(help="Number of target tokens behind every stitched loss.")] = "1200",
    task: Annotated[
        list[str] | None, typer.Option(help="Task of `communicate`, countries by default; may be repeated.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Number of questions of every task.")] = 40,
    epochs: Annotated[
        int, typer.Option(min=1, help="Epochs of every training; none stops earlier, so that the curve is whole.")
    ] = 10,
    ranks: Annotated[str, typer.Option(help="Ranks of low-rank maps.")] = "8,32,128",
    latents: Annotated[str, typer.Option(help="Sizes of compressed runs: LATENTSxWIDTH.")] = "8x32,32x64",
    roles: Annotated[
        str | None,
        typer.Option(help="Only rows of these roles, such as assistant, in every fit and figure; default all."),
    ] = None,
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Commands at a time, which share the cores; 2 for models no larger than the demo's, 1 for others.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the commands and run none.")] = False,
    out: Annotated[Path, typer.Option(help="Directory of everything that is made.")] = Path("reproduction"),
    as_json: Json = False,
) -> None:
    """Run the whole programme of experiments, or what is left of it, and answer its questions in ANALYSIS.md."""
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
