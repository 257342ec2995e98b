"""Our measures in feature space beside published implementations of the same ones: largest difference, and seconds.

    OMP_NUM_THREADS=2 python benchmarks/peers_similarity.py --rows 400

One line for each figure and peer. Conventions differ, and theirs are turned into ours first; what was done is said
beside the figure. A peer that is not installed gets one line with how to install it. Nothing here is timed against a
goal: the seconds are one call each, for orientation.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _measure import keep, machine, seconds, versions_of

from align.metrics import debiased_cka
from align.similarity.measures.base import Measure
from align.similarity.measures.shape import angular_distance, procrustes_distance
from align.similarity.measures.subspace import pwcca, svcca

#: Figure, our value, theirs, and how theirs became ours.
Figure = tuple[str, float, float, str]
Pair = tuple[np.ndarray, np.ndarray]


def planted(rows: int, seed: int) -> list[Pair]:
    """Pairs of layers of equal and of different widths that share a state, with noise on both sides."""
    rng = np.random.default_rng(seed)
    pairs = []
    for dx, dy in ((24, 24), (16, 30), (30, 16)):
        state = rng.normal(size=(rows, 16)) * np.arange(1, 17) ** -0.5
        pairs.append(
            tuple(
                (state @ rng.normal(size=(16, d)) + 0.3 * rng.normal(size=(rows, d)) + 2).astype(np.float32)
                for d in (dx, dy)
            )
        )
    return pairs


def ours(measure: Measure, x: np.ndarray, y: np.ndarray) -> float:
    return measure([x, y], [(0, 1)], None, lambda _: None)[0, 1].value


def wide(x: np.ndarray, y: np.ndarray) -> Pair:
    """Centred float64, for peers that take rows as they come."""
    x, y = (r.astype(np.float64) for r in (x, y))
    return x - x.mean(axis=0), y - y.mean(axis=0)


def scipy_(x: np.ndarray, y: np.ndarray) -> Iterator[Figure]:
    spatial, linalg = importlib.import_module("scipy.spatial"), importlib.import_module("scipy.linalg")
    d = max(x.shape[1], y.shape[1])
    a, b = (np.pad(r, ((0, 0), (0, d - r.shape[1]))) for r in wide(x, y))
    turn = linalg.orthogonal_procrustes(a, b)[0]
    theirs = float(np.linalg.norm(a @ turn - b)) / math.sqrt(len(x))
    yield "procrustes-distance", ours(procrustes_distance(), x, y), theirs, "orthogonal_procrustes, over root n"
    angle = ours(angular_distance(), x, y)
    yield "angular-distance", angle, math.asin(math.sqrt(spatial.procrustes(a, b)[2])), "arcsin of the root disparity"


def sklearn_(x: np.ndarray, y: np.ndarray) -> Iterator[Figure]:
    model = importlib.import_module("sklearn.cross_decomposition").CCA
    # Its power iteration takes long for all components of wide layers: six of each side are enough.
    a, b = x[:, :6].astype(np.float64), y[:, :6].astype(np.float64)
    u, v = model(n_components=6, tol=1e-12, max_iter=100_000).fit(a, b).transform(a, b)
    theirs = float(np.mean([np.corrcoef(u[:, k], v[:, k])[0, 1] for k in range(6)]))
    yield "svcca(share=1)", ours(svcca(1.0), x[:, :6], y[:, :6]), theirs, "mean correlation of CCA's scores"


def netrep(x: np.ndarray, y: np.ndarray) -> Iterator[Figure]:
    metric = importlib.import_module("netrep.metrics").LinearMetric
    a, b = wide(x, y)
    theirs = metric(alpha=1.0, score_method="angular").fit_score(a, b)
    yield "angular-distance", ours(angular_distance(), x, y), float(theirs), "alpha=1, angular"
    theirs = metric(alpha=1.0, score_method="euclidean").fit_score(a, b) / math.sqrt(len(x))
    yield "procrustes-distance", ours(procrustes_distance(), x, y), float(theirs), "alpha=1, euclidean, over root n"


def rsatoolbox(x: np.ndarray, y: np.ndarray) -> Iterator[Figure]:
    data, rdm = importlib.import_module("rsatoolbox.data"), importlib.import_module("rsatoolbox.rdm")
    # calc_rdm divides squared distances by the width.
    sets = [data.Dataset(rows * math.sqrt(rows.shape[1])) for rows in wide(x, y)]
    sides = [rdm.calc_rdm(one, method="euclidean") for one in sets]
    similarity = float(np.squeeze(rdm.compare(*sides, method="bures")))
    yield "angular-distance", ours(angular_distance(), x, y), math.acos(similarity), "arccos of the Bures similarity"
    squared = float(np.squeeze(rdm.compare(*sides, method="bures_metric")))
    value = ours(procrustes_distance(), x, y)
    yield "procrustes-distance", value, math.sqrt(squared / len(x)), "root of the Bures metric over n"


def latentis(x: np.ndarray, y: np.ndarray) -> Iterator[Figure]:
    import torch

    theirs = importlib.import_module("latentis.measure.functional.svcca").svcca
    a, b = (torch.from_numpy(r) for r in wide(x, y))
    # Its "variance" is the share of the sum of correlations; just below 1 only a last one of nothing is dropped.
    value = float(theirs(a, b, variance_percentage=1 - 1e-9, epsilon=1e-12))
    yield "svcca(share=1)", ours(svcca(1.0), x, y), value, "no components are dropped; 1e-12 on the diagonals"


def repsim(x: np.ndarray, y: np.ndarray) -> Iterator[Figure]:
    package = importlib.import_module("repsim")
    sides = list(wide(x, y))
    result = svcca(1.0)([x, y], [(0, 1)], None, lambda _: None)[0, 1]
    yield "svcca(share=1)", result.value, float(package.cca(sides, summary_type="pillai")[0, 1]), "cca, 'pillai'"
    theirs = float(package.cca(sides, summary_type="yanai")[0, 1])
    yield "mean_square, share=1", result.facts["mean_square"], theirs, "cca, 'yanai'"
    both = pwcca(1.0)([x, y], [(0, 1), (1, 0)], None, lambda _: None)
    mean = (both[0, 1].value + both[1, 0].value) / 2
    yield "pwcca(share=1)", mean, float(package.pwcca(sides)[0, 1]), "theirs is the mean of both directions"


def pytorch_cka(x: np.ndarray, y: np.ndarray) -> Iterator[Figure]:
    import torch

    features = importlib.import_module("cka").cka_from_features
    a, b = (torch.from_numpy(r) for r in wide(x, y))
    yield "debiased CKA", debiased_cka(x, y)[0], float(features(a, b).squeeze()), "centred float64 rows"


PEERS: dict[str, tuple[Callable[..., Iterator[Figure]], str]] = {
    "scipy": (scipy_, "pip install scipy"),
    "scikit-learn": (sklearn_, "pip install scikit-learn"),
    "netrep": (netrep, "pip install git+https://github.com/ahwillia/netrep"),
    "rsatoolbox": (rsatoolbox, "pip install rsatoolbox"),
    "latentis": (latentis, "pip install latentis"),
    "repsim": (repsim, "pip install repsim"),
    "pytorch-cka": (pytorch_cka, "pip install pytorch-cka"),
}


def beside(name: str, pairs: list[Pair]) -> dict[str, Any]:
    """Every figure of one peer over all pairs: largest difference, and the seconds of both sides' calls together."""
    peer, install = PEERS[name]
    found: dict[str, Any] = {}
    try:
        for x, y in pairs:
            collected: list[Figure] = []
            taken = seconds(lambda x=x, y=y, into=collected: into.extend(peer(x, y)))
            for figure, mine, theirs, how in collected:
                entry = found.setdefault(figure, {"largest_difference": 0.0, "how": how, "ours": [], "theirs": []})
                # max() would let a NaN go by.
                entry["largest_difference"] = float(np.maximum(entry["largest_difference"], abs(mine - theirs)))
                entry["ours"].append(mine)
                entry["theirs"].append(theirs)
            found.setdefault("seconds", []).append(taken)
    except ImportError as error:
        return {"missing": f"not installed ({error}); {install}"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400, help="rsatoolbox works on rows by rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help=f"write {Path('benchmarks/results/peers_similarity.json')}")
    parser.add_argument("--json", action="store_true", help="print the result as one line")
    arguments = parser.parse_args()
    before, pairs = machine(), planted(arguments.rows, arguments.seed)
    result: dict[str, Any] = {
        "device": {**before, "threads": os.environ.get("OMP_NUM_THREADS", "all")},
        "versions": versions_of("featstore", "numpy", "scipy", *PEERS),
        "rows": arguments.rows,
        "peers": {name: beside(name, pairs) for name in PEERS},
    }
    print(f"{len(pairs)} pairs of layers, {arguments.rows} rows; ours against theirs")
    for name, found in result["peers"].items():
        if "missing" in found:
            print(f"  {name:14} {found['missing']}")
            continue
        for figure, entry in found.items():
            if figure != "seconds":
                print(f"  {name:14} {figure:22} largest difference {entry['largest_difference']:.1e}  ({entry['how']})")
    if arguments.json:
        print(json.dumps(result))
    if arguments.keep:
        print(keep("peers_similarity", result))


if __name__ == "__main__":
    main()
