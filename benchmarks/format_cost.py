"""What each format costs: bytes on disk, rounding, and what is left of held-out R2, retrieval and stitched loss.

    python benchmarks/format_cost.py --out /tmp/format-cost --json

The demo pair is read once into float32; every other store is converted from it, so that all hold the same states. Maps
are fitted and injected by the commands a user types. A layout changes no value: of the archives only the size is
measured. Writes benchmarks/results/format_cost.json and format_cost.md; what is there already in --out is not repeated.

A second table compares choices of the column scales of int8, on the same rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from align.results import read_metrics
from evaluate.results import read_stitch
from featstore import open_store
from featstore.demo.pair import build_pair
from featstore.demo.sample import sample_path
from featstore.runtime.provenance import versions
from featstore.store import Store
from featstore.store.conversion.pilot_rows import pilot_windows, without_sinks
from featstore.store.format.elements import FORMATS, column_scale_of

LAYERS = (8, 15, 23)
STITCHED_LAYER = "15"
TYPES = ("procrustes", "affine")
#: Columns that are left out of the relative error: a few carry nearly all of the energy of a residual stream.
LOUD_COLUMNS = 8
RESULTS = Path(__file__).parent / "results"


def command(tool: str, *words: object) -> dict[str, Any]:
    """Run one of the commands as its user would."""
    shown = " ".join(map(str, (tool, *words)))
    print(f"$ {shown}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", tool, *map(str, words), "--json"], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout)


def ordinary_rows(store: Store, model: str, layer: int) -> np.ndarray:
    table = store.tokens(model)
    return store.rows(model, layer)[np.flatnonzero(~table.sink & ~table.special)]


def quiet_columns(rows: np.ndarray) -> np.ndarray:
    """All but the loudest columns."""
    return np.argsort(np.square(rows, dtype=np.float64).mean(axis=0))[:-LOUD_COLUMNS]


def relative_error(rows: np.ndarray, rounded: np.ndarray, columns: np.ndarray) -> np.ndarray:
    difference = np.linalg.norm((rounded - rows)[:, columns], axis=1)
    return difference / np.linalg.norm(rows[:, columns], axis=1)


def figures_of(errors: list[np.ndarray]) -> dict[str, float]:
    every = np.concatenate(errors)
    return {"median": float(np.median(every)), "p99": float(np.quantile(every, 0.99))}


def errors_of(truth: Store, store: Store) -> dict[str, float]:
    errors = []
    for model in truth.models:
        for layer in LAYERS:
            rows = ordinary_rows(truth, model, layer)
            errors.append(relative_error(rows, ordinary_rows(store, model, layer), quiet_columns(rows)))
    return figures_of(errors)


def column_scales(store: Store) -> dict[str, dict[str, dict[str, float]]]:
    """Relative error of int8 under other column scales, all of them from the pilot's rows."""
    choices = {
        "root mean square": column_scale_of,
        "largest magnitude": lambda rows: np.abs(rows).max(axis=0),
        "99.9 % quantile of the magnitude": lambda rows: np.quantile(np.abs(rows), 0.999, axis=0),
        "mean magnitude": lambda rows: np.abs(rows).mean(axis=0),
        "square root of the root mean square": lambda rows: np.sqrt(column_scale_of(rows)),
        "none": lambda rows: np.ones(rows.shape[1]),
    }
    form = FORMATS["int8"]
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, choose in choices.items():
        without, whole = [], []
        for model in store.models:
            window = store.tokens(model).window
            starts = np.searchsorted(window, np.arange(len(store.corpus.window_document) + 1))
            for layer in LAYERS:
                pilot, _ = without_sinks(store.rows(model, layer)[: starts[pilot_windows(starts)]])
                scale = np.maximum(choose(pilot).astype(np.float32), np.finfo(np.float32).tiny)
                rows = ordinary_rows(store, model, layer)
                encoded = form.encode(rows, scale)
                rounded = form.decode(encoded.stored, encoded.row_scale, scale)
                without.append(relative_error(rows, rounded, quiet_columns(rows)))
                whole.append(relative_error(rows, rounded, np.arange(rows.shape[1])))
        result[name] = {"without_loudest": figures_of(without), "all_columns": figures_of(whole)}
    return result


def bytes_per_row(path: Path) -> float:
    """Bytes of one token state on disk, norms and scales included, mean over models and layers."""
    info = command("featstore", "info", path, "--no-spectrum")
    layers = [(name, of["bytes"]) for name, held in info["states"].items() for of in held.values()]
    return sum(size for _, size in layers) / sum(info["models"][name]["rows"] for name, _ in layers)


