"""Run directories of many layer pairs, written without a model: what a scan of all layers of deep models leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.report_fixtures import PAIR, adapter, block, metrics, stitch

#: Layers of the source; pairs beyond the square of these have deeper targets.
WIDE = 100


def write_run(directory: Path, pairs: int, *, stitched: bool = False, documents: int = 20, seed: int = 0) -> Path:
    """A finished run with the figures of a whole table of layer pairs.

    Args:
        directory: Where; created.
        pairs: How many layer pairs it has.
        stitched: Whether its losses were measured as well.
        documents: Test documents behind every figure.
        seed: Of the figures.
    """
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    keys = [f"smol:{i % WIDE}->twin:{i // WIDE}" for i in range(pairs)]
    card, scored = adapter(), metrics()
    for name, depth in (("smol", WIDE), ("twin", -(-pairs // WIDE))):
        norms = {str(layer): 1.0 for layer in range(depth + 1)}
        card["models"][name] |= {"depth": depth, "layers": list(range(depth + 1)), "median_norm": norms}
    [entry] = card["pairs"]
    card["pairs"] = [
        {**entry, "key": key, "source": {**entry["source"], "layer": i % WIDE},
         "target": {**entry["target"], "layer": i // WIDE}}
        for i, key in enumerate(keys)
    ]  # fmt: skip
    losses: dict[str, Any] = stitch()
    sums: dict[str, Any] = {}
    one, lost = scored["pairs"][PAIR], losses["pairs"][PAIR]
    scored["pairs"], losses["pairs"] = {}, {}
    for key in keys:
        r2 = float(np.round(rng.uniform(-0.2, 0.95), 4))
        test = block(r2, r2_ci95=[r2 - 0.02, r2 + 0.02], partial_r2=r2 - 0.1, partial_r2_ci95=[r2 - 0.15, r2 - 0.05])
        scored["pairs"][key] = {**one, "val": block(r2 + 0.001), "test": test}
        losses["pairs"][key] = lost
        sst = rng.uniform(50, 150, documents)
        sums[key] = {
            "documents": list(range(documents)), "n": [75] * documents, "sst": sst.tolist(),
            "sse": {"map": (sst * (1 - r2)).tolist(), "closed_form": (sst * 0.1297).tolist()},
        }  # fmt: skip
    files = {"adapter.json": card, "metrics.json": scored, "documents.json": {"format": 1, "pairs": sums}}
    if stitched:
        files["stitch.json"] = losses
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory
