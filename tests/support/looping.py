"""Calls of the gradient loop on planted stores, in this process or, as a script, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from align.closed_form.fit import Fit, fit_closed
from align.layers import LayerPair
from align.maps.registry import map_type
from align.moments.scan import Scan, scan
from align.runs.plan import training_plan
from align.scoring.rows import Epoch, batches_of, score_all
from align.settings import LoopSettings
from align.training.loop import Trained, train_map
from featstore.runtime.processes import leave_group
from featstore.store import open_store
from featstore.store.read.loader import PairBatches
from tests.support import ROOT
from tests.support.planted import plant, rotation, spectrum_rows

PAIR = LayerPair("a", (1,), "b", 1)


@dataclass
class Ready:
    """A planted store with all that training takes from it."""

    path: Path
    moments: Scan
    train: PairBatches
    val: PairBatches
    test: PairBatches

    @classmethod
    def of(cls, path: Path) -> Ready:
        store = open_store(path)
        pairs = store.pairs("a", "b").select()
        sides = (batches_of(store, PAIR, pairs.where(pairs.split == split)) for split in range(3))
        return cls(path, scan(store, pairs, [PAIR])[PAIR.key], *sides)

    def r2(self, aligner: Any) -> float:
        figures, _ = score_all(self.test, {"map": aligner})["map"]
        return float((figures or {})["r2"])

    def closed(self, type_: str, **options: Any) -> float:
        """Test R2 of a closed form."""
        return self.r2(fit_closed(Fit(type_, **options), PAIR, self.moments))


@dataclass
class Outcome:
    """What a call of the loop gave and told."""

    trained: Trained
    epochs: list[Epoch]
    events: list[dict[str, Any]]

    @property
    def told(self) -> list[dict[str, Any]]:
        """All that must be the same in a run that was interrupted: everything but times."""
        timed = ("seconds", "cka_seconds")
        records = [*map(asdict, self.epochs), *self.events]
        return [{name: value for name, value in record.items() if name not in timed} for record in records]


def ready(path: Path, kind: str = "nonlinear", n: int = 2000, d: int = 24, rank: int = 4) -> Ready:
    """A store of rows whose map is known.

    Args:
        path: Where.
        kind: ``rotation``, ``low-rank`` (added to it), ``full`` (any matrix), ``nonlinear``, or ``independent``.
        n: Pairs.
        d: Width of both sides.
        rank: Of the low-rank change.
    """
    rng = np.random.default_rng(0)
    x = spectrum_rows(n, d, 1, decay=0.7)
    x *= np.sqrt(x.size / (x**2).sum())
    y = x @ rotation(d, 2)
    added = {
        "rotation": np.zeros_like,
        "low-rank": lambda x: x @ rng.normal(size=(d, rank)) @ rng.normal(size=(rank, d)),
        "full": lambda x: x @ rng.normal(size=(d, d)),
        "nonlinear": lambda x: np.maximum(x @ rng.normal(size=(d, 2 * d)), 0) @ rng.normal(size=(2 * d, d)),
        "independent": lambda x: spectrum_rows(n, d, 7) - y,
    }[kind](x)
    if kind not in ("rotation", "independent"):
        added -= added.mean(axis=0)
        added *= 0.7 * np.sqrt((y**2).sum() / (added**2).sum())
    y = y + added
    plant(path, x, y + rng.normal(size=y.shape) * np.sqrt((y**2).sum() / y.size / 10))
    return Ready.of(path)


def run(
    data: Ready,
    type_: str,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    store: str = "",
    on_step: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Outcome:
    """Train; options are those of `LoopSettings`."""
    epochs: list[Epoch] = []
    events: list[dict[str, Any]] = []

    def told(event: dict[str, Any]) -> None:
        events.append(event)
        if on_step is not None:
            on_step(event)

    trained = train_map(
        training_plan(map_type(type_), LoopSettings(**options)),
        PAIR,
        data.moments,
        data.train,
        data.val,
        on_epoch=epochs.append,
        on_step=told,
        checkpoint=checkpoint,
        resume=resume,
        store=store,
    )
    return Outcome(trained, epochs, events)


# Processes of their own ---------------------------------------------------------------------------------------------


def command(data: Ready, out: Path, type_: str, **asked: Any) -> list[str]:
    """The words after `python` that train in another process; `asked` are arguments of :func:`run` and ``pause``."""
    return [str(Path(__file__)), str(data.path), str(out), type_, json.dumps(asked)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launched(words: list[str], processes: int = 1) -> None:
    """Run to the end, in one process or in several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program = [sys.executable, *(launcher if processes > 1 else []), *words]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]


def result(out: Path, rank: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Tensors and what was told, as a process wrote them."""
    return load_file(out / f"{rank}.safetensors"), json.loads((out / f"{rank}.json").read_text())


def main() -> None:
    path, out, type_, text = sys.argv[1:]
    asked = json.loads(text)
    pause, rank = asked.pop("pause", 0.0), os.environ.get("RANK", "0")
    if "checkpoint" in asked:
        asked["checkpoint"] = Path(asked["checkpoint"])
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)

    def note(event: dict[str, Any]) -> None:
        with (directory / f"{rank}.log").open("a") as handle:
            handle.write(json.dumps(event) + "\n")
        time.sleep(pause)

    outcome = run(Ready.of(Path(path)), type_, on_step=note, **asked)
    save_file(outcome.trained.aligner.tensors, directory / f"{rank}.safetensors")
    (directory / f"{rank}.json").write_text(json.dumps(outcome.told))


if __name__ == "__main__":
    main()
    leave_group()