def quality(store: Path, out: Path, tokens: int) -> dict[str, Any]:
    """Held-out figures by layer and type, and the stitched loss that Procrustes recovers."""
    found: dict[str, Any] = {}
    for type_ in TYPES:
        run = out / f"{store.stem}-{type_}"
        if not (run / "metrics.json").is_file():
            words = ("--type", type_, "--layers", ",".join(map(str, LAYERS)), "--out", run)
            command("align", "train", "--store", store, *words)
        found[type_] = {
            key: {"r2": pair.test.r2, "retrieval_top1": pair.test.retrieval_top1, "n": pair.test.n}
            for key, pair in read_metrics(run).pairs.items()
        }
    run = out / f"{store.stem}-procrustes"
    if not (run / "stitch.json").is_file():
        words = ("--adapter", run, "--layers", STITCHED_LAYER, "--max-tokens", tokens)
        command("evaluate", "stitch", "--store", store, *words)
    (stitched,) = read_stitch(run).pairs.values()
    losses = {name: of and of.nats_per_token for name, of in stitched.conditions.items()}
    found["stitched"] = {
        "recovered": stitched.recovered.content(),
        "mapped": losses["mapped"],
        "clean": losses["clean"],
        "n_tokens": stitched.n_tokens,
    }
    return found


def table(result: dict[str, Any]) -> str:
    """The figures as markdown."""
    lines = [
        "| format | layout | bytes | ratio | row error, median / 99 % | R2 Procrustes | R2 affine | top-1 | stitched |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["stores"]:
        start = f"| {entry['format']} | {entry['layout']} | {entry['bytes']:.0f} | {entry['ratio']:.2f} "
        if "quality" not in entry:
            lines.append(start + "| as hot | | | | |")
            continue
        error, quality_ = entry["relative_error"], entry["quality"]
        r2 = {t: " ".join(f"{m['r2']:.4f}" for m in quality_[t].values()) for t in TYPES}
        top1 = " ".join(f"{m['retrieval_top1']:.3f}" for m in quality_["procrustes"].values())
        lines.append(
            start + f"| {error['median']:.2%} / {error['p99']:.2%} | {r2['procrustes']} | {r2['affine']} | {top1} "
            f"| {quality_['stitched']['recovered']['value']:.2%} |"
        )
    lines += [
        "",
        "| column scale of int8 | without the 8 loudest columns, median / 99 % | all columns, median / 99 % |",
        "|---|---|---|",
    ]
    for name, of in result["column_scales"].items():
        cells = [f"{of[k]['median']:.2%} / {of[k]['p99']:.2%}" for k in ("without_loudest", "all_columns")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("format-cost"), help="where stores and runs go")
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="where the demo models are built once")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--document-bytes", type=int, default=1200)
    parser.add_argument("--stitch-tokens", type=int, default=1200)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pair = build_pair(options.cache, options.cache / "assets")
    truth = options.out / "float32-hot.zarr"
    models = ("--model", f"smollm2={pair.source}", "--model", f"twin={pair.target}")
    text = ("--dataset", f"jsonl:{sample_path()}", "--max-documents", options.documents)
    text = (*text, "--max-document-bytes", options.document_bytes, "--max-tokens", "all")
    layers = ("--layers", ",".join(map(str, LAYERS)))
    command(
        "featstore", "extract", *models, *text, *layers, "--format", "float32", "--dtype", "float32", "--store", truth
    )
    stores = []
    for form in ("bfloat16", "float16", "float32", "int8", "fp8"):
        for layout in ("hot", "archive"):
            path = options.out / f"{form}-{layout}.zarr"
            if path != truth:
                command("featstore", "convert", truth, "--format", form, "--layout", layout, "--out", path)
            entry: dict[str, Any] = {"format": form, "layout": layout, "bytes": bytes_per_row(path)}
            if layout == "hot":
                entry["relative_error"] = errors_of(open_store(truth), open_store(path))
                entry["quality"] = quality(path, options.out, options.stitch_tokens)
            stores.append(entry)
    plain = next(e["bytes"] for e in stores if (e["format"], e["layout"]) == ("bfloat16", "hot"))
    for entry in stores:
        entry["ratio"] = plain / entry["bytes"]
    held = open_store(truth)
    result = {
        "stores": stores,
        "column_scales": column_scales(held),
        "rows": {name: held.model(name).rows for name in held.models},
        "width": {name: held.model(name).width for name in held.models},
        "pairs": len(held.pairs(*held.models)),
        "layers": list(LAYERS),
        "stitched_layer": STITCHED_LAYER,
        "versions": versions(),
        "machine": platform.machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "format_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "format_cost.md").write_text(table(result))
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
