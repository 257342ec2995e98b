"""Run the plan: models in, committed shards out.

One model is loaded at a time. Every group of neighbouring windows is read in batches of similar length; rows go back in
document order; whole shards are committed as soon as they are complete. A second run of the same command re-computes
exactly the planned batches that touch a missing shard, so it ends with the same bytes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore import corpus, formats, models, sites
from featstore.console import Tick, err, progress
from featstore.errors import StoreFormatError, StoreStateError
from featstore.forward import BatchReader, check_finite, to_storage
from featstore.index import sink_mask, write_pairs
from featstore.job import Job
from featstore.plan import Plan
from featstore.provenance import read_json, versions
from featstore.store import open_store
from featstore.summary import summary
from featstore.writer import (
    FORMAT_VERSION,
    RowWriter,
    StoreWriter,
    check_space,
    exclusive,
    free_bytes,
)

#: The pilot freezes medians and origins; more tokens would not move them.
_PILOT_TOKENS = 4096

SITE_CONVENTION = "layer k = residual stream after k blocks; 0 = embedding output; L = before the final norm"


def dry_run(job: Job) -> dict[str, Any]:
    """Sizes, free space and the time measured on a few batches. Writes nothing.

    Args:
        job: From :func:`prepare`.

    Returns:
        Sizes in bytes and times in seconds; times are None for models whose weights are not on this disk.
    """
    result: dict[str, Any] = {"store": str(job.settings.store), "models": {}}
    itemsize = formats.parse_format(job.settings.form).storage.itemsize
    for name, info in job.infos.items():
        planned = job.plan.models[name]
        weights = models.weight_bytes(info.spec)
        result["models"][name] = {
            "tokens": planned.rows,
            "layers": list(job.layers[name]),
            "bytes_per_layer": planned.rows * (info.width * itemsize + 4),
            "bytes": planned.rows * (info.width * itemsize + 4) * len(job.layers[name]),
            "weights_on_disk": weights is not None,
            "seconds": None if weights is None else _probe_seconds(job, name),
        }
    result["bytes"] = job.state_bytes()
    result["free_bytes"] = free_bytes(job.settings.store)
    result["fits"] = result["bytes"] <= result["free_bytes"]
    return result


def _probe_seconds(job: Job, name: str) -> float:
    settings = job.settings
    model = models.load_model(
        job.infos[name].spec,
        device=settings.device,
        dtype=settings.dtype,
        attention=settings.attention,
    )
    reader = BatchReader(sites.residual_stream(model), job.plan, name, job.layers[name])
    batches = job.plan.batches(name, *next(job.plan.groups(name)))
    # The longest batch once to warm up, then a typical one.
    reader.states(batches[0])
    batch = batches[len(batches) // 2]
    start = time.perf_counter()
    reader.states(batch)
    rate = reader.tokens_in(batch) / (time.perf_counter() - start)
    return job.plan.models[name].rows / rate


def extract(job: Job, *, quiet: bool = False) -> dict[str, Any]:
    """Carry out a job: create the store, or go on with it, until it is complete.

    Args:
        job: From :func:`prepare`.
        quiet: No progress.

    Returns:
        A summary: rows, pairs, coverage, bytes, seconds.

    Raises:
        StoreBusyError: Another process writes to the store.
        StoreStateError: The store was made by another plan.
        NoSpaceError: The disk cannot hold it.
        NonFiniteStateError: A model produced NaN or infinity.
    """
    start = time.perf_counter()
    settings = job.settings
    _refuse_foreign(settings.store)
    per_token = job.state_bytes() / max(1, *(m.rows for m in job.plan.models.values()))
    fit = int(free_bytes(settings.store) / per_token * 0.95)
    check_space(
        settings.store,
        _bytes_to_write(job),
        f"--max-tokens {fit} would fit, or fewer --layers, or another disk with --store",
    )
    with exclusive(settings.store):
        writer = StoreWriter(settings.store)
        attributes = _root_attributes(job)
        if _begin(writer, job, attributes):
            for name in job.infos:
                _extract_model(writer, job, name, quiet=quiet)
            _finish(writer, job, attributes)
        elif not quiet:
            err.print(f"{settings.store} is already complete")
    return summary(open_store(settings.store)) | {"seconds": time.perf_counter() - start}


def _bytes_to_write(job: Job) -> int:
    """Bytes of the states that an earlier run has not committed yet, uncompressed."""
    size = formats.parse_format(job.settings.form).storage.itemsize
    total = 0
    for name, info in job.infos.items():
        for layer in job.layers[name]:
            document = job.settings.store / "models" / name / "resid" / str(layer) / "zarr.json"
            shape = read_json(document).get("shape") if document.is_file() else None
            done = shape[0] if isinstance(shape, list) and shape and isinstance(shape[0], int) else 0
            total += max(job.plan.models[name].rows - done, 0) * (info.width * size + 4)
    return total


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise StoreFormatError(f"--store {path} is a file; choose another path")
    if path.is_dir() and not (path / "zarr.json").exists():
        strangers = [p.name for p in path.iterdir() if not p.name.startswith(".")]
        if strangers and strangers != ["manifest"]:
            raise StoreFormatError(f"--store {path} exists and is not a feature store; choose another path")


def _root_attributes(job: Job) -> dict[str, Any]:
    plan = job.plan
    counts = np.bincount(plan.corpus.document_split, minlength=3)
    return {
        "format_version": FORMAT_VERSION,
        "complete": False,
        "models": list(job.infos),
        "corpus": {
            **plan.settings,
            "sha256": plan.corpus.hash,
            "documents": len(plan.corpus.document_id),
            "windows": len(plan.corpus.window_document),
            "bytes": len(plan.corpus.text),
        },
        "window_bytes": plan.window_bytes,
        "split": {
            "rule": "u = first 8 bytes of the document's SHA-256 / 2^64; test u < 0.1, validation u < 0.2",
            "documents": dict(zip(corpus.SPLITS, counts.tolist(), strict=True)),
        },
        "mask": {"sink_threshold": job.settings.sink_threshold},
        "site_convention": SITE_CONVENTION,
        "plan": plan.hash,
    }


def _model_attributes(job: Job, name: str) -> dict[str, Any]:
    settings = job.settings
    device = models.resolve_device(settings.device)
    return {
        **job.infos[name].describe(),
        "rows": job.plan.models[name].rows,
        "layers": list(job.layers[name]),
        "format": settings.form,
        "layout": settings.layout,
        "shard_rows": settings.shard_rows,
        "batch_tokens": settings.batch_tokens,
        "compute_dtype": str(models.resolve_dtype(settings.dtype, device)).removeprefix("torch."),
        "device_type": device.type,
        "attention": settings.attention,
        "site_convention": SITE_CONVENTION,
        "versions": versions(),
    }


def _begin(writer: StoreWriter, job: Job, attributes: dict[str, Any]) -> bool:
    """Create the store or check that it is this job's; False if it is complete."""
    existing = writer.attributes()
    wanted = {name: _model_attributes(job, name) for name in job.infos}
    if existing is not None:
        own = existing.get("featstore", {})
        changed = [key for key in attributes if key != "complete" and own.get(key) != attributes[key]]
        for name, values in wanted.items():
            stored = (writer.attributes(f"models/{name}") or {}).get("featstore", values)
            changed += [f"{name}.{key}" for key in values if stored.get(key) != values[key]]
        if changed:
            raise StoreStateError(
                f"{writer.path} was made with other settings ({', '.join(changed)}); "
                "use the same command, or choose another --store"
            )
        if own.get("complete"):
            return False
    writer.group("", {"featstore": attributes})
    for name, values in wanted.items():
        for group in ("tokens", "resid", "norm", "origin"):
            writer.group(f"models/{name}/{group}", {})
        writer.group(f"models/{name}", {"featstore": values})
    for group in ("models", "corpus", "corpus/document", "corpus/window", "pairs"):
        writer.group(group, {})
    _write_plan(writer, job.plan)
    return True


