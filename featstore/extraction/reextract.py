"""What checksums cannot tell: whether a store's tokens are those of its text, and its rows those of its models.

Text is tokenised again with the tokenizers that the store names. Rows are computed again: whole planned batches, evenly
spread over the store, since a row's last bits depend on what it was batched with. The same batch on the same kind of
device with the same libraries should give the same bits; elsewhere it gives the same numbers but for rounding, so a row
may differ by what rounding can explain (:func:`rounding_bound`, and :data:`COMPUTE_TOLERANCE` for the arithmetic).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.errors import CorpusError, FeatstoreError, OffsetError, SpecError, StoreStateError
from featstore.extraction.forward import BatchReader, pack, unpacked
from featstore.extraction.job import Job, prepare
from featstore.extraction.named import references_of
from featstore.extraction.pilot import read_pilot, recorded_weights
from featstore.extraction.proof import tested
from featstore.extraction.recorded import attention_of
from featstore.extraction.settings import Settings
from featstore.models import loading as models
from featstore.models import references as spec
from featstore.models.devices import DeviceMap, parse_device_map
from featstore.models.tokenizers import held_control_tokens
from featstore.models.weights import weights_of
from featstore.runtime.console import Tick, err, progress
from featstore.runtime.provenance import digest, versions
from featstore.store import Store, open_store
from featstore.store.format.elements import Format
from featstore.store.format.version import FORMAT_VERSION
from featstore.store.moments.stored import has_rows
from featstore.store.read.records import TOKEN_COLUMNS
from featstore.store.read.tables import TableReader
from featstore.store.write.writer import StoreWriter
from featstore.text.chat import DATE
from featstore.text.message_arrays import tokenize_windows
from featstore.text.plan import Plan

#: Relative difference of a row that arithmetic in this dtype may cause between two machines, through all blocks.
#: Measured on SmolLM2's 30 blocks, two attention kernels on a CPU: at most 2e-6 in float32 (TF32 on a GPU is coarser)
#: and 0.056 in bfloat16 (median 0.01); float16 is at most 0.005 away from float32.
COMPUTE_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
#: Largest relative rounding error of a row whose scales are no longer known, for the earlier links of a conversion.
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-10, "bfloat16": 2.0**-8, "fp8": 2.0**-3, "int8": 0.1}
#: Libraries whose version decides whether the same bits can be expected.
_SAME = ("torch", "transformers")
_TOKENIZE_BATCH = 256


# Text ---------------------------------------------------------------------------------------------------------------


def check_tokens(
    store: Store, model: Sequence[str] = (), allowed: spec.Allowed = spec.NOTHING, *, quiet: bool = False
) -> dict[str, list[str]]:
    """Tokenise the store's text again and compare ids, byte ends and special tokens.

    Args:
        store: Any complete store.
        model: ``NAME=REF`` values that take the place of the references on record.
        allowed: Whether tokenizers are read that the store names and the user has not.
        quiet: No progress.

    Returns:
        ``tokenized``: models whose tokens are those of the text; ``damage``; ``not_checked``: why a model could not be.

    Raises:
        SpecError: A name that is not in the store.
        StrangeReferenceError: The store names a model that the user has not named.
    """
    result: dict[str, list[str]] = {"tokenized": [], "damage": [], "not_checked": []}
    references = references_of(store, model, allowed, quiet=quiet)
    for name in store.models:
        attributes = store.model(name).attributes
        if name not in references:
            result["not_checked"].append(f"{name}: tokens against text, as the store does not say which model it is")
            continue
        try:
            control_tokens = held_control_tokens(store.attributes["corpus"])
            info = models.inspect_model(spec.parse_model(references[name], allowed), control_tokens)
        except FeatstoreError as error:
            result["not_checked"].append(f"{name}: tokens against text ({error})")
            continue
        if info.tokenizer_hash != attributes.get("tokenizer_sha256"):
            result["not_checked"].append(f"{name}: tokens against text, as its tokenizer has changed since")
            continue
        template = attributes.get("chat_template_sha256")
        if template is not None and template != digest(info.tokenizer.chat_template):
            result["not_checked"].append(f"{name}: tokens against text, as its chat template has changed since")
            continue
        damage = _first_difference(store, name, info.tokenizer, quiet=quiet)
        result["damage" if damage else "tokenized"].append(damage or name)
    return result


def _first_difference(store: Store, name: str, tokenizer: Any, *, quiet: bool) -> str | None:
    """The first window whose tokens are not those in the store, in words."""
    text, table = store.corpus, store.columns(name, *TOKEN_COLUMNS)
    date = str(store.attributes["corpus"].get("date", DATE))
    count = len(text.window_document)
    starts = np.searchsorted(table["window"], np.arange(count + 1))
    with progress(f"tokenise {name}", count, "windows", quiet=quiet) as tick:
        for first in range(0, count, _TOKENIZE_BATCH):
            numbers = range(first, min(first + _TOKENIZE_BATCH, count))
            try:
                parts = tokenize_windows(text, numbers, tokenizer, name, date=date)
            except (OffsetError, CorpusError) as error:
                return f"{name}: windows {numbers.start}..{numbers.stop - 1} cannot be tokenised: {error}"
            for window, part in zip(numbers, parts, strict=True):
                rows = slice(int(starts[window]), int(starts[window + 1]))
                expected_of: dict[str, NDArray[Any]] = {"id": part.ids}
                if store.version >= FORMAT_VERSION:
                    # Older ones have the ends of offsets, which says whoever opens them.
                    expected_of |= {"byte_end": part.byte_end, "special": part.special, "exact": part.exact}
                for column, expected in expected_of.items():
                    if not np.array_equal(table[column][rows], expected):
                        return f"{name}: tokens/{column} of window {window} are not those of its text"
            tick(len(numbers))
    return None


def with_models(
    path: Path,
    count: int,
    not_checked: list[str],
    *,
    seed: int,
    model: Sequence[str],
    allowed: spec.Allowed,
    device: str,
    device_map: str | None,
) -> dict[str, Any]:
    """What a store's models say of it: its tokens against its text, and rows where batches of them are asked for.

    Args:
        path: A complete store, whose checksums are right.
        count: Batches of each model; 0 to compare tokens alone.
        not_checked: What nothing could be compared with so far.
        seed: Which batches.
        model: ``NAME=REF`` values that take the place of the references on record.
        allowed: As of :func:`reextract`.
        device: Where to run.
        device_map: As typed.

    Returns:
        ``tokenized``, ``damage`` and ``not_checked``, and ``reextract`` where rows were compared.

    Raises:
        FeatstoreError: As :func:`check_tokens` and :func:`reextract`.
    """
    places = parse_device_map(device_map)
    found = check_tokens(open_store(path), model, allowed)
    result: dict[str, Any] = found | {"not_checked": [*not_checked, *found["not_checked"]]}
    if count and not result["damage"]:
        again = reextract(path, count, seed=seed, model=model, allowed=allowed, device=device, device_map=places)
        result["damage"] = again.pop("damage")
        result["reextract"] = again
    return result


# Rows ---------------------------------------------------------------------------------------------------------------


def reextract(
    path: Path,
    count: int,
    *,
    seed: int = 0,
    model: Sequence[str] = (),
    allowed: spec.Allowed = spec.NOTHING,
    device: str = "auto",
    device_map: DeviceMap | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run planned batches through the models again and compare every row of them with the store.

    Args:
        path: A complete store.
        count: Batches of each model, evenly spread.
        seed: Which ones; the same seed gives the same batches.
        model: ``NAME=REF`` values that take the place of the references on record.
        allowed: Whether models are loaded that the store names and the user has not, and pickled weights read.
        device: Where to run.
        device_map: Where the modules of models go, instead of one device.
        quiet: No progress.

    Returns:
        ``seed``; ``models``: for each the ``batches`` and ``rows`` compared, ``device``, ``dtype``,
        ``same_environment`` (kind of device and libraries are those on record, so equal bits are to be expected), and
        by layer the number of ``identical`` rows, ``median`` and ``max`` relative error, the largest ``tolerance`` and
        how many rows are ``beyond`` theirs; ``damage`` in words.

    Raises:
        SpecError: A name that is not in the store, or an unknown device.
        StrangeReferenceError: The store names a model that the user has not named.
        StoreStateError: The store holds moments without rows.
        ModelLoadError: A model cannot be loaded.
    """
    store = open_store(path)
    if count < 1:
        raise SpecError(f"--reextract {count}: give the number of batches, at least 1")
    for name in store.models:
        if not all(has_rows(store, name, layer) for layer in store.model(name).layers):
            raise StoreStateError(f"{path} holds moments of {name!r} and no rows to compare; leave --reextract out")
    references = references_of(store, model, allowed, quiet=quiet)
    asked = Settings(
        store=path,
        model=tuple(references.values()),
        device=device,
        device_map=device_map,
        yes=allowed.references,
        allow_pickle_weights=allowed.pickles,
        given=frozenset({"model"}),
    )
    job = prepare(asked, quiet=True, typed=False)
    result: dict[str, Any] = {"seed": seed, "models": {}, "damage": []}
    for name in store.models:
        found, damage = _reextract_model(store, job, name, count, seed, quiet=quiet)
        result["models"][name] = found
        result["damage"] += damage
    return result


