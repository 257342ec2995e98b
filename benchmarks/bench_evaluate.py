"""Evaluation on the demo pair beside the former build: seconds, CPU seconds, peak memory, and whether figures agree.

Both builds make a store and a run of their own from the same text and models, once (``--work`` keeps them); then each
command runs in a process of its own, in turn. A command includes what its user waits for: imports, and loading models.

    python benchmarks/bench_evaluate.py --what stitch --rounds 5 --keep

This build injects one control more than the former one (the token's prediction). Stitched losses are therefore timed
twice: with the controls that both have, and with all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _former import REPOSITORY, Spent, former_build, run_build
from _measure import at_least, at_most, interleaved, judged, keep, machine, recorded, versions_of

FORMER, THIS, ALL = "former", "this build", "this build, all controls"
#: Controls of stitched losses that both builds have.
SHARED = ("mean", "zero", "random_norm", "random_rotation", "shuffled", "raw")
_STITCH = """
import json, sys
from pathlib import Path
from featstore.store import open_store
try:
    from evaluate.stitching.stitch import stitch
    from align.maps.fitted import load_adapter
    from featstore.models.references import Allowed
    more = {"allowed": Allowed(True, False)}
except ImportError:
    from evaluate.stitch import stitch
    from align.aligners import load_adapter
    more = {}
store, run, layers, tokens, controls, out = sys.argv[1:7]
found = stitch(open_store(store), load_adapter(Path(run)), layers=layers or None, max_tokens=int(tokens),
               controls=tuple(controls.split(",")), quiet=True, **more)
Path(out).write_text(json.dumps(found))
"""
_ALL = ",".join(("token", *SHARED))


#: What is wanted of the speed over the former build's, and of the share of its time and of its peak memory.
SPEED = {"stitch": 1.7, "communicate": 1.5}
PEAK = {"generate": 0.6, "communicate": 0.6}
TIME = {"reproduce": 0.55}
#: How far losses may lie apart, nats.
APART = 1e-4


class Bench:
    """The two builds with a store and a run each.

    Args:
        work: Where these are made, and kept.
        models: Folder of the demo pair.
        small: Whether everything is to take seconds.
        layers: Source layers of stitched losses; empty for all.
    """

    def __init__(self, work: Path, models: Path, *, small: bool, layers: str = "") -> None:
        self.work, self.models, self.small, self.layers = work, models, small, layers
        self.builds = {FORMER: former_build(), THIS: REPOSITORY}

    def store(self, build: str) -> Path:
        """A build's own store of the demo's text."""
        path = self._of(build) / "store.zarr"
        if not (path / "zarr.json").is_file():
            text = _sample(self.builds[build])
            models = [part for name in ("smollm2", "twin") for part in ("--model", f"{name}={self.models / name}")]
            amount = ["--max-documents", "20" if self.small else "60", "--max-document-bytes", "1200"]
            layers = ["--layers", "0%,25%,50%,75%,100%"]
            command = ["extract", *models, "--dataset", f"jsonl:{text}", *amount, *layers, "--store", str(path)]
            self.run(build, ["-m", "featstore", *command])
        return path

    def fitted(self, build: str) -> Path:
        """A build's own run of affine maps in both directions."""
        path = self._of(build) / "affine"
        if not (path / "adapter.json").is_file():
            command = ["train", "--store", str(self.store(build)), "--type", "affine", "--both", "--out", str(path)]
            self.run(build, ["-m", "align", *command])
        return path

    def run(self, build: str, arguments: list[str]) -> Spent:
        """A command of a build."""
        return run_build(self.builds[build], arguments)

    def _of(self, build: str) -> Path:
        path = self.work / build.replace(" ", "-")
        path.mkdir(parents=True, exist_ok=True)
        return path


def _sample(build: Path) -> Path:
    """The demo's text, which lies elsewhere in the former build."""
    return next(build.glob("featstore/**/wikipedia_sample.jsonl.gz"))


