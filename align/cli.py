"""Fit maps between two models' hidden states from a feature store, and compare runs and layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from align.execution.options import Execution
from align.maps.registry import having, map_type, map_types
from align.options import declared, flag, takes, values
from align.resources import choose_device
from align.settings import ROWS, LoopSettings, Settings, load_settings
from align.similarity.measures.names import MEASURES
from featstore.errors import SpecError
from featstore.runtime.console import add_version, emit, err, run_app
from featstore.runtime.options import COMPUTATION, DEVICES, MODELS, OUTPUT, POLICY_WORDS, STORE, Json, option
from featstore.runtime.processes import Ranks, leave_group
from featstore.text.roles import ROLES, roles_text

#: Panels of the help that these commands alone have.
SAMPLE, SIMILARITY, GRID = "More measures, over a sample of rows", "Similarity", "The grid"
#: What all runs of a sweep share of a run's options, and where they run.
_SWEPT = ("source", "target", "both", "roles", "epochs", "seed", *declared(Execution))

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
add_version(app, "align")

#: What a table of runs compares with.
_REFERENCE = "What the runs are compared with: one of them, or a baseline such as token or closed_form."


@app.command()
@takes(Settings, LoopSettings)
def train(
    context: typer.Context,
    store: Annotated[
        Path | None,
        option("Store whose rows are fitted. It is needed without --config.", panel=STORE, default="that of --config"),
    ] = None,
    *,
    config: Annotated[
        Path | None, option("File run.yaml of a run, which is made again.", panel=STORE, default="none")
    ] = None,
    resume: Annotated[bool, option("Resume the interrupted run in --out.", "--resume", panel=OUTPUT)] = False,
    out: Annotated[
        Path | None, option("Directory for the run.", panel=OUTPUT, default="runs/<type>-<source>-<target>\\[-n]")
    ] = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Fit a map between two models' hidden states from a store alone, and score it beside its controls."""
    from align.runs.rundir import check_free
    from align.runs.train import describe
    from align.runs.train import train as run_training

    if resume:
        if out is None:
            raise SpecError("--resume needs --out: the directory of the interrupted run")
        if config is not None:
            raise SpecError("--resume goes by the run.yaml in --out; leave out --config")
        check_free(out, resume=True)
        config = out / "run.yaml"
    device = given.pop("device")
    if config is not None:
        settings = load_settings(config)
        typed = _typed(context)
        if others := typed - {"config", "store", "device", "out", "as_json", "resume"}:
            raise SpecError(
                f"--{'resume' if resume else 'config'}: {config} decides the whole run; leave out "
                f"{flag(min(others))} or change it in a copy of that file"
            )
        device = device if "device" in typed else settings.loop.device
        settings = replace(settings, store=str(store)) if store is not None else settings
    elif store is None:
        raise SpecError("--store is missing; make a store with `featstore extract`")
    else:
        defaults = map_type(given["type"]).defaults
        loop = LoopSettings(**values(LoopSettings, given, defaults))
        settings = Settings(str(store), loop=loop, **values(Settings, given, defaults))
    place = choose_device(device, by_gradient=settings.by_gradient)
    result = run_training(replace(settings, loop=replace(settings.loop, device=place)), out, resume=resume)
    leave_group()
    if not Ranks.from_environment().first:
        return
    emit(result, describe(result), as_json=as_json)
    if not as_json and not map_type(settings.type).windows:
        err.print(f"next: evaluate stitch --store {settings.store} --adapter {result['run']}")


