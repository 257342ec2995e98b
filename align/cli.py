"""`align`: train, cka, compare. A thin skin over the library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from featstore.console import check_directory, emit, err, jsonable, run_app
from featstore.errors import SpecError
from featstore.spec import parse_bytes

#: How long a Dask scheduler may take to answer.
SCHEDULER_SECONDS = 10.0

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode="rich")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


@app.command()
def train(
    context: typer.Context,
    store: Annotated[Path | None, typer.Option(help="Path of the store.")] = None,
    type_: Annotated[
        str, typer.Option("--type", help="procrustes, linear, affine, reduced-rank or lora.")
    ] = "procrustes",
    source: Annotated[str | None, typer.Option(help="Source model; default the store's first.")] = None,
    target: Annotated[str | None, typer.Option(help="Target model; may equal the source.")] = None,
    both: Annotated[bool, typer.Option("--both", help="Also the other direction.")] = False,
    layers: Annotated[str | None, typer.Option(help="Source layers: 8,16,24 or depths in percent.")] = None,
    layer_map: Annotated[str | None, typer.Option(help="SOURCE:TARGET layers, such as 16:20,24:24.")] = None,
    solver: Annotated[str | None, typer.Option(help="closed or adamw; default by type.")] = None,
    scale: Annotated[bool, typer.Option("--scale", help="Procrustes: with the optimal scale.")] = False,
    rank: Annotated[int, typer.Option(help="Of lora and reduced-rank.")] = 32,
    alpha: Annotated[float | None, typer.Option(help="LoRA's scale; default the rank.")] = None,
    skip: Annotated[
        str | None, typer.Option(help="What lora and reduced-rank are added to: procrustes, ridge, identity, none.")
    ] = None,
    loss: Annotated[str, typer.Option(help="Weights of the components.")] = "mse=1,cosine=0,infonce=0",
    temperature: Annotated[float, typer.Option(help="Of InfoNCE.")] = 0.07,
    epochs: Annotated[int, typer.Option(help="At most.")] = 10,
    patience: Annotated[int, typer.Option(help="Epochs without improvement before stopping.")] = 2,
    min_delta: Annotated[float, typer.Option(help="Least improvement of the validation loss.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-2,
    precondition: Annotated[bool, typer.Option(help="Whiten inputs inside the parameterisation.")] = True,
    keep_sinks: Annotated[bool, typer.Option("--keep-sinks", help="Lift the attention-sink mask.")] = False,
    policy: Annotated[str, typer.Option(help="Pair policy: end or word.")] = "end",
    max_rows: Annotated[int | None, typer.Option(help="Train pairs at most.")] = None,
    memory: Annotated[
        str, typer.Option(help="Memory for buffers of paired rows: bytes, or such as 500M, 4GiB.")
    ] = "1GiB",
    seed: Annotated[int, typer.Option(help="Of initialisation, order and random controls.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N (gradient training).")] = "auto",
    config: Annotated[Path | None, typer.Option(help="A run.yaml: make that run again.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<type>-<source>-<target>[-n].")] = None,
    as_json: Json = False,
) -> None:
    """Fit a map between two models' hidden states from the store alone, and score it beside its controls."""
    from align.settings import LoopSettings, Settings, load_settings
    from align.train import describe
    from align.train import train as run_training

    if config is not None:
        settings = load_settings(config)
        given = _given(context)
        if others := given - {"config", "store", "device", "out", "as_json"}:
            raise SpecError(
                f"--config {config} decides the whole run; leave out --{min(others).strip('_').replace('_', '-')} or "
                "change it in a copy of that file"
            )
        place = _device(device if "device" in given else settings.loop.device, settings.type, settings.solver)
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
            solver=solver,
            scale=scale,
            keep_sinks=keep_sinks,
            policy=policy,
            max_rows=max_rows,
            memory=parse_bytes(memory),
            loop=LoopSettings(
                rank=rank,
                alpha=alpha,
                skip=skip or ("procrustes" if type_ == "lora" else "none"),
                loss=loss,
                temperature=temperature,
                epochs=epochs,
                patience=patience,
                min_delta=min_delta,
                batch_size=batch_size,
                lr=lr,
                precondition=precondition,
                seed=seed,
                device=_device(device, type_, solver),
            ),
        )
    result = run_training(settings, out)
    emit(result, escape(describe(result)), as_json=as_json)
    if not as_json:
        err.print(f"next: evaluate stitch --store {settings.store} --adapter {result['run']}")