Contender = Callable[[Path], tuple[Spent, dict[str, Any]]]


def stitching(bench: Bench) -> dict[str, Contender]:
    """Stitched losses of the middle layer, or of all, with the controls that both builds have, and with all."""

    def of(build: str, controls: str) -> Contender:
        def work(out: Path) -> tuple[Spent, dict[str, Any]]:
            layers, tokens = ("50%", "200") if bench.small else (bench.layers, "1200")
            given = [str(bench.store(build)), str(bench.fitted(build)), layers, tokens, controls]
            spent = bench.run(build, ["-c", _STITCH, *given, str(out / "stitch.json")])
            pairs = json.loads((out / "stitch.json").read_text())["pairs"]
            return spent, {
                f"{key} {name}": block["nats_per_token"]
                for key, entry in pairs.items()
                for name, block in entry["conditions"].items()
                if block is not None
            }

        return work

    shared = ",".join(SHARED)
    return {FORMER: of(FORMER, shared), THIS: of(THIS, shared), ALL: of(THIS, _ALL)}


def generating(bench: Bench) -> dict[str, Contender]:
    """Texts in both directions."""

    def of(build: str) -> Contender:
        def work(out: Path) -> tuple[Spent, dict[str, Any]]:
            run = _copied(bench.fitted(build), out)
            length = ["--max-new-tokens", "4" if bench.small else "32"]
            spent = bench.run(build, ["-m", "evaluate", "generate", "--adapter", str(run), "--layers", "50%", *length])
            found = json.loads((run / "generations.json").read_text())["entries"]
            return spent, {f"{i} {name}": text for i, entry in enumerate(found) for name, text in _texts(entry)}

        return work

    return {FORMER: of(FORMER), THIS: of(THIS)}


def communicating(bench: Bench) -> dict[str, Contender]:
    """Answers of the middle layer, the target's with itself among them."""

    def of(build: str) -> Contender:
        def work(out: Path) -> tuple[Spent, dict[str, Any]]:
            run = _copied(bench.fitted(build), out)
            amount = ["--examples", "4" if bench.small else "40"]
            command = ["communicate", "--adapter", str(run), "--layers", "50%", "--itself", *amount]
            spent = bench.run(build, ["-m", "evaluate", *command])
            tasks = json.loads((run / "communicate.json").read_text())["tasks"]
            return spent, {
                f"{key} {i} {name}": answer
                for key, task in tasks.items()
                for i, example in enumerate(task["examples"])
                for name, answer in example["given"].items()
            }

        return work

    return {FORMER: of(FORMER), THIS: of(THIS)}


def reproducing(bench: Bench) -> dict[str, Contender]:
    """The whole programme over a store that is there."""

    def of(build: str) -> Contender:
        def work(out: Path) -> tuple[Spent, dict[str, Any]]:
            little = ["--stitch-tokens", "200", "--examples", "4", "--epochs", "1", "--ranks", "8", "--latents", "8x32"]
            command = ["reproduce", "--store", str(bench.store(build)), "--out", str(out / "all")]
            spent = bench.run(build, ["-m", "evaluate", *command, *(little if bench.small else ())])
            answers = json.loads((out / "all" / "analysis.json").read_text())["answers"]
            return spent, {answer["question"]: answer["verdict"] for answer in answers}

        return work

    return {FORMER: of(FORMER), THIS: of(THIS)}


def _copied(run: Path, out: Path) -> Path:
    """A run of its own for a command that writes into it."""
    return Path(shutil.copytree(run, out / "run"))