def describe_reextract(result: dict[str, Any]) -> str:
    """The comparison as lines for people.

    Args:
        result: From :func:`reextract`.
    """
    lines = []
    for name, found in result["models"].items():
        if not found:
            continue
        same = "as on record, equal bits expected" if found["same_environment"] else "not those on record"
        lines.append(
            f"{name}: {found['rows']} rows in {found['batches']} batches computed again in "
            f"{found['dtype']} on {found['device']} (device and libraries {same})"
        )
        for layer, of in found["layers"].items():
            lines.append(
                f"  layer {layer:>3}: {of['identical']} of {of['rows']} rows bit-identical, relative error median "
                f"{of['median']:.2g}, max {of['max']:.2g} (tolerance up to {of['tolerance']:.2g}), "
                f"{of['beyond']} beyond"
            )
    return "\n".join(lines)


def planned_batches(plan: Plan, name: str, count: int, seed: int) -> list[NDArray[np.int64]]:
    """Batches of the plan, one of each of ``count`` equal stretches of the store.

    Args:
        plan: As the rows were computed by.
        name: Model.
        count: How many; all where there are fewer.
        seed: Where in its stretch each lies.
    """
    batches = [batch for first, end in plan.groups(name) for batch in plan.batches(name, first, end)]
    count = min(count, len(batches))
    shift = np.random.default_rng(seed).random()
    return [batches[int((i + shift) * len(batches) / count)] for i in range(count)]