def _write_plan(writer: StoreWriter, plan: Plan) -> None:
    text = plan.corpus
    if not writer.has("corpus"):
        writer.vectors(
            "corpus",
            {
                "corpus/text": text.text,
                "corpus/document/start": text.document_start,
                "corpus/document/id": text.document_id,
                "corpus/document/split": text.document_split,
                "corpus/window/document": text.window_document,
                "corpus/window/start": text.window_start,
                "corpus/window/end": text.window_end,
            },
        )
    for name, model in plan.models.items():
        unit = f"models/{name}/tokens"
        if not writer.has(unit):
            window = np.repeat(np.arange(len(model.row_start) - 1, dtype=np.int32), np.diff(model.row_start))
            writer.vectors(
                unit,
                {
                    f"{unit}/id": model.ids,
                    f"{unit}/byte_end": model.byte_end,
                    f"{unit}/window": window,
                    f"{unit}/special": model.special,
                },
            )


def _extract_model(writer: StoreWriter, job: Job, name: str, *, quiet: bool) -> None:
    settings, plan = job.settings, job.plan
    rows = RowWriter(
        writer,
        name,
        rows=plan.models[name].rows,
        width=job.infos[name].width,
        layers=job.layers[name],
        shard_rows=settings.shard_rows,
        form=formats.parse_format(settings.form),
        layout=formats.parse_layout(settings.layout),
    )
    pilot = f"models/{name}/pilot"
    if len(rows.done) == rows.shards and writer.has(pilot):
        return
    if not quiet:
        err.print(f"loading {name} ({job.infos[name].spec.ref})")
    model = models.load_model(
        job.infos[name].spec,
        device=settings.device,
        dtype=settings.dtype,
        attention=settings.attention,
    )
    reader = BatchReader(sites.residual_stream(model), plan, name, job.layers[name])
    if not writer.has(pilot):
        _write_pilot(writer, reader, name)
    with progress(f"extract {name}", plan.models[name].rows, "tok", quiet=quiet) as tick:
        for first, end in plan.groups(name):
            _extract_group(reader, rows, first, end, tick)


