"""Losses, divergences and shares of a stitched run from sums over documents, each with its interval.

Every figure is pooled over tokens, and its 95 % interval is that of a ratio of sums over documents
(:mod:`align.statistics`). Whether a map does better than a control is decided on the difference of their losses in
nats: the share (control - mapped) / (control - clean) has no sign where a control does no harm, and its interval is
Fieller's, or none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.statistics import Estimate, Linearised, quotient, ratio
from evaluate.stitching.scores import BYTES, DIVERGENCE, NATS, SAME, TOKENS

Sums = NDArray[np.float64]


def figures(table: Sums, mean: Sums | None = None) -> dict[str, Any]:
    """Figures of a condition.

    Args:
        table: float64 ``(documents, 5)``, from :meth:`evaluate.stitching.scores.Tally.table`.
        mean: The same of the mean control, over the same documents; None where nothing is compared with it.

    Returns:
        ``nats_per_token`` with its interval ``ci95``, ``perplexity``, ``bits_per_byte``, ``kl`` from the untouched
        predictions in nats per token, ``top1``, the share of tokens with the untouched first choice, and, with
        ``mean``, ``below_mean``, nats per token less than under the mean control; each with its own ``<name>_ci95``,
        None where the documents are too few. Bits per byte are None where the tokens span no byte.
    """
    loss = per_token(table).estimate()
    ends = _ends(loss)
    found: dict[str, Any] = {
        "nats_per_token": loss.value,
        "ci95": ends,
        "perplexity": perplexity(loss.value),
        "perplexity_ci95": ends and [perplexity(bound) for bound in ends],
        "bits_per_byte": None,
        "bits_per_byte_ci95": None,
    }
    if table[:, BYTES].any():
        bits = ratio(table[:, NATS] / np.log(2), table[:, BYTES]).estimate()
        found |= {"bits_per_byte": bits.value, "bits_per_byte_ci95": _ends(bits)}
    others = {name: per_token(table, column) for name, column in (("kl", DIVERGENCE), ("top1", SAME))}
    if mean is not None:
        others["below_mean"] = _less(mean, table)
    for name, figure in others.items():
        estimate = figure.estimate()
        found |= {name: estimate.value, f"{name}_ci95": _ends(estimate)}
    return found


def alone(table: Sums) -> dict[str, Any]:
    """Figures of a model by itself on its own tokens.

    Args:
        table: float64 ``(documents, 5)``.

    Returns:
        ``n_documents``, ``effective_documents``, ``n_tokens``, ``n_bytes``, ``nats_per_token`` with ``ci95``,
        ``perplexity``, ``bits_per_byte`` and their intervals.
    """
    block = figures(table)
    own = {name: block[name] for name in block if not name.startswith(("kl", "top1"))}
    return size(table) | {"n_bytes": int(table[:, BYTES].sum())} | own


def size(table: Sums) -> dict[str, Any]:
    """How much text stands behind figures: ``n_documents``, ``effective_documents`` and ``n_tokens``.

    Args:
        table: float64 ``(documents, 5)``.
    """
    counts = {"n_documents": len(table), "n_tokens": int(table[:, TOKENS].sum())}
    return counts | {"effective_documents": per_token(table).effective}


def per_token(table: Sums, column: int = NATS) -> Linearised:
    """A column of the sums for each scored token.

    Args:
        table: float64 ``(documents, 5)``.
        column: Of it.
    """
    return ratio(table[:, column], table[:, TOKENS])


def perplexity(nats: float) -> float:
    """exp(loss); infinity where that is no number of float64.

    Args:
        nats: Loss per token.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(nats))


def _less(control: Sums, mapped: Sums) -> Linearised:
    """What a control loses more than the map, nats per token: what makes a document hard for both cancels."""
    return ratio(control[:, NATS] - mapped[:, NATS], mapped[:, TOKENS])


def compared(
    tables: Mapping[str, Sums], controls: Collection[str], lacking: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Compare the mapped states with every control.

    Args:
        tables: By condition, float64 ``(documents, 5)`` over the same documents; ``clean`` and ``mapped``, and the
            controls that were run.
        controls: Those that a map has to beat.
        lacking: Why a control was not run, by name.

    Returns:
        ``controls``, ``beyond_token``, ``recovered_token``, ``recovered``, ``beats_every_control`` and
        ``closest_control`` of a layer pair in ``stitch.json``, and by name why one of them is None.
    """
    reasons: dict[str, str] = {}
    few = per_token(tables["mapped"]).estimate().reason
    if few is not None:
        reasons["ci95"] = few
    if not tables["mapped"][:, BYTES].any():
        reasons["bits_per_byte"] = "the scored tokens span no byte"
    known = [name for name in controls if name in tables]
    beyond = {name: _beyond(_less(tables[name], tables["mapped"]).estimate()) for name in known}
    entry: dict[str, Any] = {
        "controls": beyond,
        "closest_control": min(known, key=lambda name: beyond[name]["nats"], default=None),
    }
    absent = "the token's prediction was not injected"
    if "token" in known:
        entry["beyond_token"] = beyond["token"]
    else:
        entry["beyond_token"] = {"nats": None, "ci95": None, "p": None, "beaten": None}
        reasons["beyond_token"] = lacking.get("token", absent)
    for figure, name in (("recovered_token", "token"), ("recovered", "mean")):
        if name in tables:
            entry[figure] = _share(tables, name, figure, reasons)
        else:
            entry[figure] = {"value": None, "ci95": None}
            reasons[figure] = lacking.get(name, absent)
    entry["beats_every_control"] = _beats_all(beyond, [name for name in controls if name not in tables], few, reasons)
    return entry, reasons


def _beyond(estimate: Estimate) -> dict[str, Any]:
    beaten = None if estimate.interval is None else estimate.above
    return {"nats": estimate.value, "ci95": _ends(estimate), "p": estimate.p, "beaten": beaten}


def _share(tables: Mapping[str, Sums], control: str, figure: str, reasons: dict[str, str]) -> dict[str, Any]:
    """(control - mapped) / (control - clean) with Fieller's interval; reasons for what it lacks are added."""
    estimate = quotient(_less(tables[control], tables["mapped"]), _less(tables[control], tables["clean"]))
    if not np.isfinite(estimate.value):
        reasons[figure] = f"the {control} control does no harm, so there is nothing to recover"
        return {"value": None, "ci95": None}
    if estimate.interval is None and "ci95" not in reasons:
        # A share of next to nothing looks like any other share.
        reasons[figure] = (
            f"the loss under the {control} control is not clearly above the clean one, and any share may be the true "
            "one; read the nats"
        )
        return {"value": None, "ci95": None}
    if estimate.interval is None:
        reasons[f"{figure}.ci95"] = reasons["ci95"]
    return {"value": estimate.value, "ci95": _ends(estimate)}


def _beats_all(
    beyond: Mapping[str, Mapping[str, Any]], missing: list[str], few: str | None, reasons: dict[str, str]
) -> bool | None:
    """Intersection-union: each control is beaten by a test of its own, and no correction is needed (Berger 1982)."""
    if any(block["beaten"] is False for block in beyond.values()):
        return False
    if few is not None:
        reasons["beats_every_control"] = few
        return None
    if missing:
        reasons["beats_every_control"] = f"not compared with {', '.join(missing)}"
        return None
    return True


def _ends(estimate: Estimate) -> list[float] | None:
    return None if estimate.interval is None else list(estimate.interval)
