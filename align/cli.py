"""`align`: train, sweep, cka, compare. A thin skin over the library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from align.resources import choose_device
from align.settings import TYPES
from align.similarity.measures.names import MEASURES
from featstore.errors import SpecError
from featstore.runtime.console import emit, err, run_app
from featstore.runtime.processes import Ranks
from featstore.runtime.quantities import parse_bytes

#: Panels of the help.
_LAYERS, _MAP, _TRAINING, _SAMPLE = "Layers", "The map", "Training by gradient", "More measures, over a sample of rows"

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode="rich")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


@app.command()
def train(
    context: typer.Context,
    store: Annotated[Path | None, typer.Option(help="Path of the store.")] = None,
    type_: Annotated[str, typer.Option("--type", help=f"{', '.join(TYPES)}.")] = "procrustes",
    source: Annotated[str | None, typer.Option(help="Source model; default the store's first.")] = None,
    target: Annotated[str | None, typer.Option(help="Target model; may equal the source.")] = None,
    both: Annotated[bool, typer.Option("--both", help="Also the other direction.")] = False,
    layers: Annotated[
        str | None, typer.Option(help="Source layers: 8,16,24 or depths in percent.", rich_help_panel=_LAYERS)
    ] = None,
    layer_map: Annotated[
        str | None,
        typer.Option(
            help="SOURCE:TARGET layers, such as 16:20,24:24; or auto: the best partner by validation R2.",
            rich_help_panel=_LAYERS,
        ),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="One map from all source layers together.", rich_help_panel=_LAYERS)
    ] = False,
    shared: Annotated[
        bool,
        typer.Option(
            "--shared", help="One map for all layers, and a small projection for each.", rich_help_panel=_LAYERS
        ),
    ] = False,
    solver: Annotated[str | None, typer.Option(help="closed or adamw; default by type.", rich_help_panel=_MAP)] = None,
    scale: Annotated[
        bool, typer.Option("--scale", help="Procrustes: with the optimal scale.", rich_help_panel=_MAP)
    ] = False,
    components: Annotated[
        str | None,
        typer.Option(help="Procrustes within so many principal components: a number, or auto.", rich_help_panel=_MAP),
    ] = None,
    rank: Annotated[int, typer.Option(help="Of lora, reduced-rank and --shared.", rich_help_panel=_MAP)] = 32,
    alpha: Annotated[float | None, typer.Option(help="LoRA's scale; default the rank.", rich_help_panel=_MAP)] = None,
    skip: Annotated[
        str | None,
        typer.Option(
            help="What lora, mlp and reduced-rank are added to: procrustes, ridge, identity, none.",
            rich_help_panel=_MAP,
        ),
    ] = None,
    hidden: Annotated[int, typer.Option(help="Hidden width of an mlp.", rich_help_panel=_MAP)] = 1024,
    latents: Annotated[int, typer.Option(help="Latents of compress.", rich_help_panel=_MAP)] = 32,
    latent_dim: Annotated[int, typer.Option(help="Width of a latent.", rich_help_panel=_MAP)] = 64,
    loss: Annotated[
        str, typer.Option(help="Weights of the components.", rich_help_panel=_TRAINING)
    ] = "mse=1,cosine=0,infonce=0",
    temperature: Annotated[float, typer.Option(help="Of InfoNCE.", rich_help_panel=_TRAINING)] = 0.07,
    epochs: Annotated[int, typer.Option(help="At most.", rich_help_panel=_TRAINING)] = 10,
    patience: Annotated[
        int, typer.Option(help="Epochs without improvement before stopping.", rich_help_panel=_TRAINING)
    ] = 2,
    min_delta: Annotated[
        float, typer.Option(help="Least improvement of the validation loss.", rich_help_panel=_TRAINING)
    ] = 1e-3,
    batch_size: Annotated[
        int | None, typer.Option(help="Pairs (compress: windows) a batch; default by type.", rich_help_panel=_TRAINING)
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Batches a step.", rich_help_panel=_TRAINING)] = 1,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.", rich_help_panel=_TRAINING)] = 1.0,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; default by type.", rich_help_panel=_TRAINING)
    ] = None,
    precision: Annotated[
        str, typer.Option(help="auto, float32, bfloat16: of the arithmetic.", rich_help_panel=_TRAINING)
    ] = "auto",
    precondition: Annotated[
        bool, typer.Option(help="Whiten inputs inside the parameterisation.", rich_help_panel=_TRAINING)
    ] = True,
    cka_every: Annotated[int, typer.Option(help="Steps between CKA figures.", rich_help_panel=_TRAINING)] = 100,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between checkpoints within an epoch.", rich_help_panel=_TRAINING)
    ] = 1000,
    tracker: Annotated[str, typer.Option(help="tensorboard, wandb, none.", rich_help_panel=_TRAINING)] = "tensorboard",
    eval_models: Annotated[
        bool,
        typer.Option(
            "--eval-models",
            help="Load both models; stitched loss and five texts every epoch.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    keep_sinks: Annotated[bool, typer.Option("--keep-sinks", help="Lift the attention-sink mask.")] = False,
    policy: Annotated[str, typer.Option(help="Pair policy: end or word.")] = "end",
    max_rows: Annotated[int | None, typer.Option(help="Train pairs at most.")] = None,
    memory: Annotated[
        str, typer.Option(help="Memory for buffers of paired rows: bytes, or such as 500M, 4GiB.")
    ] = "1GiB",
    seed: Annotated[int, typer.Option(help="Of initialisation, order and random controls.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    config: Annotated[Path | None, typer.Option(help="A run.yaml: make that run again.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<type>-<source>-<target>[-n].")] = None,
    as_json: Json = False,
) -> None:
    """Fit a map between two models' hidden states from the store alone, and score it beside its controls."""
    from align.runs.rundir import check_free
    from align.runs.train import describe
    from align.runs.train import train as run_training
    from align.settings import LoopSettings, Settings, load_settings

    if resume:
        if out is None:
            raise SpecError("--resume needs --out: the directory of the interrupted run")
        if config is not None:
            raise SpecError("--resume goes by the run.yaml in --out; leave out --config")
        check_free(out, resume=True)
        config = out / "run.yaml"
    if config is not None:
        settings = load_settings(config)
        given = _given(context)
        if others := given - {"config", "store", "device", "out", "as_json", "resume"}:
            raise SpecError(
                f"--{'resume' if resume else 'config'}: {config} decides the whole run; leave out "
                f"--{min(others).strip('_').replace('_', '-')} or change it in a copy of that file"
            )
        place = choose_device(device if "device" in given else settings.loop.device, by_gradient=settings.by_gradient)
        settings = replace(settings, loop=replace(settings.loop, device=place))
        settings = replace(settings, store=str(store)) if store is not None else settings
    elif store is None:
        raise SpecError("--store is missing; make a store with `featstore extract`")
    else:
        settings = Settings(
            store=str(store),
            type=type_,
            source=source,
            target=target,
            both=both,
            layers=layers,
            layer_map=layer_map,
            joint=joint,
            shared=shared,
            solver=solver,
            scale=scale,
            components=components,
            keep_sinks=keep_sinks,
            policy=policy,
            max_rows=max_rows,
            memory=parse_bytes(memory),
            eval_models=eval_models,
            loop=LoopSettings(
                rank=rank,
                alpha=alpha,
                skip=skip or ("none" if type_ == "reduced-rank" else "procrustes"),
                hidden=hidden,
                latents=latents,
                latent_dim=latent_dim,
                loss=loss,
                temperature=temperature,
                epochs=epochs,
                patience=patience,
                min_delta=min_delta,
                batch_size=batch_size,
                accumulate=accumulate,
                clip=clip,
                lr=lr,
                precision=precision,
                cka_every=cka_every,
                checkpoint_every=checkpoint_every,
                tracker=tracker,
                precondition=precondition,
                seed=seed,
            ),
        )
        place = choose_device(device, by_gradient=settings.by_gradient)
        settings = replace(settings, loop=replace(settings.loop, device=place))
    result = run_training(settings, out, resume=resume)
    if not Ranks.from_environment().first:
        return
    emit(result, escape(describe(result)), as_json=as_json)
    if not as_json and settings.type != "compress":
        err.print(f"next: evaluate stitch --store {settings.store} --adapter {result['run']}")


