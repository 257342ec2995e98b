"""Fit maps between two models' hidden states from a feature store, and compare runs and layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from align.execution.options import Execution
from align.maps.registry import having, map_type
from align.options import declared, flag, takes, values
from align.resources import choose_device
from align.settings import LoopSettings, Settings, load_settings
from align.similarity.measures.names import MEASURES
from featstore.errors import SpecError
from featstore.runtime.console import add_version, emit, err, jsonable, run_app
from featstore.runtime.processes import Ranks, leave_group
from featstore.text.roles import ROLES, roles_text

#: Panel of the help.
_SAMPLE = "More measures, over a sample of rows"
#: What all runs of a sweep share of a run's options, and where they run.
_SWEPT = ("source", "target", "both", "roles", "epochs", "seed", *declared(Execution))

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
add_version(app, "align")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


@app.command()
@takes(Settings, LoopSettings)
def train(
    context: typer.Context,
    store: Annotated[Path | None, typer.Option(help="Path of the store.")] = None,
    *,
    config: Annotated[Path | None, typer.Option(help="A run.yaml whose run is made again.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the interrupted run in --out.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<type>-<source>-<target>[-n].")] = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Fit a map between two models' hidden states from the store alone, and score it beside its controls."""
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
    store: Annotated[Path, typer.Option(help="Path of the store.")],
    estimator: Annotated[
        str,
        typer.Option(
            help="debiased, over pairs of rows of different documents; debiased-rows, of different rows; biased; "
            "minibatch."
        ),
    ] = "debiased",
    correct_features: Annotated[
        bool,
        typer.Option(
            "--correct-features", help="Take dimensions for a sample of a larger population of features; of debiased."
        ),
    ] = False,
    kernel: Annotated[str, typer.Option(help="linear, over all rows; or rbf, over a sample.")] = "linear",
    models: Annotated[str | None, typer.Option(help="Two models, A,B; default the store's first two.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers of both models: 8,16 or depths in percent; default all.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Pair policy: end, word or byte.")] = "end",
    keep_sinks: Annotated[bool, typer.Option("--keep-sinks", help="Keep attention sinks in the main figures.")] = False,
    roles: Annotated[
        str | None,
        typer.Option(help=f"Only pairs of these roles, such as assistant ({', '.join(ROLES)}); default all."),
    ] = None,
    measures: Annotated[
        str, typer.Option(help=f"Over a sample of rows: {', '.join(MEASURES)}; all, none.", rich_help_panel=_SAMPLE)
    ] = "none",
    max_rows: Annotated[
        int, typer.Option(help="Maximum number of rows of the sample.", rich_help_panel=_SAMPLE)
    ] = 16_384,
    draws: Annotated[
        int, typer.Option(min=1, help="Resamples of documents behind each interval.", rich_help_panel=_SAMPLE)
    ] = 1000,
    permutations: Annotated[
        int,
        typer.Option(min=0, help="Exchanges of partners behind each floor; 0 for no floors and no intervals of CKA."),
    ] = 39,
    memory: Annotated[
        str, typer.Option(help="Memory for sums, or for the sample: bytes, or such as 500M, 4GiB.")
    ] = "4GiB",
    device: Annotated[str, typer.Option(help="Device of RBF kernels: auto, cpu, cuda, cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of sample, floors and draws.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory for cka.json, cka.html and the heatmaps.")] = Path("runs/cka"),
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
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    reference: Annotated[
        str | None,
        typer.Option(
            help="What the runs are compared with: one of them, or a baseline such as token or closed_form; default "
            "the run named first."
        ),
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Show R2 of the controls beside that of the maps.")
    ] = False,
    changes: Annotated[
        bool,
        typer.Option("--changes", help="Of two runs, show what changed from the first to the second instead."),
    ] = False,
    page: Annotated[Path | None, typer.Option(help="HTML file to write as well; default none.")] = None,
    as_json: Json = False,
) -> None:
    """Print one table of several runs, with closed-form optima, and what of it is more than chance."""
    from align import api
    from align.sweeps.changes import changes as changed_between
    from align.sweeps.changes import describe_changes
    from align.sweeps.table import describe

    if changes and len(runs) != 2:
        raise SpecError(f"--changes is about two runs, not {len(runs)}; name the earlier and then the later one")
    board = api.compare(runs, reference=reference).content()
    changed = jsonable(changed_between(*runs)) if len(runs) == 2 and (changes or page) else None
    if page is not None:
        # Only here: jinja2 takes a tenth of a second to import.
        from align.sweeps.page import write

        write(page, board, changed)
    if changes and changed is not None:
        emit(changed, describe_changes(changed), as_json=as_json)
    else:
        emit(board, describe(board, controls=controls), as_json=as_json)


@app.command()
@takes(Settings, LoopSettings, Execution, only=_SWEPT)
def sweep(
    store: Annotated[Path, typer.Option(help="Path of the store.")],
    out: Annotated[Path, typer.Option(help="Directory of the runs and of sweep.json.")] = Path("runs/sweep"),
    types: Annotated[
        str, typer.Option(help="Types of map, such as procrustes,affine,lora.")
    ] = "procrustes,affine,lora",
    layers: Annotated[
        str | None, typer.Option(help="Source layers of each run: 8;16,24 makes two runs of every other choice.")
    ] = None,
    ranks: Annotated[str | None, typer.Option(help=f"Ranks of {having('rank')} maps, such as 8,32.")] = None,
    formats: Annotated[
        str | None, typer.Option(help="Element formats to which the store is converted, such as int8,fp8.")
    ] = None,
    latents: Annotated[str | None, typer.Option(help="Numbers of latents of compress maps, such as 8,32.")] = None,
    latent_dims: Annotated[str | None, typer.Option(help="Widths of a latent of compress maps, such as 16,64.")] = None,
    *,
    config: Annotated[Path | None, typer.Option(help="A run.yaml with whatever else the runs share.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="What the runs are compared with: one of them by its name, or a baseline such as token; default the "
            "first of the grid."
        ),
    ] = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Fit a grid of maps over one store in parallel; finished runs are not repeated."""
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
    run_app(app, "align")
