"""`evaluate`: stitch, generate, communicate, report, reproduce. A thin skin over the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from featstore.errors import SpecError
from featstore.runtime.console import check_directory, emit, jsonable, run_app
from featstore.runtime.quantities import parse_budget
from featstore.text.corpus import SPLITS

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode="rich")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
AdapterPath = Annotated[Path, typer.Option("--adapter", help="Run directory of `align train`.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="NAME=REF for a model that moved; repeat.")]
Layers = Annotated[str | None, typer.Option(help="Only these source layers of the run.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")]
Dtype = Annotated[str, typer.Option(help="Compute dtype: auto, bfloat16, float16, float32.")]


@app.command()
def stitch(
    store: Annotated[Path, typer.Option(help="The store the run was fitted from.")],
    adapter: AdapterPath,
    layers: Layers = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    max_tokens: Annotated[str, typer.Option(help="Target tokens at most: a number, 20k, or all.")] = "20k",
    keep: Annotated[
        str, typer.Option(help="What later blocks read of positions that take no state: own or hide.")
    ] = "own",
    source_alone: Annotated[
        bool, typer.Option("--source-alone", help="Also load the source model and score it by itself.")
    ] = False,
    model: Models = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the random controls.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where stitch.json goes; default the run directory.")] = None,
    as_json: Json = False,
) -> None:
    """Measure the target's loss when a layer's states come from the source through the map, with controls."""
    from align.maps.fitted import load_adapter
    from evaluate.results import Stitched, write_stitch
    from evaluate.stitching import stitch as stitching
    from featstore.store import open_store

    if split not in SPLITS:
        raise SpecError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    if out is not None:
        check_directory(out)
    result = jsonable(
        stitching.stitch(
            open_store(store),
            load_adapter(adapter),
            layers=layers,
            overrides=model or (),
            device=device,
            dtype=dtype,
            split=SPLITS.index(split),
            max_tokens=parse_budget(max_tokens),
            keep=keep,
            source_alone=source_alone,
            seed=seed,
        )
    )
    write_stitch(out or adapter, Stitched.parse(result))
    emit(result, escape(stitching.describe(result)), as_json=as_json)


@app.command()
def generate(
    adapter: AdapterPath,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line; default five prompts.")] = None,
    layers: Layers = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of each continuation.")] = 32,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample: divides the logits.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", help="With --sample: draw from this share of probability.")] = 1.0,
    model: Models = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the random controls.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where generations.json goes; default the run directory.")] = None,
    as_json: Json = False,
) -> None:
    """Continue prompts in four conditions (each model alone, and each way through the map), with controls."""
    from align.maps.fitted import load_adapter
    from evaluate.generation import generate as generating
    from evaluate.injection.continuing import Sampling
    from evaluate.results import Generations, write_generations

    if not sample and (temperature, top_p) != (1.0, 1.0):
        raise SpecError("--temperature and --top-p need --sample")
    if out is not None:
        check_directory(out)
    result = generating.generate(
        load_adapter(adapter),
        generating.read_prompts(prompts),
        layers=layers,
        max_new_tokens=max_new_tokens,
        sample=Sampling(temperature, top_p, seed) if sample else None,
        overrides=model or (),
        device=device,
        dtype=dtype,
        seed=seed,
    )
    write_generations(out or adapter, Generations.parse(jsonable(result)))
    emit(result, escape(generating.describe(result)), as_json=as_json)


@app.command()
def communicate(
    adapter: AdapterPath,
    task: Annotated[
        list[str] | None, typer.Option(help="countries (default), tipsheets, lookup, lookup:PAIRS, jsonl:PATH; repeat.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="How many of each task; of a file at most.")] = 50,
    layers: Layers = None,
    itself: Annotated[
        bool, typer.Option("--itself", help="Also the target with itself, the identity as the map.")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", help="What states travel in: bfloat16, float16, float32, fp8; not latents.")
    ] = "bfloat16",
    summary_tokens: Annotated[int, typer.Option(min=1, help="Length of the source's summaries.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of each free answer.")] = 8,
    model: Models = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the examples and the controls.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where communicate.json goes; default the run directory.")] = None,
    as_json: Json = False,
) -> None:
    """Ask the target what only the source has read: from its states, from text and from nothing, with controls."""
    from align.maps.fitted import load_adapter
    from evaluate.communication import communicate as communicating
    from evaluate.communication.tasks.named import make
    from evaluate.results import Communication, write_communication

    if out is not None:
        check_directory(out)
    # A mistyped task is refused before the wait for the weights.
    asked = [make(name, examples, seed) for name in dict.fromkeys(task or ["countries"])]
    run = load_adapter(adapter)
    result: dict[str, Any] = {}
    for one in asked:
        found = jsonable(
            communicating.communicate(
                run,
                one,
                layers=layers,
                itself=itself,
                form=form,
                summary_tokens=summary_tokens,
                max_new_tokens=max_new_tokens,
                overrides=model or (),
                device=device,
                dtype=dtype,
                seed=seed,
            )
        )
        result = {**found, "tasks": {**result.get("tasks", {}), **found["tasks"]}}
        # After each, so that an interruption costs one task.
        write_communication(out or adapter, Communication.parse(result))
    emit(result, escape(communicating.describe(result)), as_json=as_json)


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Run, CKA and sweep directories.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page of everything that was measured."""
    from evaluate.reporting import write_report

    check_directory(out.parent, out)
    result = write_report(directories, out)
    emit(result, f"written: {out}", as_json=as_json)


