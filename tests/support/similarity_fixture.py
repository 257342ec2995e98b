"""The contents of ``cka.json`` with every measure, floors, ceilings and some undefined cells, at any depth."""

from __future__ import annotations

from typing import Any

import numpy as np

LOWER = {"procrustes-distance": (0, None), "angular-distance": (0, float(np.pi / 2))}
BOUNDS = {"rsa": (-1, 1), "mutual-knn": (0, 1), "svcca": (0, 1), "pwcca": (0, 1)}
ONE_WAY = ("pwcca", "ridge-r2")
TITLES = {
    "cka": "Linear CKA",
    "rbf-cka": "RBF CKA",
    "rsa": "RSA",
    "mutual-knn": "Mutual k-NN",
    "cknna": "CKNNA",
    "svcca": "SVCCA",
    "pwcca": "PWCCA",
    "procrustes-distance": "Procrustes distance",
    "angular-distance": "Angular distance",
    "ridge-r2": "Ridge R\u00b2",
}


def _matrix(depths: tuple[Any, Any], rng: np.random.Generator, width: float, top: float) -> np.ndarray:
    far = np.abs(depths[0][:, None] - depths[1][None, :])
    return top * np.exp(-far / width) + 0.01 * rng.normal(size=far.shape)


def _table(values: np.ndarray) -> list[list[float]]:
    return [[float(v) for v in row] for row in values]


def _selves(depth: np.ndarray, rng: np.random.Generator, width: float) -> np.ndarray:
    found = _matrix((depth, depth), rng, width, 1.0)
    found = (found + found.T) / 2
    np.fill_diagonal(found, 1.0)
    return found


def floors_of(cross: list[list[Any]], closer: str) -> dict[str, Any]:
    """Floors with exchanged partners: documents well below every value, the token just below the best ones."""

    def table(of: Any) -> list[list[Any]]:
        return [[None if v is None else float(of(v)) for v in row] for row in cross]

    best = max((v for row in cross for v in row if v is not None), default=1.0)
    sign = 1 if closer == "higher" else -1
    shares = {"documents": 0.1, "token": 0.8}
    return {
        name: {
            "value": table(lambda v: v),
            "mean": table(lambda v, share=share: v * share if sign > 0 else v + 1 - share),
            "p95": table(lambda v, share=share: v * (share + 0.05) if sign > 0 else v + 0.95 - share),
            "p": table(lambda _: 0.025),
            "p_max": table(lambda v, share=share: 0.025 if sign < 0 or v > share * best else 0.6),
            "rows": 8000,
            "of": 98000,
            "documents": 56,
            "draws": 39,
            "seed": 0,
        }
        for name, share in shares.items()
    }


def similarity_result(
    rows: int = 5,
    columns: int = 5,
    *,
    models: tuple[str, str] = ("smol", "twin"),
    measures: tuple[str, ...] = tuple(TITLES),
    keep_sinks: bool = False,
    nulls: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """A result as ``align cka`` writes it; the last layer of the second model has undefined cells with ``nulls``."""
    rng = np.random.default_rng(seed)
    a, b = models
    step = 7 if max(rows, columns) <= 12 else 1
    layers = {a: [step * k for k in range(rows)], b: [step * k for k in range(columns)]}
    if a == b:
        layers = {a: layers[a]}
    depth = {name: np.array(ks) / max(ks[-1], 1) for name, ks in layers.items()}
    undefined = f"self-HSIC of {b}:{layers[b][-1]} is not positive"
    reasons: dict[str, str] = {}

    def blank(cross: list[list[Any]]) -> list[list[Any]]:
        if nulls:
            for i in range(min(2, len(cross))):
                cross[i][-1] = None
                reasons[f"{a}:{layers[a][i]} {b}:{layers[b][-1]}"] = undefined
        return cross

    def within(width: float) -> dict[str, Any]:
        return {name: _table(_selves(depth[name], rng, width)) for name in layers}

    def cross(width: float, top: float) -> list[list[Any]]:
        if a == b:
            return _table(_selves(depth[a], rng, width))
        return blank(_table(_matrix((depth[a], depth[b]), rng, width, top)))

    def noise(size: float) -> list[list[float]]:
        return _table(size * rng.normal(size=(len(layers[a]), len(layers[b]))))

    main, other = {"n": 98000}, {"n": 98040}
    for part, width, top in ((main, 0.5, 0.93), (other, 4.0, 0.999)):
        part |= {"cross": cross(width, top), "within": within(width), "reasons": dict(reasons)}
    if keep_sinks:
        main, other = other, main
    found: dict[str, Any] = {}
    for k, name in enumerate(measures):
        found[name] = _measure(name, layers, (a, b), cross(0.4 + 0.05 * k, 0.9), within(0.5), noise, dict(reasons))
    return {
        "models": [a, b],
        "layers": layers,
        "widths": {a: 576, b: 960},
        "estimator": "debiased",
        "kernel": "linear",
        **main,
        "null": {"cross": noise(0.002), "n": 4096, "method": "shuffled pairs", "estimator": "debiased"},
        "permutations": floors_of(main["cross"], "higher"),
        "masked_rows": 40,
        "keep_sinks": keep_sinks,
        "masked" if keep_sinks else "unmasked": other,
        "effective_rank": {
            name: {
                str(k): {
                    "entropy": float(200 - 2 * k + 9 * rng.normal()),
                    "participation": float(60 + 5 * rng.normal()),
                }
                for k in ks
            }
            for name, ks in layers.items()
        },
        "sample": {"rows": 16384, "of": 98000, "documents": 60, "draws": 1000, "seed": 0},
        "measures": found,
        "store": {"path": "demo.zarr", "fingerprint": "5f0c9ab1"},
    }


def _measure(
    name: str,
    layers: dict[str, list[int]],
    models: tuple[str, str],
    cross: list[list[Any]],
    within: dict[str, Any],
    noise: Any,
    reasons: dict[str, str],
) -> dict[str, Any]:
    a, b = models
    lower = name in LOWER

    def turned(table: list[list[Any]]) -> list[list[Any]]:
        return [[None if v is None else 1.2 * (1 - v) + 0.02 if lower else v for v in row] for row in table]

    def around(table: list[list[Any]]) -> list[list[Any]]:
        return [[None if v is None else [v - 0.03, v + 0.02] for v in row] for row in table]

    cross, within = turned(cross), {key: turned(table) for key, table in within.items()}
    facts = {f"{a}:{layers[a][0]}": {"sigma": 12.3456}, f"{b}:{layers[b][1]} {a}:{layers[a][0]}": {"tied_rows": 17}}
    found: dict[str, Any] = {
        "title": TITLES[name],
        "closer": "lower" if lower else "higher",
        "symmetric": name not in ONE_WAY,
        "bounds": list(LOWER.get(name) or BOUNDS.get(name) or (None, 1)),
        "cross": cross,
        "within": within,
        "ci95": {"cross": around(cross), "within": {key: around(table) for key, table in within.items()}},
        "permutations": floors_of(cross, "lower" if lower else "higher"),
        "facts": facts if name == "rbf-cka" else {},
        "reasons": reasons | {"twice": "the model was not loaded"},
        "floors": {"shuffled": {"cross": turned(noise(0.003))}, "noise": {"cross": turned(noise(0.02))}},
        "ceilings": {
            "rounding": {key: [0.9999 - 1e-4 * k for k in range(len(ks))] for key, ks in layers.items()},
            "halves": {"cross": noise(0.01)},
            "twice": None,
        },
    }
    if name in ONE_WAY:
        found["reverse"] = [[None if v is None else v - 0.1 for v in row] for row in cross]
    return found
