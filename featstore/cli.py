"""Read a corpus with language models, store their residual streams, and look after the stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featstore.errors import SpecError
from featstore.models.attention import ATTENTIONS, parse_attention
from featstore.models.references import DEFAULT_LAYERS, DEFAULT_MODELS, Allowed
from featstore.runtime.console import add_version, check_directory, emit, err, human, human_bytes, run_app
from featstore.runtime.quantities import parse_bytes
from featstore.runtime.visible import inline

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
add_version(app, "featstore")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
_MODEL = (
    "NAME=REF; may be repeated. REF: hub id\\[@revision], directory, or GGUF file. By default "
    f"{' and '.join(DEFAULT_MODELS)}."
)
_LAYERS = f"K,K,... for every model, NAME=K,... for one, or depths: 0%,50%,100%. By default {DEFAULT_LAYERS}."
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Spread a model over devices, instead of --device: auto, balanced, or a JSON file with {MODULE: DEVICE}; "
        "by default none."
    ),
]
Yes = Annotated[
    bool,
    typer.Option(
        "--yes",
        help="Use models, and text, that a store's or an adapter's files name and you have not named: they are shown.",
    ),
]
Pickles = Annotated[
    bool,
    typer.Option(
        "--allow-pickle-weights", help="Read pickled weights, which can run code, where a model has no others."
    ),
]
StorePath = Annotated[Path, typer.Argument(help="Path of the store.")]


@app.command()
def extract(
    model: Annotated[list[str] | None, typer.Option(help=_MODEL)] = None,
    layers: Annotated[list[str] | None, typer.Option(help=_LAYERS)] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="hf:REPO\\[/CONFIG]\\[:SPLIT], text:PATH-OR-GLOB or jsonl:PATH; by default wikitext-103-raw-v1."
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            help="Field that holds the text; by default text. Rows with messages (role, content) are conversations, "
            "which each model reads through its own chat template."
        ),
    ] = None,
    normalise: Annotated[
        str | None,
        typer.Option(help="none, nfc, or auto: nfc where a model's tokenizer normalises; by default auto."),
    ] = None,
    control_tokens: Annotated[
        str | None,
        typer.Option(
            help="What control tokens quoted in the text, such as </s>, are read as: text, or special, which never "
            "pairs; by default text."
        ),
    ] = None,
    store: Annotated[Path, typer.Option(help="Where to write, or what to add to.")] = Path("wt103.zarr"),
    max_tokens: Annotated[
        str | None, typer.Option(help="Token budget per model: a number, 200k, 1M, or all; by default 1M.")
    ] = None,
    max_documents: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of documents; by default all.")
    ] = None,
    max_document_bytes: Annotated[
        int | None,
        typer.Option(
            min=4, help="Maximum number of bytes of each document, of conversations whole messages; by default all."
        ),
    ] = None,
    window_bytes: Annotated[
        int | None,
        typer.Option(
            min=4, help="Longest stretch of text a model reads at once; by default 2048. Conversations stay whole."
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Padded tokens of a forward pass; by default 8192.")
    ] = None,
    shard_rows: Annotated[int | None, typer.Option(min=256, help="Rows of a shard file; by default 16384.")] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="bfloat16, float16, float32, int8 or fp8; by default bfloat16.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="hot (mapped, uncompressed) or archive (blosc zstd); by default hot.")
    ] = None,
    layer_0: Annotated[
        str | None,
        typer.Option(
            "--layer-0", help="stored like any layer, or table: one row for every token id; by default stored."
        ),
    ] = None,
    sink_threshold: Annotated[
        float | None,
        typer.Option(
            min=1.0, help="A token is an attention sink beyond this multiple of the median norm; by default 5."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    device_map: DeviceMap = None,
    dtype: Annotated[
        str | None, typer.Option(help="Compute dtype: auto, bfloat16, float16, float32; by default auto.")
    ] = None,
    attn: Annotated[
        str | None,
        typer.Option(help=f"Attention: {', '.join(ATTENTIONS)}; auto is sdpa where a model has it. By default auto."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Order of documents: 0 as in the corpus, else shuffled; by default 0.")
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens that each model may write after each document, which are read with it; by default none."
        ),
    ] = None,
    generate_with: Annotated[
        list[str] | None, typer.Option(help="NAME of a model that writes; may be repeated; by default each.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Temperature of what is written (with --seed), 0 for the likeliest token; by default 0."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the likeliest tokens that together have this probability, 1 for all; by default 1."
        ),
    ] = None,
    moments: Annotated[
        bool, typer.Option("--moments", help="Also store the moments of every two layers: fits then need no rows.")
    ] = False,
    moments_only: Annotated[
        bool, typer.Option("--moments-only", help="Store moments and no rows; both models are loaded at once.")
    ] = False,
    moments_memory: Annotated[
        str,
        typer.Option(help="Memory for summing moments: bytes, or such as 500M, 12G; more sums lie in files meanwhile."),
    ] = "12G",
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, time and free space; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read a corpus with every model and store their residual streams.

    On a store that exists, what is not typed is taken from it: the command goes on where an earlier run stopped, or
    adds another layer (--layers), another model (--model) or more documents (--max-tokens, --max-documents).
    """
    from featstore.extraction import estimate
    from featstore.extraction import run as extraction
    from featstore.extraction.flags import parse_settings
    from featstore.extraction.job import prepare
    from featstore.runtime.processes import Ranks
    from featstore.store.inspect.summary import describe

    given = {
        "model": model or None,
        "layers": layers or None,
        "dataset": dataset,
        "text_field": text_field,
        "normalise": normalise,
        "control_tokens": control_tokens,
        "store": store,
        "max_tokens": max_tokens,
        "max_documents": max_documents,
        "max_document_bytes": max_document_bytes,
        "window_bytes": window_bytes,
        "batch_tokens": batch_tokens,
        "shard_rows": shard_rows,
        "form": form,
        "layout": layout,
        "layer_0": layer_0,
        "sink_threshold": sink_threshold,
        "device": device,
        "device_map": device_map,
        "dtype": dtype,
        "attention": attn,
        "seed": seed,
        "generate": generate,
        "generate_with": generate_with or None,
        "temperature": temperature,
        "top_p": top_p,
        "moments_memory": moments_memory,
        "yes": yes,
        "allow_pickle_weights": allow_pickle_weights,
    }
    first = Ranks.from_environment().first
    settings = parse_settings(given, moments=moments, moments_only=moments_only)
    job = prepare(settings, quiet=not first, load=not dry_run)
    if dry_run:
        result = estimate.dry_run(job)
        emit(result, estimate.describe(result), as_json=as_json)
        if not result["fits"]:
            raise typer.Exit(2)
        return
    result = extraction.extract(job)
    if not first:
        return
    emit(result, describe(result), as_json=as_json)
    if not as_json:
        err.print(f"next: align train --store {store} --type procrustes")