@app.command()
def reproduce(
    store: Annotated[Path | None, typer.Option(help="A store that is there; default one is made in --out.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=REF of a store to be made, twice; default the demo pair.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Text of a store to be made, as `featstore extract` has it.")
    ] = None,
    max_tokens: Annotated[str | None, typer.Option(help="Tokens of each model in a store to be made.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers of a store to be made; default seven depths.")] = None,
    stitch_tokens: Annotated[str, typer.Option(help="Target tokens of every stitched loss.")] = "1200",
    task: Annotated[list[str] | None, typer.Option(help="As of `communicate`; default countries.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Questions of every task.")] = 40,
    epochs: Annotated[
        int, typer.Option(min=1, help="Of every training; none stops earlier, so the curve is whole.")
    ] = 10,
    ranks: Annotated[str, typer.Option(help="Of low-rank maps.")] = "8,32,128",
    latents: Annotated[str, typer.Option(help="Formats of compressed runs: LATENTSxWIDTH.")] = "8x32,32x64",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the commands; run none.")] = False,
    out: Annotated[Path, typer.Option(help="Directory for everything.")] = Path("reproduction"),
    as_json: Json = False,
) -> None:
    """Carry out the whole programme of experiments, or what is left of it, and answer its questions in ANALYSIS.md."""
    from evaluate import reproduce as programme

    check_directory(out)
    given = programme.parse_scale(
        stitch_tokens=stitch_tokens,
        tasks=tuple(dict.fromkeys(task or ["countries"])),
        examples=examples,
        epochs=epochs,
        ranks=ranks,
        latents=latents,
    )
    corpus = programme.Corpus(tuple(model or ()), dataset, max_tokens, layers or programme.LAYERS)
    if store is not None and corpus != programme.Corpus():
        raise SpecError("--model, --dataset, --max-tokens and --layers make a store; leave them out with --store")
    if dry_run:
        listed = programme.commands(out, given, store=store, corpus=corpus)
        emit(listed, escape(programme.describe_commands(listed)), as_json=as_json)
        return
    result = programme.reproduce(out, given, store=store, corpus=corpus)
    emit(result, escape(programme.describe(result)), as_json=as_json)
    if result["failed"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `evaluate` command."""
    run_app(app, "evaluate")
