"""The whole job on two real models, through the same commands a user types.

Every stage is a command of its own process, printed before it runs, so that the demo is also the tutorial. Stages that
are done are not repeated: an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from featstore.demo.pair import build_pair
from featstore.demo.sample import sample_path
from featstore.runtime.console import err, human_seconds
from featstore.runtime.provenance import write_json
from featstore.runtime.subcommands import run_stage

#: Small enough for two cores, large enough that every figure means something.
_EXTRACT = ("--layers", "0%,25%,50%,75%,100%", "--max-documents", "60", "--max-document-bytes", "1200")
_TYPES: dict[str, tuple[str, ...]] = {
    "procrustes": (),
    "linear": (),
    "affine": (),
    "lora": ("--layers", "25%,50%,75%"),
}
#: What is injected: `linear` differs from `affine` by a mean that hardly matters here.
_STITCHED = ("procrustes", "affine", "lora")
_STITCHED_LAYER = "50%"
_STITCH_TOKENS = "1200"


def run_demo(out: Path, cache: Path) -> dict[str, Any]:
    """Build the calibration pair and do everything with it.

    Args:
        out: Directory for the store, the runs and the report.
        cache: Where the demo models are built once.

    Returns:
        The main figures, the seconds of each stage, and the report's path.

    Raises:
        StageError: A stage failed.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    out.mkdir(parents=True, exist_ok=True)

    def stage(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    err.rule("build the demo pair", align="left")
    pair = stage("build", lambda: build_pair(cache, cache / "assets"))
    store, runs = out / "demo.zarr", out / "runs"
    models = ("--model", f"smollm2={pair.source}", "--model", f"twin={pair.target}")
    extract = (*models, "--dataset", f"jsonl:{sample_path()}", *_EXTRACT, "--store", str(store))
    summary = stage("extract", lambda: run_stage("featstore", "extract", *extract))
    for type_, scope in _TYPES.items():
        run = runs / type_
        if not (run / "adapter.json").exists():
            what = ("--type", type_, "--both", *scope, "--out", str(run))
            stage(f"train {type_}", partial(run_stage, "align", "train", "--store", str(store), *what))
    if not (runs / "cka" / "cka.json").exists():
        stage("cka", lambda: run_stage("align", "cka", "--store", str(store), "--out", str(runs / "cka")))
    for type_ in _STITCHED:
        run = runs / type_
        if not (run / "stitch.json").exists():
            scope = ("--layers", _STITCHED_LAYER, "--max-tokens", _STITCH_TOKENS)
            stitch = ("stitch", "--store", str(store), "--adapter", str(run), *scope)
            stage(f"stitch {type_}", partial(run_stage, "evaluate", *stitch))
    if not (runs / "procrustes" / "generations.json").exists():
        run = runs / "procrustes"
        prompts = ("generate", "--adapter", str(run), "--layers", _STITCHED_LAYER)
        stage("generate", partial(run_stage, "evaluate", *prompts))
    report = out / "report.html"
    directories = [str(runs / name) for name in (*_TYPES, "cka")]
    stage("report", lambda: run_stage("evaluate", "report", *directories, "--out", str(report)))
    result = {"report": str(report), "store": summary, "runs": _figures(runs), "seconds": seconds}
    result["total_seconds"] = time.perf_counter() - started
    write_json(out / "demo.json", result)
    return {**result, "text": _describe(result)}


def _figures(runs: Path) -> dict[str, Any]:
    """The figures that matter: held-out R2 and the share of the stitched loss that each map recovers."""
    figures: dict[str, Any] = {}
    for type_ in _TYPES:
        metrics = json.loads((runs / type_ / "metrics.json").read_text())["pairs"]
        path = runs / type_ / "stitch.json"
        stitched = json.loads(path.read_text())["pairs"] if path.exists() else {}
        figures[type_] = {
            key: {"r2": metrics[key]["test"]["r2"], **_stitched(stitched.get(key))}
            for key in sorted(metrics, key=_by_depth)
        }
    return figures


def _by_depth(key: str) -> tuple[str, int]:
    model, _, layer = key.partition("->")[0].rpartition(":")
    return model, int(layer)


def _stitched(entry: dict[str, Any] | None) -> dict[str, Any]:
    if entry is None:
        return {}
    losses = {name: figures and figures["nats_per_token"] for name, figures in entry["conditions"].items()}
    shown = ("beyond_token", "recovered_token", "recovered", "beats_every_control", "closest_control")
    return {"nats_per_token": losses, **{name: entry[name] for name in shown}}


def _describe(result: dict[str, Any]) -> str:
    lines = [f"{'map':12} {'layers':22} {'R2':>6} {'clean':>6} {'mapped':>6} {'mean':>6}  recovered [95 %]"]
    for type_, pairs in result["runs"].items():
        for key, entry in pairs.items():
            row = f"{type_:12} {key:22} {entry['r2']:6.3f}"
            if "recovered" in entry:
                losses = entry["nats_per_token"]
                row += "".join(f" {losses[name]:6.2f}" for name in ("clean", "mapped", "mean"))
                row += f"  {entry['recovered']['value']:.1%} "
                ends = entry["recovered"]["ci95"]
                row += "[no interval]" if ends is None else f"[{ends[0]:.1%}, {ends[1]:.1%}]"
            lines.append(row)
    lines.append(f"done in {human_seconds(result['total_seconds'])}; open {result['report']}")
    return "\n".join(lines)