@app.command()
def info(
    store: StorePath,
    no_spectrum: Annotated[
        bool, typer.Option("--no-spectrum", help="Leave out the ranks, which take the time.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a store holds: models, rows, pairs, coverage; and of every layer size, energy and effective rank."""
    from featstore.store import open_store
    from featstore.store.inspect.summary import describe, describe_states, states_summary, summary
    from featstore.store.read.links import links_of

    opened = open_store(store)
    states, links = states_summary(opened, spectrum=not no_spectrum), links_of(opened)
    result = summary(opened) | {"states": states, "links": [link.to_dict() for link in links]}
    lines = [describe(result), *(f"  link     {inline(link)}" for link in links), describe_states(states)]
    emit(result, "\n".join(lines), as_json=as_json)


@app.command()
def inspect(
    store: StorePath,
    window: Annotated[int, typer.Option(min=0, help="Which window to show.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Tokens to show of each model.")] = 24,
    as_json: Json = False,
) -> None:
    """Show a window as the models saw it: text, norms, sinks and pair partners, token by token."""
    from featstore.store import open_store
    from featstore.store.inspect.summary import describe_window, window_table

    result = window_table(open_store(store), window, rows)
    emit(result, describe_window(result), as_json=as_json)


@app.command()
def verify(
    store: StorePath,
    again: Annotated[
        int,
        typer.Option(
            "--reextract", min=0, help="Number of batches of each model that are computed again and compared."
        ),
    ] = 0,
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=REF of a model that is elsewhere now; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where --reextract computes: auto, cpu, cuda, cuda:N.")] = "auto",
    device_map: DeviceMap = None,
    seed: Annotated[int, typer.Option(min=0, help="Which batches --reextract takes.")] = 0,
    tokens: Annotated[
        bool,
        typer.Option("--retokenise", help="Tokenise the text again and compare; --reextract does so as well."),
    ] = False,
    allow_links: Annotated[
        bool,
        typer.Option("--allow-links", help="Accept links that lead outside the store, which are damage otherwise."),
    ] = False,
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    as_json: Json = False,
) -> None:
    """Check a store against its checksums and shapes; exit 1 if it is damaged.

    The store alone is read, unless its models are asked for: --retokenise compares its tokens with its text, and
    --reextract also its rows with its models.
    """
    from featstore.store.inspect.verify import verify_store
    from featstore.store.read.links import Link

    if not (again or tokens) and (model or device_map is not None or yes or allow_pickle_weights):
        raise SpecError("--model, --device-map, --yes and --allow-pickle-weights need --reextract or --retokenise")
    result = verify_store(store, allow_links=allow_links)
    lines = []
    if not (again or tokens):
        result |= {"tokenized": []}
        result["not_checked"].append("tokens against text, and rows against models: give --retokenise or --reextract N")
    elif not result["damage"]:
        from featstore.extraction.reextract import describe_reextract, with_models

        result |= with_models(
            store,
            again,
            result["not_checked"],
            seed=seed,
            model=tuple(model or ()),
            allowed=Allowed(yes, allow_pickle_weights),
            device=device,
            device_map=device_map,
        )
        lines += [describe_reextract(result["reextract"])] if "reextract" in result else []
    lines += [f"link: {inline(Link(**link))}" for link in result["links"]]
    lines += [f"not checked: {inline(line)}" for line in result["not_checked"]]
    lines += [f"damaged {inline(line)}" for line in result["damage"]] or [
        f"{store}: {result['files']} files, {human_bytes(result['bytes'])} verified; no damage"
    ]
    emit(result, "\n".join(lines), as_json=as_json)
    if result["damage"]:
        raise typer.Exit(1)


@app.command()
def convert(
    store: StorePath,
    form: Annotated[
        str | None, typer.Option("--format", help="bfloat16, float16, float32, int8 or fp8; by default as it is.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="hot (mapped, uncompressed) or archive (blosc zstd); by default as it is.")
    ] = None,
    shard_rows: Annotated[int | None, typer.Option(min=256, help="Rows of a shard file; by default as it is.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Path of the new store; by default STORE-FORMAT-LAYOUT.zarr beside it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a store again in another format or layout, with everything else as it is; the old one stays.

    Killed, it goes on where it stopped when the same command is run again.
    """
    from featstore.store.conversion.convert import convert as convert_store
    from featstore.store.conversion.convert import describe_conversion

    result = convert_store(store, out, form=form, layout=layout, shard_rows=shard_rows)
    emit(result, describe_conversion(result), as_json=as_json)


@app.command()
def pair(
    store: StorePath,
    policy: Annotated[
        str,
        typer.Option(
            help="end: every equal byte end that is not inside a character; word: only ends of words; "
            "byte: also inside characters."
        ),
    ] = "end",
    again: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="Derive token tables and pairs again from text and tokenizers; no model is run."
        ),
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="NAME=REF of a model that is elsewhere now, for --rebuild; may be repeated."),
    ] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Add pair indexes to a store under another policy, or derive all that it has again.

    --rebuild makes a store of an older format version one of this. Killed, it goes on when it is run again.
    """
    from featstore.errors import SpecError
    from featstore.store.read.pairs import check_policy
    from featstore.store.write.index import add_pairs

    check_policy(policy)
    if (model or yes) and not again:
        raise SpecError("--model and --yes are for --rebuild: pairs follow from the token tables that are in the store")
    lines, result = [], {}
    if again:
        from featstore.extraction.rebuilding import describe_rebuild, rebuild

        result = rebuild(store, tuple(model or ()), Allowed(yes))
        lines.append(describe_rebuild(result))
    if not again or policy != "end":
        added = add_pairs(store, policy)["pairs"]
        lines += [f"{key}: {human(entry['pairs'])} pairs" for key, entry in added.items()]
        result |= {"added": added} if again else {"pairs": added}
    emit(result, "\n".join(lines), as_json=as_json)


@app.command()
def moments(
    store: StorePath,
    memory: Annotated[
        str,
        typer.Option(help="Memory for summing: bytes, or such as 500M, 12G; more sums lie in files meanwhile."),
    ] = "12G",
    as_json: Json = False,
) -> None:
    """Add the moments of every two layers to a store: closed-form fits and CKA then need no rows."""
    from featstore.runtime.processes import Ranks
    from featstore.store.moments.writing import add_moments

    first = Ranks.from_environment().first
    result = add_moments(store, memory=parse_bytes(memory), quiet=not first)
    if not first:
        return
    lines = [
        f"{key}: {entry['blocks']} blocks, {human_bytes(entry['bytes'])}; {entry['written']} of them are new"
        for key, entry in result["moments"].items()
    ]
    emit(result, "\n".join(lines), as_json=as_json)


@app.command()
def doctor(
    model: Annotated[list[str] | None, typer.Option(help="NAME=REF of a model to examine; may be repeated.")] = None,
    store: Annotated[Path, typer.Option(help="Where the store would go.")] = Path("wt103.zarr"),
    quick: Annotated[bool, typer.Option("--quick", help="Only check access to the models; load none.")] = False,
    device: Annotated[str, typer.Option(help="Where a model is tested: auto, cpu, cuda, cuda:N.")] = "auto",
    device_map: DeviceMap = None,
    dtype: Annotated[str, typer.Option(help="Compute dtype: auto, bfloat16, float16, float32.")] = "auto",
    attn: Annotated[
        str, typer.Option(help=f"Attention: {', '.join(ATTENTIONS)}; auto is sdpa where the model has it.")
    ] = "auto",
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    as_json: Json = False,
) -> None:
    """Check this machine, and every model that is named: what its states, its layers and its cache are right for.

    A model whose weights lie on this disk is loaded and tested; nothing is downloaded. Exit 1 if the machine lacks
    something, or if a model cannot be read or its states not be stored; that a layer takes no injection, or that
    nothing can be hidden from it, is said and is no failure.
    """
    from featstore.demo.doctor import describe_checks, examine
    from featstore.models.devices import parse_device_map

    parse_attention(attn, "--attn")
    options = {"device": device, "device_map": parse_device_map(device_map), "dtype": dtype, "attention": attn}
    # Models that nobody named are not loaded: they may be large.
    probe = bool(model) and not quick
    allowed = Allowed(yes, allow_pickle_weights)
    result = examine(tuple(model) if model else DEFAULT_MODELS, store, probe=probe, allowed=allowed, **options)
    emit(result, describe_checks(result), as_json=as_json)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="Where the models go.")] = Path(".cache/demo"),
    same_tokenizer: Annotated[bool, typer.Option(help="The exact twin, with the first model's tokenizer.")] = False,
    small: Annotated[
        bool,
        typer.Option(
            "--small", help="The small model that was trained apart, and its untrained copy; nothing is downloaded."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the planted rotation, or of the untrained weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Build the calibration pair, a real model and a twin whose states are a known rotation of its own, or --small."""
    check_directory(out)
    if small:
        from featstore.demo.small import build_small

        if same_tokenizer:
            raise SpecError("--small and --same-tokenizer build different models; give one of them")
        models = build_small(out, seed=seed)
        result = {"trained": str(models.trained), "untrained": str(models.untrained), "seed": seed}
        emit(result, f"{models.trained}\n{models.untrained}", as_json=as_json)
        return
    from featstore.demo.pair import build_pair

    pair_ = build_pair(out, out / "assets", seed=seed, same_tokenizer=same_tokenizer)
    result = {"source": str(pair_.source), "target": str(pair_.target), "rotation": str(pair_.rotation), "seed": seed}
    emit(result, f"{pair_.source}\n{pair_.target}\n{pair_.rotation}", as_json=as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    cache: Annotated[Path, typer.Option(help="Where the demo models are built once.")] = Path(".cache/demo"),
    as_json: Json = False,
) -> None:
    """Do the whole job on three pairs of models: build, extract, train, compare, stitch, generate, report."""
    from featstore.demo.run import run_demo

    check_directory(out)
    check_directory(cache)
    result = run_demo(out, cache)
    emit(result, result["text"], as_json=as_json)


def main() -> None:
    """Entry point of the `featstore` command."""
    run_app(app, "featstore", extra="models")