def _given(context: typer.Context) -> set[str]:
    """Names of the options that were typed."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


@app.command()
def cka(
    store: Annotated[Path, typer.Option(help="Path of the store.")],
    estimator: Annotated[str, typer.Option(help="debiased, biased, minibatch.")] = "debiased",
    kernel: Annotated[str, typer.Option(help="linear, over all rows; or rbf, over a sample.")] = "linear",
    models: Annotated[str | None, typer.Option(help="A,B; default the store's first two.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers of both models: 8,16 or depths in percent.")] = None,
    policy: Annotated[str, typer.Option(help="Pair policy: end or word.")] = "end",
    keep_sinks: Annotated[bool, typer.Option("--keep-sinks", help="Attention sinks in the main figures.")] = False,
    measures: Annotated[
        str, typer.Option(help=f"Over a sample of rows: {', '.join(MEASURES)}; all, none.", rich_help_panel=_SAMPLE)
    ] = "none",
    max_rows: Annotated[int, typer.Option(help="Rows of the sample at most.", rich_help_panel=_SAMPLE)] = 16_384,
    draws: Annotated[
        int, typer.Option(min=1, help="Resamples of documents behind each interval.", rich_help_panel=_SAMPLE)
    ] = 1000,
    memory: Annotated[str, typer.Option(help="For sums, or for the sample: bytes, or such as 500M, 4GiB.")] = "4GiB",
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler; default a local one.")] = None,
    workers: Annotated[int | None, typer.Option(help="Local processes; default threads of this one.")] = None,
    device: Annotated[str, typer.Option(help="Of RBF kernels: auto, cpu, cuda, cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of sample, floors and draws.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory for cka.json, cka.html and the heatmaps.")] = Path("runs/cka"),
    as_json: Json = False,
) -> None:
    """Compare all layers of two models with each other, debiased and over the whole store."""
    from align import api
    from align.similarity.words import describe as describe_cka

    found = api.cka(
        store,
        estimator=estimator,
        kernel=kernel,
        models=models,
        layers=layers,
        policy=policy,
        keep_sinks=keep_sinks,
        measures=measures,
        max_rows=max_rows,
        draws=draws,
        memory=memory,
        scheduler=scheduler,
        workers=workers,
        device=device,
        seed=seed,
        out=out,
    )
    result = found.content()
    emit(
        {**result, "files": found.files, "out": str(out)},
        escape(f"{describe_cka(result)}\nwritten to {out}: {', '.join(found.files)}"),
        as_json=as_json,
    )


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    as_json: Json = False,
) -> None:
    """Print one table of several runs, with closed-form optima and controls."""
    from align import api

    board = api.compare(runs)
    emit(board.content(), escape(str(board)), as_json=as_json)


@app.command()
def sweep(
    store: Annotated[Path, typer.Option(help="Path of the store.")],
    out: Annotated[Path, typer.Option(help="Directory of the runs and of sweep.json.")] = Path("runs/sweep"),
    types: Annotated[str, typer.Option(help="Such as procrustes,affine,lora.")] = "procrustes,affine,lora",
    layers: Annotated[str | None, typer.Option(help="Runs by source layers: 8;16,24 makes two.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Of lora and reduced-rank: 8,32.")] = None,
    formats: Annotated[str | None, typer.Option(help="Element formats to convert the store to: int8,fp8.")] = None,
    latents: Annotated[str | None, typer.Option(help="Of compress: 8,32.")] = None,
    latent_dims: Annotated[str | None, typer.Option(help="Of compress: 16,64.")] = None,
    source: Annotated[str | None, typer.Option(help="Source model; default the store's first.")] = None,
    target: Annotated[str | None, typer.Option(help="Target model.")] = None,
    both: Annotated[bool, typer.Option("--both", help="Also the other direction.")] = False,
    epochs: Annotated[int, typer.Option(help="At most, of trained maps.")] = 10,
    seed: Annotated[int, typer.Option(help="Of every run.")] = 0,
    config: Annotated[Path | None, typer.Option(help="A run.yaml: whatever else the runs share.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler; default a local one.")] = None,
    workers: Annotated[int | None, typer.Option(help="Local processes; default one a core.")] = None,
    as_json: Json = False,
) -> None:
    """Fit a grid of maps over one store, in parallel; what is there already is not done again."""
    from align.settings import LoopSettings, Settings, load_settings
    from align.sweeps import sweep as sweeping

    grid = sweeping.parse_grid(
        types=types, ranks=ranks, formats=formats, layers=layers, latents=latents, latent_dims=latent_dims
    )
    shared = load_settings(config) if config is not None else Settings("", loop=LoopSettings(epochs=epochs, seed=seed))
    settings = replace(
        shared,
        store=str(store),
        source=source or shared.source,
        target=target or shared.target,
        both=both or shared.both,
    )
    result = sweeping.sweep(settings, grid, out, scheduler=scheduler, workers=workers)
    emit(result, escape(sweeping.describe(result)), as_json=as_json)
    if result["failed"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `align` command."""
    run_app(app, "align")