def _extract_group(reader: BatchReader, rows: RowWriter, first: int, end: int, tick: Tick) -> None:
    starts = reader.planned.row_start
    for batch in reader.plan.batches(reader.name, first, end):
        if any(rows.wanted(int(starts[w]), int(starts[w + 1])) for w in batch):
            for layer, values in reader.states(batch).items():
                stored, norms = to_storage(values, rows.form, reader.where(batch, layer))
                at = 0
                for w in batch:
                    count = int(starts[w + 1] - starts[w])
                    rows.put(int(starts[w]), layer, stored[at : at + count], norms[at : at + count])
                    at += count
        tick(reader.tokens_in(batch))
    rows.advance(int(starts[end]))


def _write_pilot(writer: StoreWriter, reader: BatchReader, name: str) -> None:
    """Freeze each layer's median norm and mean state from the plan's first windows."""
    starts = reader.planned.row_start
    end = max(int(np.searchsorted(starts, min(_PILOT_TOKENS, starts[-1] // 4), side="right")) - 1, 1)
    parts: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in reader.layers}
    for batch in reader.plan.batches(name, 0, end):
        for layer, values in reader.states(batch).items():
            check_finite(values.float().norm(dim=-1), reader.where(batch, layer))
            parts[layer].append(values.float().cpu().numpy())
    origins, medians = {}, []
    for layer in reader.layers:
        rows = np.concatenate(parts[layer])
        norms = np.linalg.norm(rows, axis=1)
        medians.append(float(np.median(norms)))
        # Sinks would drag the mean far away from where the other rows are.
        ordinary = norms <= 5 * np.median(norms)
        origins[f"models/{name}/origin/{layer}"] = rows[ordinary].mean(axis=0, dtype=np.float64).astype(np.float32)
    arrays = {**origins, f"models/{name}/tokens/median_norm": np.array(medians, dtype=np.float64)}
    writer.vectors(f"models/{name}/pilot", arrays)


def _finish(writer: StoreWriter, job: Job, attributes: dict[str, Any]) -> None:
    store = open_store(writer.path, allow_incomplete=True)
    for name in job.infos:
        unit = f"models/{name}/sinks"
        if not writer.has(unit):
            writer.vectors(
                unit,
                {f"models/{name}/tokens/sink": sink_mask(store, name, job.settings.sink_threshold)},
            )
    names = list(job.infos)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            write_pairs(writer, open_store(writer.path, allow_incomplete=True), first, second, "end")
    writer.seal({"featstore": {**attributes, "complete": True}})
