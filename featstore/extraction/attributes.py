"""What a store says about itself: the attributes of its root and of its models."""

from __future__ import annotations

from typing import Any

import numpy as np

from featstore.extraction.job import Job
from featstore.runtime.provenance import digest, versions
from featstore.store.format.version import FORMAT_VERSION
from featstore.text import tokens
from featstore.text.chat import DATE
from featstore.text.message_arrays import holds_conversations
from featstore.text.splits import SPLITS

SITE_CONVENTION = "layer k = residual stream after k blocks; 0 = embedding output; L = before the final norm"


def root_attributes(job: Job) -> dict[str, Any]:
    """Attributes of the root of a store that is not complete yet.

    Args:
        job: What is being done.
    """
    plan = job.plan
    recorded = job.recorded
    named = recorded.root["models"] if recorded else []
    # A model without states that this command leaves out is one that an earlier command failed to read.
    held = [name for name in named if name in job.infos or (recorded and recorded.begun(name))]
    counts = np.bincount(plan.corpus.document_split, minlength=3)
    attributes = {
        "format_version": FORMAT_VERSION,
        "complete": False,
        "models": [*held, *(name for name in job.infos if name not in held)],
        "corpus": {
            **plan.settings,
            **_form(job),
            "sha256": plan.corpus.hash,
            "documents": len(plan.corpus.document_id),
            "windows": len(plan.corpus.window_document),
            "bytes": len(plan.corpus.text),
        },
        "window_bytes": plan.window_bytes,
        "segments": list(plan.segments),
        "split": {
            "rule": "u = first 8 bytes of the document's SHA-256 / 2^64; test u < 0.1, validation u < 0.2",
            "documents": dict(zip(SPLITS, counts.tolist(), strict=True)),
        },
        "moments": job.moments != "none",
        "mask": {"sink_threshold": job.sink_threshold},
        "site_convention": SITE_CONVENTION,
        "plan": plan.hash,
    }
    for past in ("converted_from", "rebuilt"):
        if job.recorded and past in job.recorded.root:
            # What was done to the rows and tables that were there is not undone by adding others.
            attributes[past] = job.recorded.root[past]
    return attributes


def _form(job: Job) -> dict[str, str]:
    """Whether the documents are text or messages, and then which day their templates were told."""
    if not holds_conversations(job.plan.corpus):
        return {"form": "text"}
    return {"form": "messages", "date": job.recorded.date if job.recorded else DATE}


def model_attributes(job: Job, name: str) -> dict[str, Any]:
    """Attributes of a model's group.

    What was recorded stays where a layer is added: versions and device are then told of the addition.

    Args:
        job: What is being done.
        name: Model.
    """
    values = {
        **job.infos[name].describe(),
        "rows": job.plan.models[name].rows,
        "tokens_sha256": job.plan.models[name].hash,
        "byte_ends": tokens.ends_from(job.infos[name].tokenizer),
        "layers": list(job.layers[name]),
        "states": "moments" if job.moments == "only" else "rows",
        "layer_0": "table" if job.table else "stored",
        **job.encoding.to_dict(),
        "batch_tokens": job.plan.batch_tokens,
        "compute_dtype": str(job.compute.dtype_of(name)).removeprefix("torch."),
        "device_type": job.compute.placement(name).device.type,
        "attention": job.compute.attention[name],
        "site_convention": SITE_CONVENTION,
        "versions": versions(),
    }
    if holds_conversations(job.plan.corpus):
        values["chat_template_sha256"] = digest(job.infos[name].tokenizer.chat_template)
    if name in job.verdicts:
        values["verified"] = job.verdicts[name].content()
    held = job.recorded.models.get(name, {}) if job.recorded else {}
    added = [k for k in job.layers[name] if k not in held.get("layers", job.layers[name])]
    if held and job.recorded and job.recorded.complete and added:
        here = {"layers": added, "versions": values["versions"], "device_type": values["device_type"]}
        values |= {key: held[key] for key in ("versions", "device_type")}
        values["additions"] = [*held.get("additions", []), here]
    elif "additions" in held:
        values |= {key: held[key] for key in ("versions", "device_type", "additions")}
    return values


def is_done(job: Job) -> bool:
    """Whether the store has all that the job asks for.

    Args:
        job: What is asked for, and what was recorded.
    """
    recorded = job.recorded
    return bool(
        recorded
        and recorded.complete
        and recorded.root["plan"] == job.plan.hash
        and (recorded.root.get("moments") or job.moments == "none")
        and all(list(job.layers[n]) == recorded.models.get(n, {}).get("layers") for n in job.infos)
    )
