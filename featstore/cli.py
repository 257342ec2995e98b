"""Read a corpus with language models, store their residual streams, and look after the stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featstore.errors import SpecError
from featstore.models.attention import ATTENTIONS, parse_attention
from featstore.models.references import DEFAULT_LAYERS, DEFAULT_MODELS, Allowed
from featstore.runtime.console import add_version, check_directory, emit, err, human, human_bytes, run_app
from featstore.runtime.options import (
    ANSWERS,
    COMPUTATION,
    DTYPES,
    MODELS,
    OUTPUT,
    POLICY_WORDS,
    STORE,
    TEXT,
    TRUST,
    Device,
    DeviceMap,
    Dtype,
    Json,
    MovedModels,
    Pickles,
    StorePath,
    Yes,
    option,
)
from featstore.runtime.quantities import parse_bytes
from featstore.runtime.visible import inline

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
add_version(app, "featstore")

#: What an extraction takes where an option is left out and the store is there already.
_STORED = "or the store's"
_FORMATS = ("bfloat16", "float16", "float32", "int8", "fp8")
_LAYOUTS = ("hot (uncompressed, read from mapped files)", "archive (compressed by blosc and zstd)")
#: One declaration of what `extract` and `convert` have in common.
_MEMORY = (
    "Memory for summing moments: bytes, or an amount such as 500M or 12G. Sums that exceed it go to files meanwhile."
)
_ATTENTION = "Implementation of attention; auto is sdpa where a model has it, and else the model's own."


@app.command()
def extract(
    model: Annotated[
        list[str] | None,
        option(
            "A model to read the text with, as NAME=REF; repeat it for each model. REF is a hub id\\[@revision], a "
            "directory, or a GGUF file.",
            panel=MODELS,
            default=f"{' and '.join(DEFAULT_MODELS)}, {_STORED}",
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        option(
            "Layers to store: K,K,... for every model, NAME=K,... for one of them, or depths such as 0%,50%,100%. "
            "Layer K is the residual stream after K blocks.",
            panel=MODELS,
            default=f"{DEFAULT_LAYERS}, {_STORED}",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        option(
            "Text to read: hf:REPO\\[/CONFIG]\\[:SPLIT], text:PATH-OR-GLOB or jsonl:PATH.",
            panel=TEXT,
            default=f"wikitext-103-raw-v1, {_STORED}",
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        option(
            "Field of each row that holds the text. Rows with messages (role, content) are conversations, which each "
            "model reads through its own chat template.",
            panel=TEXT,
            default=f"text, {_STORED}",
        ),
    ] = None,
    normalise: Annotated[
        str | None,
        option(
            "Unicode normalisation of the text before any model reads it.",
            panel=TEXT,
            choices=("none", "nfc", "auto (nfc where a model's tokenizer normalises)"),
            default=f"auto, {_STORED}",
        ),
    ] = None,
    control_tokens: Annotated[
        str | None,
        option(
            "How control tokens that the text quotes, such as </s>, are read.",
            panel=TEXT,
            choices=("text", "special (as control tokens, which never pair)"),
            default=f"text, {_STORED}",
        ),
    ] = None,
    store: Annotated[Path, option("Store to write, or to add to.", panel=STORE)] = Path("wt103.zarr"),
    max_tokens: Annotated[
        str | None,
        option(
            "Maximum number of tokens per model: a number, an amount such as 200k or 1M, or all.",
            panel=TEXT,
            default=f"1M, {_STORED}",
        ),
    ] = None,
    max_documents: Annotated[
        int | None, option("Maximum number of documents.", panel=TEXT, least=1, default=f"all, {_STORED}")
    ] = None,
    max_document_bytes: Annotated[
        int | None,
        option(
            "Maximum number of bytes of each document. Conversations are cut between messages.",
            panel=TEXT,
            least=4,
            default=f"all, {_STORED}",
        ),
    ] = None,
    window_bytes: Annotated[
        int | None,
        option(
            "Maximum number of bytes of text that a model reads at once. Conversations stay whole.",
            panel=TEXT,
            least=4,
            default=f"2048, {_STORED}",
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        option(
            "Number of tokens in a forward pass, padding included.",
            panel=COMPUTATION,
            least=1,
            default=f"8192, {_STORED}",
        ),
    ] = None,
    shard_rows: Annotated[
        int | None, option("Number of rows in a shard file.", panel=STORE, least=256, default=f"16384, {_STORED}")
    ] = None,
    form: Annotated[
        str | None,
        option(
            "Number format of the stored states.",
            "--format",
            panel=STORE,
            choices=_FORMATS,
            default=f"bfloat16, {_STORED}",
        ),
    ] = None,
    layout: Annotated[
        str | None, option("Layout of the files.", panel=STORE, choices=_LAYOUTS, default=f"hot, {_STORED}")
    ] = None,
    layer_0: Annotated[
        str | None,
        option(
            "How layer 0, the embedding, is stored.",
            "--layer-0",
            panel=STORE,
            choices=("stored (as rows like any layer)", "table (one row for every token id)"),
            default=f"stored, {_STORED}",
        ),
    ] = None,
    sink_threshold: Annotated[
        float | None,
        option(
            "Norm beyond which a token counts as an attention sink, as a multiple of the median norm.",
            panel=STORE,
            least=1.0,
            default=f"5, {_STORED}",
        ),
    ] = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Annotated[
        str | None,
        option("Number type to compute in.", panel=COMPUTATION, choices=DTYPES, default=f"auto, {_STORED}"),
    ] = None,
    attn: Annotated[
        str | None, option(_ATTENTION, panel=COMPUTATION, choices=ATTENTIONS, default=f"auto, {_STORED}")
    ] = None,
    seed: Annotated[
        int | None,
        option(
            "Order in which documents are taken: 0 as in the corpus, any other number a shuffle. It also seeds what "
            "models write.",
            panel=TEXT,
            least=0,
            default=f"0, {_STORED}",
        ),
    ] = None,
    generate: Annotated[
        int | None,
        option(
            "Maximum number of tokens that each model writes after each document. Both models then read the document "
            "with that answer.",
            panel=ANSWERS,
            least=1,
            default=f"none, {_STORED}",
        ),
    ] = None,
    generate_with: Annotated[
        list[str] | None,
        option("NAME of a model that writes; repeat it for several.", panel=ANSWERS, default=f"every model, {_STORED}"),
    ] = None,
    temperature: Annotated[
        float | None,
        option(
            "Temperature at which models write; 0 takes the most likely token each time.",
            panel=ANSWERS,
            least=0.0,
            default=f"0, {_STORED}",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        option(
            "Draw from the fewest most likely tokens that together have this probability, above 0 and at most 1.",
            panel=ANSWERS,
            default=f"1, {_STORED}",
        ),
    ] = None,
    moments: Annotated[
        bool,
        option("Also store the moments of every two layers, so that fits need no rows.", "--moments", panel=STORE),
    ] = False,
    moments_only: Annotated[
        bool, option("Store moments and no rows. Both models are in memory at once.", "--moments-only", panel=STORE)
    ] = False,
    moments_memory: Annotated[str, option(_MEMORY, panel=COMPUTATION)] = "12G",
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    dry_run: Annotated[
        bool, option("Print sizes, time and free space, and write nothing.", "--dry-run", panel=OUTPUT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Read a corpus with every model and store their residual streams.

    With a store that exists, options that are left out are taken from it. The command resumes where an earlier one
    stopped, or adds another layer (--layers), another model (--model) or more text (--max-tokens, --max-documents).
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
        bool, option("Leave out the effective ranks, which take most of the time.", "--no-spectrum", panel=OUTPUT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a store holds: models, rows, pairs and coverage; of every layer the size, energy and effective rank."""
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
    window: Annotated[int, option("Number of the window to show.", panel=OUTPUT, least=0)] = 0,
    rows: Annotated[int, option("Number of tokens to show of each model.", panel=OUTPUT, least=1)] = 24,
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
        option(
            "Number of batches of each model to compute again and compare with the stored rows.",
            "--reextract",
            panel=MODELS,
            least=0,
        ),
    ] = 0,
    tokens: Annotated[
        bool,
        option(
            "Tokenise the text again and compare the tokens with those stored; --reextract does so, too.",
            "--retokenise",
            panel=MODELS,
        ),
    ] = False,
    model: MovedModels = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    seed: Annotated[int, option("Seed that chooses the batches of --reextract.", panel=COMPUTATION, least=0)] = 0,
    allow_links: Annotated[
        bool,
        option("Accept links that lead outside the store, which are damage otherwise.", "--allow-links", panel=TRUST),
    ] = False,
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    as_json: Json = False,
) -> None:
    """Check a store against its checksums and shapes; exit 1 if it is damaged.

    Only the store is read, unless you ask for its models: --retokenise compares its tokens with its text, and
    --reextract also compares its rows with its models.
    """
    from featstore.store.inspect.verify import verify_store
    from featstore.store.read.links import Link

    if not (again or tokens) and (model or device_map is not None or yes or allow_pickle_weights):
        raise SpecError(
            "--model, --device-map, --yes and --allow-pickle-weights need --reextract or --retokenise; give one of the "
            "two, or leave them out"
        )
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
        str | None,
        option(
            "Number format of the new store.", "--format", panel=STORE, choices=_FORMATS, default="that of the store"
        ),
    ] = None,
    layout: Annotated[
        str | None,
        option("Layout of the new store's files.", panel=STORE, choices=_LAYOUTS, default="that of the store"),
    ] = None,
    shard_rows: Annotated[
        int | None, option("Number of rows in a shard file.", panel=STORE, least=256, default="as in the store")
    ] = None,
    out: Annotated[
        Path | None,
        option("Path of the new store.", panel=OUTPUT, default="STORE-FORMAT-LAYOUT.zarr beside the store"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a copy of a store in another format or layout; the store itself stays as it is.

    An interrupted conversion resumes when the same command is run again.
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
        option(
            "Rule by which token states of two models are paired: they end at the same byte.",
            panel=STORE,
            choices=POLICY_WORDS,
        ),
    ] = "end",
    again: Annotated[
        bool,
        option(
            "Derive token tables and pairs again from text and tokenizers. No model is run.", "--rebuild", panel=STORE
        ),
    ] = False,
    model: MovedModels = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Add pair indexes of another policy to a store, or derive its token tables and pairs again.

    --rebuild brings a store of an older format version to the current one. It resumes when it is run again.
    """
    from featstore.errors import SpecError
    from featstore.store.read.pairs import check_policy
    from featstore.store.write.index import add_pairs

    check_policy(policy)
    if (model or yes) and not again:
        raise SpecError(
            "--model and --yes are for --rebuild: other pairs follow from the token tables in the store; add "
            "--rebuild, or leave them out"
        )
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
    memory: Annotated[str, option(_MEMORY, panel=COMPUTATION)] = "12G",
    as_json: Json = False,
) -> None:
    """Add the moments of every two layers to a store, so that closed-form fits and CKA need no rows."""
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
    model: Annotated[
        list[str] | None,
        option(
            "A model to examine, as NAME=REF; repeat it for several.",
            panel=MODELS,
            default="access to the models of an extraction alone",
        ),
    ] = None,
    store: Annotated[Path, option("Place of a future store, whose disk is checked.", panel=STORE)] = Path("wt103.zarr"),
    quick: Annotated[bool, option("Check only access to the models, and load none.", "--quick", panel=MODELS)] = False,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    attn: Annotated[str, option(_ATTENTION, panel=COMPUTATION, choices=ATTENTIONS)] = "auto",
    yes: Yes = False,
    allow_pickle_weights: Pickles = False,
    as_json: Json = False,
) -> None:
    """Check this machine, and test what can be done with the states, layers and caches of models.

    A model whose weights are on this disk is loaded and tested; nothing is downloaded. Exit 1 if the machine lacks
    something, if a model cannot be read, or if its states cannot be stored. A layer that takes no injection, or from
    which nothing can be hidden, is reported and is no failure.
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
    out: Annotated[Path, option("Directory for the models.", panel=OUTPUT)] = Path(".cache/demo"),
    same_tokenizer: Annotated[
        bool,
        option(
            "Build the twin with the first model's own tokenizer, so that it is the same function of the same tokens.",
            "--same-tokenizer",
            panel=MODELS,
        ),
    ] = False,
    small: Annotated[
        bool,
        option(
            "Write the small model that was trained apart, and its untrained copy, instead. Nothing is downloaded.",
            "--small",
            panel=MODELS,
        ),
    ] = False,
    seed: Annotated[
        int, option("Seed of the planted rotation, or of the untrained weights.", panel=MODELS, least=0)
    ] = 0,
    as_json: Json = False,
) -> None:
    """Build the calibration pair: a real model, and a twin whose states are a known rotation of the model's."""
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
    out: Annotated[Path, option("Directory for the store, the runs and the report.", panel=OUTPUT)] = Path("demo"),
    cache: Annotated[Path, option("Directory in which the demo models are built once.", panel=OUTPUT)] = Path(
        ".cache/demo"
    ),
    as_json: Json = False,
) -> None:
    """Run the whole programme on three pairs of models: build, extract, train, compare, stitch, generate, report."""
    from featstore.demo.run import run_demo

    check_directory(out)
    check_directory(cache)
    result = run_demo(out, cache)
    emit(result, result["text"], as_json=as_json)


def main() -> None:
    """Entry point of the `featstore` command."""
    run_app(app, "featstore", extra="models")
