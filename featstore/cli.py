"""`featstore`: extract, info, inspect, verify, pair, doctor, demo. A thin skin over the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from featstore.console import emit, err, human, human_bytes, human_seconds, run_app
from featstore.spec import DEFAULT_LAYERS, DEFAULT_MODELS, parse_budget

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode="rich")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
StorePath = Annotated[Path, typer.Argument(help="Path of the store.")]


@app.command()
def extract(
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=REF; repeat. REF: hub id\\[@revision], directory, or GGUF file.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="K,K,... for every model, NAME=K,... for one, or depths: 0%,50%,100%.")
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="wikitext-103-raw-v1, hf:REPO\\[/CONFIG]\\[:SPLIT], text:PATH-OR-GLOB, jsonl:PATH.")
    ] = "wikitext-103-raw-v1",
    text_field: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    store: Annotated[Path, typer.Option(help="Where to write.")] = Path("wt103.zarr"),
    max_tokens: Annotated[str, typer.Option(help="Token budget per model: a number, 200k, 1M, or all.")] = "1M",
    max_documents: Annotated[int | None, typer.Option(min=1, help="Read so many documents at most.")] = None,
    max_document_bytes: Annotated[int | None, typer.Option(min=4, help="Read so much of each document.")] = None,
    window_bytes: Annotated[int, typer.Option(min=4, help="Longest stretch of text a model reads at once.")] = 2048,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens of a forward pass.")] = 8192,
    shard_rows: Annotated[int, typer.Option(min=256, help="Rows of a shard file.")] = 16_384,
    form: Annotated[str, typer.Option("--format", help="bfloat16, float16 or float32.")] = "bfloat16",
    layout: Annotated[str, typer.Option(help="hot (mapped, uncompressed) or archive (blosc zstd).")] = "hot",
    sink_threshold: Annotated[
        float, typer.Option(min=1.0, help="A token is an attention sink beyond this multiple of the median norm.")
    ] = 5.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Compute dtype: auto, bfloat16, float16, float32.")] = "auto",
    attn: Annotated[str, typer.Option(help="transformers' attention implementation.")] = "sdpa",
    seed: Annotated[int, typer.Option(min=0, help="Order of documents: 0 as in the corpus, else shuffled.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, time and free space; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read a corpus with every model and store their residual streams; go on where an earlier run stopped."""
    from featstore import extract as extraction
    from featstore.job import Settings, prepare
    from featstore.summary import describe

    job = prepare(
        Settings(
            model=tuple(model or DEFAULT_MODELS),
            layers=tuple(layers or (DEFAULT_LAYERS,)),
            dataset=dataset,
            text_field=text_field,
            store=store,
            max_tokens=parse_budget(max_tokens),
            max_documents=max_documents,
            max_document_bytes=max_document_bytes,
            window_bytes=window_bytes,
            batch_tokens=batch_tokens,
            shard_rows=shard_rows,
            form=form,
            layout=layout,
            sink_threshold=sink_threshold,
            device=device,
            dtype=dtype,
            attention=attn,
            seed=seed,
        )
    )
    if dry_run:
        result = extraction.dry_run(job)
        emit(result, _describe_dry_run(result), as_json=as_json)
        return
    result = extraction.extract(job)
    emit(result, describe(result), as_json=as_json)
    if not as_json:
        err.print(f"next: align train --store {store} --type procrustes")


def _describe_dry_run(result: dict[str, Any]) -> str:
    lines = []
    for name, model in result["models"].items():
        time = "time unknown until its weights are on this disk"
        if model["seconds"] is not None:
            time = f"about {human_seconds(model['seconds'])} here"
        lines.append(
            f"{name}: {human(model['tokens'])} tokens x {len(model['layers'])} layers = {human_bytes(model['bytes'])} "
            f"({human_bytes(model['bytes_per_layer'])} a layer), {time}"
        )
    verdict = "fits" if result["fits"] else "[bold]does not fit[/bold]: use fewer --layers or a smaller --max-tokens"
    lines.append(f"in all {human_bytes(result['bytes'])}; {human_bytes(result['free_bytes'])} are free: {verdict}")
    return "\n".join(lines)


@app.command()
def info(store: StorePath, as_json: Json = False) -> None:
    """Say what a store holds: models, layers, rows, pairs, coverage, size."""
    from featstore.store import open_store
    from featstore.summary import describe, summary

    result = summary(open_store(store))
    emit(result, describe(result), as_json=as_json)


@app.command()
def inspect(
    store: StorePath,
    window: Annotated[int, typer.Option(min=0, help="Which window to show.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Tokens to show of each model.")] = 24,
    as_json: Json = False,
) -> None:
    """Show a window as the models saw it: text, norms, sinks and pair partners, token by token."""
    from featstore.store import open_store
    from featstore.summary import describe_window, window_table

    result = window_table(open_store(store), window, rows)
    emit(result, describe_window(result), as_json=as_json)


@app.command()
def verify(store: StorePath, as_json: Json = False) -> None:
    """Check a store against its own checksums, shapes and text; exit code 1 if it is damaged."""
    from featstore.verify import verify_store

    result = verify_store(store)
    text = "\n".join(f"[bold]damaged[/bold] {line}" for line in result["damage"]) or (
        f"{store}: {result['files']} files, {human_bytes(result['bytes'])} verified; no damage"
    )
    emit(result, text, as_json=as_json)
    if result["damage"]:
        raise typer.Exit(1)


@app.command()
def pair(
    store: StorePath,
    policy: Annotated[str, typer.Option(help="end: every equal byte end; word: only ends of words.")] = "end",
    as_json: Json = False,
) -> None:
    """Add pair indexes to a store under another policy."""
    from featstore.index import add_pairs

    result = add_pairs(store, policy)
    lines = [f"{key}: {human(entry['pairs'])} pairs" for key, entry in result["pairs"].items()]
    emit(result, "\n".join(lines), as_json=as_json)


@app.command()
def doctor(
    model: Annotated[list[str] | None, typer.Option(help="NAME=REF to check access to; repeat.")] = None,
    store: Annotated[Path, typer.Option(help="Where the store would go.")] = Path("wt103.zarr"),
    as_json: Json = False,
) -> None:
    """Check this machine: versions, device, disk, the import clash, and access to the models, before any download."""
    from featstore.doctor import describe_checks, examine

    result = examine(tuple(model) if model else DEFAULT_MODELS, store)
    emit(result, describe_checks(result), as_json=as_json)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="Where the models go.")] = Path(".cache/demo"),
    same_tokenizer: Annotated[bool, typer.Option(help="The exact twin, with the first model's tokenizer.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the planted rotation.")] = 0,
    as_json: Json = False,
) -> None:
    """Build the calibration pair: a real model and a twin whose hidden states are a known rotation of its own."""
    from featstore.calibration import build_pair

    pair_ = build_pair(out, out / "assets", seed=seed, same_tokenizer=same_tokenizer)
    result = {"source": str(pair_.source), "target": str(pair_.target), "rotation": str(pair_.rotation), "seed": seed}
    emit(result, f"{pair_.source}\n{pair_.target}\n{pair_.rotation}", as_json=as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    cache: Annotated[Path, typer.Option(help="Where the demo models are built once.")] = Path(".cache/demo"),
    as_json: Json = False,
) -> None:
    """Do the whole job on two real models: build, extract, train, compare, stitch, generate, report."""
    from featstore.demo import run_demo

    result = run_demo(out, cache)
    emit(result, result["text"], as_json=as_json)


def main() -> None:
    """Entry point of the `featstore` command."""
    run_app(app, "featstore")
