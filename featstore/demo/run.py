"""The whole job on real models, through the same commands a user types.

Every stage is a command of its own process, printed before it runs, so that the demo is also the tutorial. Stages that
are done are not repeated: an interrupted demo goes on where it stopped. Three pairs are read into one store and
compared in the same way: one whose answer is planted, one that was trained apart, one of which half is untrained.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from featstore.demo.blocks import APART, PLANTED, UNTRAINED, Block, DemoResult, read_block
from featstore.demo.pair import build_pair
from featstore.demo.small import build_small
from featstore.demo.words import describe
from featstore.runtime.console import err
from featstore.runtime.extras import require
from featstore.runtime.records import write
from featstore.runtime.subcommands import run_stage
from featstore.runtime.writing import check_folder, make_folder

#: Small enough for two cores, large enough that every figure means something: nine documents are for the test.
_EXTRACT = ("--layers", "0%,25%,50%,75%,100%", "--max-documents", "90", "--max-document-bytes", "600")
_MIDDLE = ("--layers", "50%")
_PROMPTED = "procrustes"


@dataclass(frozen=True)
class _Pair:
    """Two models of the store and what is done with them.

    Attributes:
        name: Of the block.
        target: The other model than SmolLM2.
        aside: What its run directories begin with.
        types: Options of `align train` by type of map.
        stitched: Types whose maps are put into the target, at the middle layer.
    """

    name: str
    target: str
    aside: str
    types: dict[str, tuple[str, ...]]
    stitched: tuple[str, ...] = ()

    def run(self, what: str) -> str:
        """Name of a run directory."""
        return f"{self.aside}{what}"


_SOURCE = "smollm2"
_PAIRS = (
    _Pair(
        PLANTED,
        "twin",
        "",
        {"procrustes": (), "affine": ("--both",), "lora": _MIDDLE},
        stitched=("affine",),
    ),
    _Pair(
        APART,
        "small",
        "apart-",
        {"procrustes": (), "affine": (), "lora": _MIDDLE},
        stitched=("affine", "lora"),
    ),
    # An untrained model predicts nothing: there is no loss to recover.
    _Pair(UNTRAINED, "untrained", "untrained-", {"affine": ()}),
)


def run_demo(out: Path, cache: Path) -> dict[str, Any]:
    """Build the models and do everything with each pair.

    Args:
        out: Directory for the store, the runs, the report and ``demo.json``.
        cache: Where the demo models are built once.

    Returns:
        The contents of ``demo.json`` (:class:`featstore.demo.blocks.DemoResult`), and ``text``, the same for people.

    Raises:
        StageError: A stage failed.
        MissingPackageError: What a later stage needs is not installed.
    """
    require("scipy", "jinja2", "matplotlib")
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    for name in ("runs", "demo.zarr"):
        check_folder(out, name, make=False)
    make_folder(out)

    def stage(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    err.rule("build the demo models", align="left")
    pair = stage("build", lambda: build_pair(cache, cache / "assets"))
    small = stage("build small", lambda: build_small(cache))
    store, runs = out / "demo.zarr", out / "runs"
    models = [f"--model={name}={path}" for name, path in {**pair.models, **small.models}.items()]
    extract = (*models, "--dataset", pair.dataset, *_EXTRACT, "--store", str(store))
    summary = stage("extract", lambda: run_stage("featstore", "extract", *extract))
    for each in _PAIRS:
        _compare(each, store, runs, stage)
    if not (runs / _PROMPTED / "generations.json").exists():
        prompts = ("generate", "--adapter", str(runs / _PROMPTED), *_MIDDLE)
        stage("generate", partial(run_stage, "evaluate", *prompts))
    report = out / "report.html"
    directories = [str(runs / each.run(what)) for each in _PAIRS for what in (*each.types, "cka")]
    stage("report", lambda: run_stage("evaluate", "report", *directories, "--out", str(report)))
    result = DemoResult.parse(
        {
            "blocks": {each.name: _figures(each, runs) for each in _PAIRS},
            "report": str(report),
            "seconds": seconds,
            "store": summary,
            "total_seconds": time.perf_counter() - started,
        }
    )
    write(result, out)
    return {**result.content(), "text": describe(result)}


def _compare(pair: _Pair, store: Path, runs: Path, stage: Callable[[str, Callable[[], Any]], Any]) -> None:
    """Fit, compare and stitch one pair, as far as that is not done."""
    err.rule(f"{pair.name}: {_SOURCE} and {pair.target}", align="left")
    for type_, scope in pair.types.items():
        run = runs / pair.run(type_)
        if not (run / "adapter.json").exists():
            what = ("--source", _SOURCE, "--target", pair.target, "--type", type_, *scope, "--out", str(run))
            stage(f"train {run.name}", partial(run_stage, "align", "train", "--store", str(store), *what))
    cka = runs / pair.run("cka")
    if not (cka / "cka.json").exists():
        what = ("--models", f"{_SOURCE},{pair.target}", "--out", str(cka))
        stage(cka.name, partial(run_stage, "align", "cka", "--store", str(store), *what))
    for type_ in pair.stitched:
        run = runs / pair.run(type_)
        if not (run / "stitch.json").exists():
            stitch = ("stitch", "--store", str(store), "--adapter", str(run), *_MIDDLE, "--max-tokens", "all")
            stage(f"stitch {run.name}", partial(run_stage, "evaluate", *stitch))


def _figures(pair: _Pair, runs: Path) -> Block:
    directories = {type_: runs / pair.run(type_) for type_ in pair.types}
    return read_block(_SOURCE, pair.target, runs / pair.run("cka"), directories)
