"""Carry out a job: open the store, let every model read the plan, derive what follows, seal.

What is missing follows from the manifest alone: a second run of the same command, a layer or model added later, more
documents, and several processes are all the same walk over the planned batches that touch a missing shard.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from typing import Any

from featstore.errors import SpecError, StoreStateError
from featstore.extraction.attributes import is_done, model_attributes, root_attributes
from featstore.extraction.job import Job
from featstore.extraction.moments_only import sum_moments
from featstore.extraction.pilot import recorded_weights
from featstore.extraction.recorded import read_recorded, refuse_contradictions
from featstore.extraction.rows import extract_rows, refuse_other_weights
from featstore.runtime.console import err
from featstore.runtime.processes import Ranks
from featstore.runtime.provenance import read_json
from featstore.store.inspect.summary import summary
from featstore.store.moments.writing import ASIDE, write_moments
from featstore.store.read.pairs import POLICIES
from featstore.store.write.index import pairs_unit, write_pairs, write_sinks
from featstore.store.write.row_writer import write_groups
from featstore.store.write.space import check_space
from featstore.store.write.writer import StoreWriter, exclusive
from featstore.text.message_arrays import holds_conversations
from featstore.text.plan import Plan

#: What conversations have beside their text.
_BESIDE = ("corpus/message/rest", "corpus/message/rest_start", "corpus/document/tools", "corpus/document/tools_start")


def extract(job: Job, *, quiet: bool = False, ranks: Ranks | None = None) -> dict[str, Any]:
    """Carry out a job: create the store, go on with it, or add to it, until it is complete.

    Args:
        job: From :func:`prepare`.
        quiet: No progress.
        ranks: This process among several; None reads what a launcher set.

    Returns:
        A summary: rows, pairs, coverage, bytes, seconds.

    Raises:
        StoreBusyError: Another process writes to the store.
        StoreStateError: The store was made by another plan.
        NoSpaceError: The disk cannot hold it.
        NonFiniteStateError: A model produced NaN or infinity.
    """
    start = time.perf_counter()
    ranks = ranks or Ranks.from_environment()
    path = job.store
    if job.compute.device_map is not None and ranks.world > 1:
        raise SpecError("--device-map spreads one process over all devices; start it without torchrun")
    if ranks.first:
        read_recorded(path)  # what is not a store stays as it is
        check_space(path, job.bytes_to_write(), job.space_remedy())
    with exclusive(path) if ranks.first else nullcontext():
        writer = StoreWriter(path)
        if ranks.first:
            job = replace(job, recorded=read_recorded(path))
            if not is_done(job):
                refuse_other_weights(writer, job, quiet=quiet)
            _begin(writer, job)
        ranks.wait()  # until the store is open
        if not ranks.first:
            job = replace(job, recorded=read_recorded(path))
        if is_done(job):
            if ranks.first and not quiet:
                err.print(f"{path} is already complete")
        else:
            if job.moments == "only":
                sum_moments(writer, job, ranks, quiet=quiet or not ranks.first)
            else:
                for name in job.infos:
                    extract_rows(writer, job, name, ranks, quiet=quiet or not ranks.first)
            ranks.wait()  # until everything is summed
            if ranks.first:
                _finish(writer, job, quiet=quiet)
        ranks.wait()  # until it is complete
    return summary(writer.view) | {"seconds": time.perf_counter() - start}


def _begin(writer: StoreWriter, job: Job) -> None:
    """Create the store or check that the job fits it.

    What is only added to a complete store stays out of its metadata until :func:`_finish`, so that it can be read
    meanwhile.
    """
    recorded = job.recorded
    root = root_attributes(job)
    attributes = {name: model_attributes(job, name) for name in job.infos}
    if recorded:
        refuse_contradictions(recorded, root, attributes)
        if is_done(job):
            return
        for name in recorded.root["models"]:
            # What an earlier command wished for, which nothing has come of; the same wish goes on where it stopped.
            if not recorded.begun(name) and recorded.models.get(name) != attributes.get(name):
                writer.drop(f"models/{name}/tokens")
                writer.remove(f"models/{name}")
    adding = bool(recorded and recorded.complete and recorded.root["plan"] == root["plan"])
    adding = adding and job.moments != "only"
    if not adding:
        writer.group("", {"featstore": root})
    for name, values in attributes.items():
        write_groups(writer, name, job.encoding.form)
        if not (adding and recorded and name in recorded.models):
            writer.group(f"models/{name}", {"featstore": values})
    if not adding:
        for group in ("models", "corpus", "corpus/document", "corpus/window", "corpus/message", "pairs"):
            writer.group(group, {})
    _write_plan(writer, job.plan)


def _write_plan(writer: StoreWriter, plan: Plan) -> None:
    text = plan.corpus
    beside: dict[str, Any] = {}
    if holds_conversations(text):
        arrays = (text.message_rest, text.message_rest_start, text.document_tools, text.document_tools_start)
        beside = dict(zip(_BESIDE, arrays, strict=True))
    if (writer.entry("corpus") or {}).get("sha256") != plan.hash:
        for name in () if beside else _BESIDE:
            writer.remove(name)  # of an earlier wish of which nothing has come
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
                "corpus/message/document": text.message_document,
                "corpus/message/role": text.message_role,
                "corpus/message/start": text.message_start,
                "corpus/message/end": text.message_end,
                **beside,
            },
            sha256=plan.hash,
        )
    for name, model in plan.models.items():
        unit = f"models/{name}/tokens"
        if (writer.entry(unit) or {}).get("sha256") != model.hash:
            columns = {f"{unit}/{key}": column for key, column in model.columns.items()}
            writer.vectors(unit, columns, sha256=model.hash)


def _finish(writer: StoreWriter, job: Job, *, quiet: bool) -> None:
    """Derive what follows from the rows, and seal."""
    root = root_attributes(job)
    # From here until it is sealed the store cannot be read: what is derived below belongs to the new attributes.
    writer.group("", {"featstore": root})
    for name in job.infos:
        weights = recorded_weights(writer, name, job.layers[name])
        writer.group(f"models/{name}", {"featstore": model_attributes(job, name) | weights.to_dict()})
    for name in root["models"]:
        _refuse_unfinished(writer, writer.view.model(name).attributes, name)
    for name in job.infos:
        write_sinks(writer, name)
    for first, second in combinations(root["models"], 2):
        for policy in POLICIES:
            # More documents lengthen every index that is there.
            if policy == "end" or writer.has(pairs_unit(first, second, policy)):
                write_pairs(writer, first, second, policy)
        if root["moments"]:
            write_moments(writer, first, second, memory=job.moments_memory, quiet=quiet)
    writer.remove(ASIDE)
    writer.seal({"featstore": root | {"complete": True}})


def _refuse_unfinished(writer: StoreWriter, attributes: dict[str, Any], name: str) -> None:
    for layer in attributes["layers"] if attributes["states"] == "rows" else ():
        document = writer.path / "models" / name / "resid" / str(layer) / "zarr.json"
        if layer == 0 and attributes["layer_0"] == "table":
            continue
        if not document.is_file() or read_json(document)["shape"][0] != attributes["rows"]:
            raise StoreStateError(
                f"{writer.path}: model {name!r} lacks rows of layer {layer}; run the command that adds it again, "
                "or `featstore extract` without --model"
            )