def _given(context: typer.Context) -> set[str]:
    """Names of the options that were typed."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _device(name: str, type_: str, solver: str | None) -> str:
    if type_ != "lora" and solver != "adamw":
        return "cpu"
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SpecError(f"device {name!r}: write auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SpecError(f"device {name!r}: this machine has no usable CUDA device; use --device cpu")
    return name


@app.command()
def cka(
    store: Annotated[Path, typer.Option(help="Path of the store.")],
    estimator: Annotated[str, typer.Option(help="debiased or biased.")] = "debiased",
    models: Annotated[str | None, typer.Option(help="A,B; default the store's first two.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers of both models: 8,16 or depths in percent.")] = None,
    policy: Annotated[str, typer.Option(help="Pair policy: end or word.")] = "end",
    keep_sinks: Annotated[bool, typer.Option("--keep-sinks", help="Attention sinks in the main figures.")] = False,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler; default a local one.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffled floor.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory for cka.json and the heatmaps.")] = Path("runs/cka"),
    as_json: Json = False,
) -> None:
    """Compare all layers of two models with each other, debiased and over the whole store."""
    from align.cka import best_partners, compare_layers
    from align.layers import choose_models
    from align.plots import plot_heatmaps
    from featstore.provenance import write_json
    from featstore.spec import parse_layers
    from featstore.store import open_store

    check_directory(out)
    opened = open_store(store)
    names = [name.strip() for name in models.split(",")] if models else []
    if models and len(names) != 2:
        raise SpecError(f"--models {models!r}: write two names, such as llama,mistral")
    chosen = choose_models(opened, *names) if names else choose_models(opened, None, None)
    held = {name: opened.model(name).layers for name in dict.fromkeys(chosen)}
    if layers is not None:
        wanted = parse_layers([layers], {name: opened.model(name).depth for name in held})
        held = {name: tuple(opened.layer(name, k) for k in ks) for name, ks in wanted.items()}
    with _dask(scheduler):
        result = compare_layers(
            store,
            models=chosen,
            layers=held,
            estimator=estimator,
            policy=policy,
            keep_sinks=keep_sinks,
            seed=seed,
        )
    result = jsonable(result)
    write_json(out / "cka.json", result)
    files = plot_heatmaps(result, out)
    emit(
        {**result, "files": ["cka.json", *files], "out": str(out)},
        escape(_describe(result, best_partners(result), out)),
        as_json=as_json,
    )


def _describe(result: dict[str, Any], partners: dict[str, dict[str, Any]], out: Path) -> str:
    first, second = result["models"]
    lines = [f"{result['estimator']} CKA over {result['n']} pairs, {result['masked_rows']} attention sinks apart"]
    lines.append(f"{first:>10} | " + " ".join(f"{second}:{k}".rjust(12) for k in result["layers"][second]))
    for layer, row in zip(result["layers"][first], result["cross"], strict=True):
        values = " ".join(f"{v:12.4f}" if v is not None else f"{'-':>12}" for v in row)
        lines.append(f"{layer:10} | {values}")
    for layer, best in partners.items():
        lines.append(f"{first}:{layer} is most like {second}:{best['layer']} ({best['cka']:.4f})")
    floor = [v for row in result["null"]["cross"] for v in row if v is not None]
    if floor:
        lines.append(f"floor (shuffled pairs): at most {max(map(abs, floor)):.4f}")
    lines += [f"undefined: {where}: {why}" for where, why in result["reasons"].items()]
    lines.append(f"written: {out}/cka.json, cka.png, cka.svg")
    return "\n".join(lines)


@contextmanager
def _dask(address: str | None) -> Iterator[None]:
    """A client of the given scheduler, or of one within this process."""
    import os

    from distributed import Client

    try:
        if address is not None:
            client = Client(address, timeout=SCHEDULER_SECONDS)
        else:
            # Any free port, and for this machine only: None would take 8787 and offer it to the network.
            client = Client(
                processes=False, n_workers=1, threads_per_worker=os.cpu_count() or 1, dashboard_address="127.0.0.1:0"
            )
    except (OSError, TimeoutError, ValueError) as error:
        raise SpecError(f"--scheduler {address}: no Dask scheduler answers there ({error})") from error
    with client:
        if address is not None:
            err.print(f"Dask dashboard: {client.dashboard_link}")
        yield


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    as_json: Json = False,
) -> None:
    """Print one table of several runs, with closed-form optima and controls."""
    from align.compare import compare_runs, describe

    result = compare_runs(runs)
    emit(result, escape(describe(result)), as_json=as_json)


def main() -> None:
    """Entry point of the `align` command."""
    run_app(app, "align")