def rounding_bound(
    form: Format,
    size: NDArray[np.float64],
    width: int,
    row_scale: NDArray[np.float32] | None,
    column_scale: NDArray[np.float32] | None,
) -> NDArray[np.float64]:
    """How far rounding to a format can move a row, relative to its norm.

    Half a step an element: a share of the element for floats (and half the smallest step near zero), for ``int8`` the
    same length in a whole column.

    Args:
        form: Element format.
        size: float64 ``(m,)``, norms of the stored rows, positive.
        width: Hidden width.
        row_scale: float32 ``(m,)`` for formats that have them.
        column_scale: float32 ``(width,)`` for formats that have them.

    Returns:
        float64 ``(m,)``.
    """
    scale = np.zeros(len(size)) if row_scale is None else row_scale.astype(np.float64)
    if form.name == "int8":
        columns = 1.0 if column_scale is None else float(np.linalg.norm(column_scale.astype(np.float64)))
        return 0.5 * scale * columns / size
    share, least = {
        "float32": (2.0**-24, 0.0),
        "float16": (2.0**-11, 2.0**-25),
        "bfloat16": (2.0**-8, 0.0),
        "fp8": (2.0**-4, 2.0**-10),
    }[form.name]
    step = least * (scale if form.row_scaled else 1.0)
    return np.asarray(share + step * width**0.5 / size, dtype=np.float64) * np.ones(len(size))


def _links(store: Store) -> Iterator[dict[str, Any]]:
    """What a converted store was before, latest first."""
    link = store.attributes.get("converted_from")
    while link is not None:
        yield link
        link = link["converted_from"]


def _original_plan(store: Store, plan: Plan, name: str) -> Plan:
    """Batches were formed within the shards that the extraction wrote, whatever a conversion made of them."""
    lengths = [link["models"][name]["shard_rows"] for link in _links(store) if name in link["models"]]
    return replace(plan, shard_rows=int([store.model(name).attributes["shard_rows"], *lengths][-1]))