def _texts(entry: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    found = [(name, entry[name]) for name in ("source_alone", "target_alone")]
    for role in ("source_to_target", "target_to_source"):
        found += [(f"{key} {name}", text) for key, texts in entry[role].items() for name, text in texts.items()]
    return found


MEASURES: Mapping[str, Callable[[Bench], dict[str, Contender]]] = {
    "stitch": stitching,
    "generate": generating,
    "communicate": communicating,
    "reproduce": reproducing,
}


def measured(bench: Bench, what: str, rounds: int) -> dict[str, Any]:
    """Run the contenders in turn.

    Args:
        bench: The builds.
        what: One of :data:`MEASURES`.
        rounds: That count; the caches of fingerprints and verdicts are filled by one before them.
    """
    contenders = MEASURES[what](bench)
    taken: dict[str, list[Spent]] = {name: [] for name in contenders}
    figures: dict[str, dict[str, Any]] = {}
    for number in range(0 if what == "reproduce" or rounds == 1 else -1, rounds):
        order = list(contenders)[:: 1 if number % 2 else -1]
        for name in order:
            with tempfile.TemporaryDirectory() as out:
                spent, figures[name] = contenders[name](Path(out))
            if number >= 0:
                taken[name].append(spent)
                print(
                    f"  {name}: {spent.seconds:.1f} s, {spent.cpu:.1f} CPU s, {spent.peak / 2**20:.0f} MiB", flush=True
                )
    rows = {}
    for name, all_ in taken.items():
        beside = list(zip(all_, taken[FORMER], strict=True))
        rows[name] = {
            "seconds": statistics.median(one.seconds for one in all_),
            "cpu_seconds": statistics.median(one.cpu for one in all_),
            "peak_mib": statistics.median(one.peak for one in all_) / 2**20,
            "time_ratio": statistics.median(one.seconds / other.seconds for one, other in beside),
            "cpu_ratio": statistics.median(one.cpu / other.cpu for one, other in beside),
            "peak_ratio": statistics.median(one.peak / other.peak for one, other in beside),
            "time_ratios": [one.seconds / other.seconds for one, other in beside],
            "peak_ratios": [one.peak / other.peak for one, other in beside],
            "all_seconds": [one.seconds for one in all_],
            "all_cpu_seconds": [one.cpu for one in all_],
        }
    apart = {name: compared(figures[FORMER], found) for name, found in figures.items()}
    return {"rows": rows, "figures": apart, "goals": goals_of(what, rows, apart)}


def compared(former: Mapping[str, Any], this: Mapping[str, Any]) -> dict[str, Any]:
    """How far the figures that two builds share lie apart: numbers by their largest difference, others by equality."""
    shared = [name for name in former if name in this]
    numbers = [
        abs(former[name] - this[name])
        for name in shared
        if isinstance(former[name], float) and isinstance(this[name], float)
    ]
    return {
        "shared": len(shared),
        "largest_difference": max(numbers, default=0.0),
        "unlike": [name for name in shared if not isinstance(former[name], float) and former[name] != this[name]],
    }


def losses(rounds: int) -> dict[str, float]:
    """Milliseconds of one position under one condition at the demo's vocabulary: its head, and its loss in two ways."""
    import torch

    from evaluate.stitching.predictions import compared, untouched

    draw = torch.Generator().manual_seed(0)
    count, positions, vocabulary, width = 7, 64, 49152, 576
    head = torch.randn((vocabulary, width), generator=draw)
    states = torch.randn((count, positions, width), generator=draw)
    logits, clean = (torch.randn((count * positions, vocabulary), generator=draw) for _ in range(2))
    wanted = torch.zeros((count * positions, 1), dtype=torch.long)
    own = untouched(torch.Tensor.float, clean[:positions], np.zeros(positions, np.int64))

    def plainly() -> None:
        log_q, log_p = logits.float().log_softmax(-1), clean.float().log_softmax(-1)
        _ = -log_q.gather(1, wanted), (log_p.exp() * (log_p - log_q)).sum(-1), log_p.argmax(-1) == log_q.argmax(-1)

    contenders = {
        "head": lambda: states.flatten(0, 1) @ head.T,
        "loss, all rows at once": plainly,
        "loss, a few rows at a time": lambda: compared(
            torch.Tensor.float, logits.unflatten(0, (count, positions)), own
        ),
    }
    with torch.inference_mode():
        taken = interleaved(contenders, rounds)
    return {name: 1000 * statistics.median(values) / (count * positions) for name, values in taken.items()}


def shown(what: str, found: Mapping[str, Any]) -> str:
    """Lines for people."""
    lines = [f"{what}, medians; ratios are medians of those within a round"]
    lines.append(f"  {'':28} {'seconds':>8} {'CPU s':>8} {'MiB':>7} {'time':>6} {'CPU':>6} {'peak':>6}")
    for name, row in found["rows"].items():
        figures = f"{row['seconds']:8.1f} {row['cpu_seconds']:8.1f} {row['peak_mib']:7.0f}"
        lines.append(f"  {name:28} {figures} {row['time_ratio']:6.2f} {row['cpu_ratio']:6.2f} {row['peak_ratio']:6.2f}")
    for name, apart in found["figures"].items():
        if name != FORMER:
            unlike = f", unlike: {len(apart['unlike'])}" if apart["unlike"] else ""
            lines.append(
                f"  {name}: {apart['shared']} shared figures, at most {apart['largest_difference']:.2g} apart{unlike}"
            )
    lines.append(judged(found["goals"]))
    return "\n".join(lines)


def goals_of(what: str, rows: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was wanted of this build beside the former one."""
    row, goals = rows[THIS], {}
    if what in SPEED:
        goals[f"evaluate {what}: speed over the former build"] = at_least(
            SPEED[what], *(1 / ratio for ratio in row["time_ratios"])
        )
    if what in TIME:
        goals[f"evaluate {what}: share of the former build's time"] = at_most(TIME[what], *row["time_ratios"])
    if what in PEAK:
        goals[f"evaluate {what}: share of the former build's peak memory"] = at_most(PEAK[what], *row["peak_ratios"])
    if what == "stitch":
        goals["evaluate stitch: largest difference of a figure, nats"] = at_most(
            APART, figures[THIS]["largest_difference"]
        )
    return recorded(goals)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=[*MEASURES, "loss", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="little text, few tokens: a check of the benchmark")
    parser.add_argument("--layers", default="", help="source layers of stitched losses; all by default")
    parser.add_argument("--models", type=Path, help="folder of the demo pair; built where it is not given")
    parser.add_argument("--work", type=Path, help="keep stores and runs here for the next time")
    parser.add_argument("--keep", action="store_true", help="write the result beside the benchmarks")
    given = parser.parse_args()
    if given.what == "loss":
        sys.path.insert(0, str(REPOSITORY))
        print("milliseconds of a position under a condition, 49,152 tokens of vocabulary")
        for name, value in losses(given.rounds).items():
            print(f"  {name:28} {value:.2f}")
        return
    with tempfile.TemporaryDirectory() as own:
        models = given.models or _pair()
        bench = Bench((given.work or Path(own)).resolve(), models.resolve(), small=given.small, layers=given.layers)
        result: dict[str, Any] = {"machine": machine(), "versions": versions_of("torch", "transformers", "numpy")}
        for what in MEASURES if given.what == "all" else [given.what]:
            result[what] = measured(bench, what, given.rounds)
            print(shown(what, result[what]), flush=True)
    if given.keep and not given.small:
        suffix = "" if given.what == "all" else f"_{given.what}"
        print(f"written: {keep(f'bench_evaluate{suffix}', result)}")


def _pair() -> Path:
    """The demo pair, built where it is not there yet."""
    sys.path.insert(0, str(REPOSITORY))
    from featstore.demo.pair import build_pair

    cache = REPOSITORY / ".cache/demo"
    build_pair(cache, cache / "assets")
    return cache


if __name__ == "__main__":
    main()
