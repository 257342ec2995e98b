"""What each extra is for, done once: called in a process that has nothing but the libraries of that extra.

Each function takes a store and a folder to write to, and returns what a test can look at. pytest is not there.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def command(*words: object) -> tuple[int, str]:
    """Exit code of a command, and what it wrote to stderr."""
    err = io.StringIO()
    sys.argv = [str(word) for word in words]
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            importlib.import_module(f"{words[0]}.cli").main()
        except SystemExit as stop:
            return int(stop.code or 0), err.getvalue()
    return 0, err.getvalue()


def done(*words: object) -> None:
    """A command that has to end well."""
    code, err = command(*words)
    if code:
        raise RuntimeError(f"{' '.join(map(str, words))}: {err}")


def reading(store: str, out: str) -> dict[str, Any]:
    """Open a store, and read rows, token tables, pairs, minibatches and text."""
    import numpy as np

    import featstore
    from featstore.store.read.loader import PairBatches

    opened = featstore.open_store(store)
    first, second = opened.models[:2]
    rows = opened.rows(first, 2)
    pairs = opened.pairs(first, second).select(0)
    x, _ = next(PairBatches(rows, opened.rows(second, 2), pairs).shuffled(64, seed=0, epoch=1))
    portable = featstore.open_store(store, portable=True).rows(first, 2)[:5]
    return {
        "rows": list(rows.shape),
        "batch": list(x.shape),
        "same": bool(np.array_equal(np.asarray(rows[:5]), np.asarray(portable))),
        "text": len(opened.corpus.window_text(0)),
        "shown": repr(opened),
    }


def looking_after(store: str, out: str) -> dict[str, Any]:
    """What the commands do that need no model."""
    copy = Path(out) / "copy.zarr"
    shutil.copytree(store, copy)
    for words in (("info", store), ("inspect", store), ("verify", store), ("pair", copy, "--policy", "word")):
        done("featstore", *words)
    done("featstore", "moments", copy)
    done("featstore", "convert", store, "--format", "int8", "--out", Path(out) / "int8.zarr")
    for name in ("featstore", "align", "evaluate"):
        done(name, "--help")
    return {}


def fitting(store: str, out: str) -> dict[str, Any]:
    """Closed forms, their scores, similarity of layers, and a table of runs, from the command and from a notebook."""
    import numpy as np

    import align

    place = Path(out)
    runs = [
        align.train(store, type_, layers=[2], out=place / type_, quiet=True, **more)
        for type_, more in (("procrustes", {}), ("affine", {}), ("reduced-rank", {"rank": 2}))
    ]
    [fitted] = align.load(runs[0]).values()
    mapped = fitted.transform(np.ones((3, fitted.widths[0]), np.float32))
    board = align.compare(runs)
    estimator = align.AffineAligner().fit(np.eye(40, 4), np.eye(40, 3))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = align.cka(store, layers=[2], measures="all", permutations=2, out=place / "cka", quiet=True)
    done("align", "train", "--store", store, "--layers", "2", "--both", "--out", place / "typed")
    done("align", "compare", place / "procrustes", place / "affine")
    return {
        "mapped": list(mapped.shape),
        "runs": len(board.rows),
        "estimator": type(estimator).__name__,
        "files": found.files,
        "said": [str(each.message) for each in said],
    }


def drawing(store: str, out: str) -> dict[str, Any]:
    """Pages, pictures and data frames."""
    import align
    import evaluate
    import featstore

    run = align.train(store, layers=[2], out=Path(out) / "run", quiet=True)
    similarity = align.cka(store, layers=[2], permutations=2, out=Path(out) / "cka", quiet=True)
    page = evaluate.report([run, similarity.path], out=Path(out) / "report.html")
    run.plot().savefig(Path(out) / "run.png")
    similarity.plot()
    frames = [featstore.open_store(store).to_pandas(), run.to_pandas(), align.compare([run]).to_pandas()]
    return {"page": page.path.stat().st_size, "files": similarity.files, "frames": [len(frame) for frame in frames]}


def extracting(store: str, out: str) -> dict[str, Any]:
    """Run the models of a store on more text, and compare what is stored with them."""
    import featstore

    recorded = featstore.open_store(store)
    models = {name: recorded.model(name).attributes["reference"] for name in recorded.models[:1]}
    text = Path(out) / "text.jsonl"
    text.write_text("".join(f'{{"text": "{"Words and more words. " * 30}{k}"}}\n' for k in range(12)))
    made = featstore.extract(
        models, layers=[0, 1], dataset=f"jsonl:{text}", store=Path(out) / "s.zarr", device="cpu", quiet=True
    )
    done("featstore", "verify", made.path, "--reextract", "1", "--yes", "--device", "cpu")
    return {"rows": made.rows(made.models[0], 1).shape[0]}


def injecting(store: str, out: str) -> dict[str, Any]:
    """Fit a map by gradient, and put what it says into the full models."""
    import align
    import evaluate

    run = align.train(
        store,
        "lora",
        layers=[2],
        rank=2,
        epochs=2,
        device="cpu",
        tracker="tensorboard",
        out=Path(out) / "run",
        quiet=True,
    )
    done(
        "evaluate", "stitch", "--store", store, "--adapter", run.path, "--max-tokens", "100", "--yes", "--device", "cpu"
    )
    texts = evaluate.generate(run, ["Water is"], max_new_tokens=2, device="cpu", yes=True, quiet=True)
    return {"files": sorted(path.name for path in run.path.iterdir()), "texts": type(texts).__name__}


def reaching(store: str, out: str) -> dict[str, Any]:
    """Name a bucket, and work on a Dask scheduler."""
    from distributed import LocalCluster

    import align
    from featstore.store.read.portable import store_files

    bucket = type(store_files("s3://bucket/x.zarr")._store).__name__
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        found = align.cka(store, layers=[2], permutations=2, scheduler=cluster.scheduler_address, quiet=True)
    return {"bucket": bucket, "estimator": found.estimator}


def refused(store: str, out: str, *names: str) -> dict[str, str]:
    """What functions and commands say that need a library which is not there."""
    import align
    import evaluate
    import featstore

    place, opened = Path(out), featstore.open_store(store)
    calls: dict[str, Callable[[], Any]] = {
        "featstore.extract": lambda: featstore.extract({"a": "./a"}, store=place / "s.zarr"),
        "featstore.rebuild": lambda: featstore.rebuild(store, yes=True),
        "featstore.demo_pair": lambda: featstore.demo_pair(place / "demo"),
        "featstore.small_models": lambda: featstore.small_models(place / "small"),
        "open_store": lambda: featstore.open_store("s3://bucket/x.zarr"),
        "Store.to_pandas": opened.to_pandas,
        "align.train": lambda: align.train(store, out=place / "run"),
        "align.train lora": lambda: align.train(store, "lora", out=place / "run"),
        "align.cka": lambda: align.cka(store),
        "align.cka scheduler": lambda: align.cka(store, scheduler="127.0.0.1:1"),
        "align.cka arrays": lambda: align.cka([[0.0]] * 4, [[0.0]] * 4),
        "align.AffineAligner": lambda: align.AffineAligner,
        "align.load": lambda: align.load(place / "made"),
        "align.compare": lambda: align.compare([place / "made"]).to_pandas(),
        "Run.plot": lambda: align.Run(place / "made").plot(),
        "evaluate.stitch": lambda: evaluate.stitch(store, place / "made"),
        "evaluate.generate": lambda: evaluate.generate(place / "made"),
        "evaluate.communicate": lambda: evaluate.communicate(place / "made"),
        "evaluate.load_models": lambda: evaluate.load_models(place / "made"),
        "evaluate.report": lambda: evaluate.report([place / "made"], out=place / "r.html"),
    }
    typed: dict[str, tuple[object, ...]] = {
        "featstore extract": ("--model", "a=./a", "--store", place / "s.zarr"),
        "featstore doctor": (),
        "featstore calibrate": ("--small", "--out", place / "small"),
        "featstore demo": ("--out", place / "demo", "--cache", place / "cache"),
        "align train": ("--store", store, "--out", place / "run"),
        "align sweep": ("--store", store, "--out", place / "sweep"),
        "align cka": ("--store", store, "--out", place / "cka"),
        "align compare": (place / "made",),
        "evaluate stitch": ("--store", store, "--adapter", place / "made"),
        "evaluate generate": ("--adapter", place / "made"),
        "evaluate communicate": ("--adapter", place / "made"),
        "evaluate report": (place / "made", "--out", place / "r.html"),
        "evaluate reproduce": ("--store", store, "--out", place / "reproduction"),
    }
    found = {}
    for name in names:
        if name in typed:
            code, err = command(*name.split(), *typed[name])
            found[name] = err.strip() if code == 2 else f"exit {code}: {err}"
            continue
        try:
            calls[name]()
            found[name] = "no error"
        except featstore.errors.MissingPackageError as error:
            found[name] = str(error)
        except featstore.errors.FeatstoreError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found