def _reextract_model(
    store: Store, job: Job, name: str, count: int, seed: int, *, quiet: bool
) -> tuple[dict[str, Any], list[str]]:
    attributes, layers = store.model(name).attributes, store.model(name).layers
    device, dtype = job.compute.placement(name).device, str(attributes["compute_dtype"])
    info = job.infos[name]
    if info.config_hash != attributes["config_sha256"]:
        return {}, [f"{name}: {info.spec.ref} is not the model of this store (its configuration differs)"]
    plan = _original_plan(store, job.plan, name)
    batches = planned_batches(plan, name, count, seed)
    if not quiet:
        err.print(f"loading {name} ({info.spec.ref}){info.peculiarities}")
    compute = replace(job.compute, dtype=dtype, attention={name: attention_of(attributes, store.path, name)})
    stream = tested(info, compute, name, device=compute.device).stream
    # This is a check: hashes that were kept are made again.
    weights = weights_of(info.spec, stream.model, fresh=True, quiet=quiet)
    if recorded_weights(StoreWriter(store.directory), name, layers).differ(weights):
        return {}, [f"{name}: {info.spec.ref} has other weights than the model that this store was made with"]
    reader = BatchReader(stream, plan, name, weights)
    chain = sum(_ROUNDING[link["models"][name]["format"]] for link in _links(store) if name in link["models"])
    compared: dict[int, list[_Rows]] = {layer: [] for layer in layers}
    with progress(f"extract {name} again", sum(map(reader.tokens_in, batches)), "tok", quiet=quiet) as tick:
        for batch in batches:
            _compare_batch(store, reader, batch, compared, chain + COMPUTE_TOLERANCE[dtype], tick)
    here = {key: value for key, value in versions().items() if key in _SAME}
    recorded = {key: attributes["versions"].get(key) for key in _SAME}
    found = {
        "batches": len(batches),
        "rows": sum(map(reader.tokens_in, batches)),
        "device": device.type,
        "dtype": dtype,
        "same_environment": device.type == attributes["device_type"] and here == recorded,
        "layers": {str(layer): _figures(parts) for layer, parts in compared.items()},
    }
    damage = [_worst(name, layer, parts) for layer, parts in compared.items() if any(p.beyond.any() for p in parts)]
    return found, damage


@dataclass(frozen=True)
class _Rows:
    """Rows of one batch and layer, stored against fresh.

    Attributes:
        number: int64 ``(m,)``, row numbers.
        error: float64 ``(m,)``, norm of the difference over the stored norm.
        tolerance: float64 ``(m,)``.
        identical: bool ``(m,)``, every stored bit is the same.
    """

    number: NDArray[np.int64]
    error: NDArray[np.float64]
    tolerance: NDArray[np.float64]
    identical: NDArray[np.bool_]

    @property
    def beyond(self) -> NDArray[np.bool_]:
        """Which rows differ by more than they may; one that is not a number is one of them."""
        return ~(self.error <= self.tolerance)


def _compare_batch(
    store: Store,
    reader: BatchReader,
    batch: NDArray[np.int64],
    compared: dict[int, list[_Rows]],
    allowed: float,
    tick: Tick,
) -> None:
    """Compute a batch again and append the comparison of every layer."""
    starts = reader.planned.row_start
    number = np.concatenate([np.arange(starts[w], starts[w + 1]) for w in batch])
    pilot = read_pilot(StoreWriter(store.directory), reader.name, list(compared))
    scales = {} if pilot is None else pilot.column_scale
    for layer, states in reader.states(batch, list(compared)).items():
        rows = store.rows(reader.name, layer)
        plain, at = (rows.table, rows.index[number]) if isinstance(rows, TableReader) else (rows, number)
        column_scale, row_scale = scales.get(layer), plain.row_scale(at)
        on_device = None if column_scale is None else torch.from_numpy(column_scale.copy()).to(states.device)
        tensors = [tensor.cpu() for tensor in pack(states, rows.form, on_device).tensors()]
        fresh = unpacked(rows.form, tensors, reader.where(batch, layer))
        identical = (plain.stored(at) == fresh.stored).all(axis=1)
        if row_scale is not None:
            identical &= row_scale == fresh.row_scale
        held = rows[number].astype(np.float64)
        size = np.maximum(np.linalg.norm(held, axis=1), np.finfo(np.float32).tiny)
        error = np.linalg.norm(states.double().cpu().numpy() - held, axis=1) / size
        rounding = rounding_bound(rows.form, size, rows.width, row_scale, column_scale)
        compared[layer].append(_Rows(number, error, rounding + allowed, identical))
    tick(len(number))


def _figures(parts: Sequence[_Rows]) -> dict[str, Any]:
    error = np.concatenate([p.error for p in parts])
    return {
        "rows": len(error),
        "identical": int(sum(p.identical.sum() for p in parts)),
        "median": float(np.median(error)),
        "max": float(error.max()),
        "tolerance": float(max(p.tolerance.max() for p in parts)),
        "beyond": int(sum(p.beyond.sum() for p in parts)),
    }


def _worst(name: str, layer: int, parts: Sequence[_Rows]) -> str:
    count = int(sum(p.beyond.sum() for p in parts))
    excess, row, error, tolerance = max(
        (float(np.nan_to_num(p.error[i], nan=np.inf) / p.tolerance[i]), int(p.number[i]), p.error[i], p.tolerance[i])
        for p in parts
        for i in np.flatnonzero(p.beyond)
    )
    return (
        f"{name}: layer {layer}, row {row} is {error:.3g} of its norm away from what the model gives "
        f"(tolerance {tolerance:.2g}, {excess:.0f} x; {count} such rows)"
    )
