"""What an extraction would cost: bytes, seconds from a measured probe, free space. Writes nothing."""

from __future__ import annotations

import time
from typing import Any

from featstore.extraction.forward import BatchReader
from featstore.extraction.job import Job
from featstore.extraction.proof import tested
from featstore.models import loading as models
from featstore.runtime.console import human, human_bytes, human_seconds
from featstore.store.write.space import free_bytes


def dry_run(job: Job) -> dict[str, Any]:
    """Sizes, free space and the time measured on a few batches.

    Args:
        job: From :func:`prepare`.

    Returns:
        Sizes in bytes and times in seconds; times are None for models whose weights are not on this disk. ``remedy``
        names the flag that would make it fit, None where it fits.
    """
    result: dict[str, Any] = {"store": str(job.store), "models": {}}
    for name, info in job.infos.items():
        weights = models.weight_bytes(info.spec)
        layers = job.row_layers(name)
        result["models"][name] = {
            "tokens": job.plan.models[name].rows,
            "layers": list(job.layers[name]),
            "bytes_per_layer": job.layer_bytes(name),
            "table_bytes": job.table_bytes(name),
            "bytes": job.layer_bytes(name) * len(layers) + job.table_bytes(name),
            "weights_on_disk": weights is not None,
            "seconds": None if weights is None else _probe_seconds(job, name),
        }
    result["normalise"] = job.plan.settings["normalise"]
    result["generate"] = _still_to_generate(job)
    result["moment_bytes"] = job.moment_bytes()
    result["bytes"] = job.state_bytes() + job.moment_bytes()
    result["bytes_to_write"] = job.bytes_to_write()
    result["free_bytes"] = free_bytes(job.store)
    more = result["generate"]["bytes_at_most"] if result["generate"] else 0
    result["fits"] = result["bytes_to_write"] + more <= result["free_bytes"]
    result["remedy"] = None if result["fits"] else job.space_remedy()
    return result


def _still_to_generate(job: Job) -> dict[str, Any] | None:
    """What would be generated first, and what reading it would add; None where no text is generated."""
    how = job.plan.settings.get("generate")
    if how is None:
        return None
    new = job.unanswered * int(how["tokens"])
    size = 0.0
    for name in job.infos:
        rows = job.plan.models[name].rows
        room = new if job.plan.settings["max_tokens"] is None else job.plan.settings["max_tokens"] - rows
        size += job.layer_bytes(name) * len(job.row_layers(name)) * min(new, max(room, 0)) / rows
    return {**how, "documents": job.unanswered, "bytes_at_most": int(size)}


def _probe_seconds(job: Job, name: str) -> float:
    stream = tested(job.infos[name], job.compute, name, device=job.compute.device).stream
    reader = BatchReader(stream, job.plan, name)
    batches = job.plan.batches(name, *next(job.plan.groups(name)))
    # The longest batch once to warm up, then a typical one.
    reader.states(batches[0], job.layers[name])
    batch = batches[len(batches) // 2]
    start = time.perf_counter()
    for states in reader.states(batch, job.layers[name]).values():
        states[:1].float().cpu()  # waits for the device
    rate = reader.tokens_in(batch) / (time.perf_counter() - start)
    return job.plan.models[name].rows / rate


def describe(result: dict[str, Any]) -> str:
    """The estimate for people.

    Args:
        result: From :func:`dry_run`.
    """
    lines = []
    for name, model in result["models"].items():
        time = "time unknown until its weights are on this disk"
        if model["seconds"] is not None:
            time = f"about {human_seconds(model['seconds'])} here"
        table = f", layer 0 as a table of {human_bytes(model['table_bytes'])}" if model["table_bytes"] else ""
        lines.append(
            f"{name}: {human(model['tokens'])} tokens x {len(model['layers'])} layers = {human_bytes(model['bytes'])} "
            f"({human_bytes(model['bytes_per_layer'])} a layer of rows{table}), {time}"
        )
    if result["normalise"] == "nfc":
        lines.append("the text is read in the Unicode form NFC (--normalise none would leave it as it is)")
    how = result["generate"]
    if how and how["documents"]:
        lines.append(
            f"first {' and '.join(how['with'])} would write up to {how['tokens']} tokens after each prompt, for "
            f"{human(how['documents'])} documents in all; reading what they write adds at most "
            f"{human_bytes(how['bytes_at_most'])}"
        )
    if result["moment_bytes"]:
        lines.append(f"moments (and norms, where there are no rows): {human_bytes(result['moment_bytes'])}")
    verdict = "fits" if result["fits"] else f"does not fit: {result['remedy']}"
    lines.append(f"in all {human_bytes(result['bytes'])}; {human_bytes(result['free_bytes'])} are free: {verdict}")
    return "\n".join(lines)