def _typed(context: typer.Context) -> set[str]:
    """Names of the options that were typed."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


@app.command()
@takes(Execution)
def cka(
    store: Annotated[Path, option("Store whose layers are compared.", panel=STORE)],
    estimator: Annotated[
        str,
        option(
            "Estimator of CKA.",
            panel=SIMILARITY,
            choices=(
                "debiased (over pairs of rows of different documents)",
                "debiased-rows (over pairs of different rows)",
                "biased",
                "minibatch",
            ),
        ),
    ] = "debiased",
    correct_features: Annotated[
        bool,
        option(
            "Treat the dimensions as a sample of a larger population of features. The estimator is then debiased.",
            "--correct-features",
            panel=SIMILARITY,
        ),
    ] = False,
    kernel: Annotated[
        str,
        option("Kernel of CKA.", panel=SIMILARITY, choices=("linear (over all rows)", "rbf (over a sample of rows)")),
    ] = "linear",
    models: Annotated[
        str | None, option("Two models, as A,B.", panel=MODELS, default="the first two models of the store")
    ] = None,
    layers: Annotated[
        str | None, option("Layers of both models, such as 8,16, or depths in percent.", panel=MODELS, default="all")
    ] = None,
    policy: Annotated[
        str,
        option("Rule by which token states are paired: they end at the same byte.", panel=ROWS, choices=POLICY_WORDS),
    ] = "end",
    keep_sinks: Annotated[
        bool, option("Keep attention sinks in the main figures.", "--keep-sinks", panel=ROWS)
    ] = False,
    roles: Annotated[
        str | None,
        option("Roles whose pairs are used, such as user,assistant.", panel=ROWS, choices=ROLES, default="all"),
    ] = None,
    measures: Annotated[
        str,
        option("Other measures, separated by commas.", panel=SAMPLE, choices=(*MEASURES, "all", "none")),
    ] = "none",
    max_rows: Annotated[int, option("Maximum number of rows of the sample.", panel=SAMPLE, least=4)] = 16_384,
    draws: Annotated[
        int, option("Number of resamples of documents behind each interval.", panel=SAMPLE, least=1)
    ] = 1000,
    permutations: Annotated[
        int,
        option(
            "Number of exchanges of partners behind each floor. With 0 there are no floors and no intervals of CKA.",
            panel=SIMILARITY,
            least=0,
        ),
    ] = 39,
    memory: Annotated[
        str,
        option("Memory for sums or for the sample: bytes, or an amount such as 500M or 4GiB.", panel=COMPUTATION),
    ] = "4GiB",
    device: Annotated[
        str, option("Device on which RBF kernels are made.", panel=COMPUTATION, choices=DEVICES)
    ] = "auto",
    seed: Annotated[int, option("Seed of sample, floors and resamples.", panel=COMPUTATION, least=0)] = 0,
    out: Annotated[Path, option("Directory for cka.json, cka.html and the heatmaps.", panel=OUTPUT)] = Path("runs/cka"),
    as_json: Json = False,
    **given: Any,
) -> None:
    """Compare all layers of two models with each other, debiased and over the whole store."""
    from align import api
    from align.similarity.words import describe as describe_cka

    found = api.cka(
        store,
        estimator=estimator,
        correct_features=correct_features,
        kernel=kernel,
        models=models,
        layers=layers,
        policy=policy,
        keep_sinks=keep_sinks,
        roles=roles,
        measures=measures,
        max_rows=max_rows,
        draws=draws,
        permutations=permutations,
        memory=memory,
        device=device,
        seed=seed,
        out=out,
        **given,
    )
    result = found.content()
    emit(
        {**result, "files": found.files, "out": str(out)},
        f"{describe_cka(result)}\nwritten to {out}: {', '.join(found.files)}",
        as_json=as_json,
    )


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories to compare.")],
    reference: Annotated[str | None, option(_REFERENCE, panel=GRID, default="the run named first")] = None,
    controls: Annotated[
        bool, option("Show R2 of the controls beside that of the maps.", "--controls", panel=OUTPUT)
    ] = False,
    changes: Annotated[
        bool,
        option("Show what changed from the first of two runs to the second instead.", "--changes", panel=OUTPUT),
    ] = False,
    page: Annotated[Path | None, option("HTML file to write as well.", panel=OUTPUT, default="none")] = None,
    as_json: Json = False,
) -> None:
    """Print one table of several runs beside closed-form optima and baselines, and test their differences."""
    from align import api
    from align.sweeps.table import describe

    if changes and len(runs) != 2:
        raise SpecError(f"--changes is about two runs, not {len(runs)}; name the earlier and then the later one")
    board = api.compare(runs, reference=reference).content()
    changed = api.changes(*runs) if len(runs) == 2 and (changes or page) else None
    if page is not None:
        # Only here: jinja2 takes a tenth of a second to import.
        from align.sweeps.page import write

        write(page, board, None if changed is None else changed.content())
    if changes and changed is not None:
        emit(changed.content(), str(changed), as_json=as_json)
    else:
        emit(board, describe(board, controls=controls), as_json=as_json)


@app.command()
@takes(Settings, LoopSettings, Execution, only=_SWEPT)
def sweep(
    store: Annotated[Path, option("Store whose rows are fitted.", panel=STORE)],
    out: Annotated[Path, option("Directory for the runs and sweep.json.", panel=OUTPUT)] = Path("runs/sweep"),
    types: Annotated[
        str,
        option("Types of map, separated by commas.", panel=GRID, choices=[type_.name for type_ in map_types()]),
    ] = "procrustes,affine,lora",
    layers: Annotated[
        str | None,
        option(
            "Source layers of each run: 8;16,24 makes two runs of every other choice.",
            panel=GRID,
            default="all, or as in --config",
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        option(f"Ranks of {having('rank')} maps, such as 8,32.", panel=GRID, default="32, or as in --config"),
    ] = None,
    formats: Annotated[
        str | None,
        option(
            "Number formats to which the store is converted, such as int8,fp8.",
            panel=GRID,
            choices=("bfloat16", "float16", "float32", "int8", "fp8"),
            default="that of the store",
        ),
    ] = None,
    latents: Annotated[
        str | None,
        option("Numbers of latents of compress maps, such as 8,32.", panel=GRID, default="32, or as in --config"),
    ] = None,
    latent_dims: Annotated[
        str | None,
        option("Widths of a latent of compress maps, such as 16,64.", panel=GRID, default="64, or as in --config"),
    ] = None,
    *,
    config: Annotated[
        Path | None, option("File run.yaml with whatever else the runs share.", panel=STORE, default="none")
    ] = None,
    reference: Annotated[str | None, option(_REFERENCE, panel=GRID, default="the first run of the grid")] = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Fit a grid of maps over one store in parallel. Finished runs are not repeated."""
    from align.sweeps import sweep as sweeping

    grid = sweeping.parse_grid(
        types=types, ranks=ranks, formats=formats, layers=layers, latents=latents, latent_dims=latent_dims
    )
    if config is None:
        shared = Settings("", loop=LoopSettings(epochs=given["epochs"], seed=given["seed"]))
    else:
        shared = load_settings(config)
    settings = replace(
        shared,
        store=str(store),
        source=given["source"] or shared.source,
        target=given["target"] or shared.target,
        both=given["both"] or shared.both,
        roles=roles_text(given["roles"]) or shared.roles,
    )
    execution = Execution(**values(Execution, given, {}))
    result = sweeping.sweep(settings, grid, out, execution=execution, reference=reference)
    emit(result, sweeping.describe(result), as_json=as_json)
    if result["failed"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `align` command."""
    run_app(app, "align", extra="align")
