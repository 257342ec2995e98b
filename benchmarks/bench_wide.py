"""Every type of map, CKA and moments at the width of the models they are for, the former build beside.

    python benchmarks/bench_wide.py                      # width 4096: makes the store once, then five rounds
    python benchmarks/bench_wide.py --small              # width 256, closed forms only, under two minutes
    python benchmarks/bench_wide.py --only procrustes,cka --rounds 3
    python benchmarks/bench_wide.py --device cuda        # ours and the former build's with --device cuda

Two models of Llama-3.1-8B's and Mistral-7B's shape with random weights and their own tokenizers (`_wide.py`) are made
and their states extracted once; both stay in `--directory`. Every job is then a command in a process of its own, with
the controls and baselines that the command has by default: seconds, CPU seconds and peak memory. Where the former
build has the command, it runs it in the same round, in random order; a ratio is this build's over the former one's, the
median over rounds. Types trained by gradient take a few steps over a subset of the pairs: enough to time them, not to
judge the maps. `closed` is the three closed forms in one command (one sweep where this build has one) against the sum
of the former build's three.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _former import FORMER, REPOSITORY, Spent, former_build, run_build
from _measure import Goal, at_most, judged, keep, machine, recorded, versions_of
from _wide import Wide, former_store, made_store

#: Fields of a process that are compared.
FIELDS = ("seconds", "cpu", "peak")
SMALL = Wide(width=256, tokens=8000)
_ALONE = {"seconds": 0.5, "peak": 0.5}
#: By job the largest share of the former build's time and peak memory.
WANTED = {
    "procrustes": _ALONE,
    "affine": _ALONE,
    "reduced-rank": _ALONE,
    "closed": {"seconds": 0.3, "peak": 0.5},
}
#: Jobs of the small mode, if no others are asked for: those that need no torch, which takes longer to load than they.
QUICK = "procrustes,affine,reduced-rank,closed,cka,moments"


@dataclass(frozen=True)
class Job:
    """One thing that is timed.

    Attributes:
        commands: Of each build by name, ``{store}`` and ``{out}`` to be filled in; several are summed.
        copies: Whether the command writes into the store, so that it gets one of its own.
    """

    commands: Mapping[str, Sequence[Sequence[str]]]
    copies: bool = False


@dataclass(frozen=True)
class Build:
    """One of the two contenders.

    Attributes:
        sources: Folder with its packages.
        store: The states as it reads them; not written to.
    """

    sources: Path
    store: Path


@dataclass
class Measured:
    """What a job took in every round, by build."""

    rounds: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def add(self, build: str, spent: Sequence[Spent]) -> None:
        figures = {
            "seconds": sum(one.seconds for one in spent),
            "cpu": sum(one.cpu for one in spent),
            "peak": float(max(one.peak for one in spent)),
        }
        self.rounds.setdefault(build, []).append(figures)

    def median(self, build: str, name: str) -> float:
        return statistics.median(one[name] for one in self.rounds[build])

    def ratios(self, name: str) -> list[float]:
        """Of this build to the former one, in every round; none where that did not run."""
        pairs = zip(self.rounds["this"], self.rounds.get("former", ()), strict=False)
        return [mine[name] / theirs[name] for mine, theirs in pairs]

    def ratio(self, name: str) -> float | None:
        """Their median."""
        found = self.ratios(name)
        return statistics.median(found) if found else None


def _train(type_: str, *more: str) -> list[str]:
    return ["-m", "align", "train", "--store", "{store}", "--out", "{out}", "--type", type_, *more]


def jobs(wide: Wide, rows: int) -> dict[str, Job]:
    """Everything that is timed.

    Args:
        wide: Sizes and device.
        rows: Train pairs of the types that are trained by gradient.
    """
    last = str(wide.layers[-1])
    where = ("--layer-map", f"{last}:{last}", "--device", wide.device)
    few = ("--max-rows", str(rows), "--epochs", "1", "--cka-every", "0", "--tracker", "none")
    windows = ("--epochs", "1", "--cka-every", "0", "--tracker", "none")
    closed = {name: _train(name, *where) for name in ("procrustes", "affine", "reduced-rank")}
    both = {
        **closed,
        "linear": _train("linear", *where),
        "reduced-rank-identity": _train("reduced-rank", *where, "--skip", "identity"),
        "lora": _train("lora", *where, *few),
        "mlp": _train("mlp", *where, *few),
        "compress": _train("compress", *where, *windows),
        "cka": ["-m", "align", "cka", "--store", "{store}", "--out", "{out}"],
    }
    found = {name: Job({"this": [command], "former": [command]}) for name, command in both.items()}
    moments = ["-m", "featstore", "moments", "{store}"]
    found["moments"] = Job({"this": [moments], "former": [moments]}, copies=True)
    # One command that shares what the types have in common.
    grid = ["--types", "procrustes,affine,reduced-rank", "--layers", last]
    sweep = ["-m", "align", "sweep", "--store", "{store}", "--out", "{out}", *grid]
    found["closed"] = Job({"this": [sweep], "former": list(closed.values())})
    return found


def measure(
    chosen: Mapping[str, Job], builds: Mapping[str, Build], rounds: int, report: Callable[[str], None]
) -> dict[str, Measured]:
    """Run every job of every build in every round; a command that several jobs have runs once a round.

    Args:
        chosen: Jobs by name.
        builds: By name.
        rounds: How often.
        report: Told of every command that has ended.
    """
    order, found = random.Random(0), {name: Measured() for name in chosen}
    for number in range(rounds):
        known: dict[tuple[str, tuple[str, ...]], Spent] = {}
        for name, job in chosen.items():
            for build in order.sample(sorted(builds), len(builds)):
                if build not in job.commands:
                    continue
                found[name].add(build, run_job(job, build, builds[build], known))
                took = found[name].rounds[build][-1]
                report(
                    f"round {number + 1} of {rounds}: {name} {build}: {took['seconds']:.1f} s, "
                    f"{took['cpu']:.1f} CPU s, {took['peak'] / 2**30:.2f} GiB"
                )
    return found


def run_job(job: Job, name: str, build: Build, known: dict[tuple[str, tuple[str, ...]], Spent]) -> list[Spent]:
    """Run a job's commands one after the other, each in a process.

    Args:
        job: What to run.
        name: Whose commands.
        build: The build; its store is copied where the job writes into it.
        known: What commands of this round took, by build and command; filled.
    """
    with tempfile.TemporaryDirectory(dir=build.store.parent) as folder:
        aside = Path(folder)
        used = build.store
        if job.copies:
            # Hard links: a writer replaces files and never changes one.
            used = Path(shutil.copytree(used, aside / used.name, copy_function=os.link))
        spent = []
        for number, command in enumerate(job.commands[name]):
            if (key := (name, tuple(command))) not in known:
                places = {"store": str(used), "out": str(aside / f"run-{number}")}
                known[key] = run_build(build.sources, [part.format(**places) for part in command])
            spent.append(known[key])
        return spent


def table(found: Mapping[str, Measured]) -> str:
    """Lines for people."""
    lines = [f"{'':22} {'seconds':>9} {'CPU s':>9} {'peak GiB':>9}   ratios to the former build: seconds, CPU, peak"]
    for name, one in found.items():
        mine = [one.median("this", key) for key in FIELDS]
        ratios = [one.ratio(key) for key in FIELDS]
        told = "  ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"{name:22} {mine[0]:9.1f} {mine[1]:9.1f} {mine[2] / 2**30:9.2f}   {told}")
    return "\n".join(lines)


def wanted_of(found: Mapping[str, Measured], width: int) -> dict[str, Goal]:
    """What was wanted of this build beside the former one."""
    goals = {}
    for name, most in WANTED.items():
        for figure, words in (("seconds", "time"), ("peak", "memory")):
            ratios = found[name].ratios(figure) if name in found else []
            if ratios and figure in most:
                goals[f"width {width}, {name}: share of the former build's {words}"] = at_most(most[figure], *ratios)
    return goals


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=2, help="of each model")
    parser.add_argument("--tokens", type=int, default=26000, help="of each model; 26,000 make 21.7 k pairs")
    parser.add_argument("--rows", type=int, default=2048, help="train pairs of types trained by gradient")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="jobs, such as procrustes,cka; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--directory", type=Path, default=REPOSITORY / ".cache" / "wide", help="of models and stores")
    parser.add_argument(
        "--small",
        action="store_true",
        help="width 256, few pairs, one round unless more are asked for, no types trained by gradient",
    )
    parser.add_argument("--alone", action="store_true", help="leave the former build out")
    parser.add_argument(
        "--keep",
        nargs="?",
        const="",
        metavar="PART",
        help="write benchmarks/results/bench_wide.json, or bench_wide_PART.json beside it for other jobs",
    )
    found = parser.parse_args(arguments)
    if found.small:
        found.width, found.tokens, found.rows = SMALL.width, SMALL.tokens, 512
        found.rounds = 1 if found.rounds == parser.get_default("rounds") else found.rounds
        found.only = found.only or QUICK
    return found


def main() -> None:
    options = parsed()
    wide = Wide(options.width, options.blocks, options.tokens, options.device)
    known = jobs(wide, options.rows)
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--only {','.join(unknown)}: there is no such job; choose of {', '.join(known)}")
    before = machine()
    store, extracted = made_store(wide, options.directory.resolve())
    extraction: dict[str, Any] = {} if extracted is None else {key: getattr(extracted, key) for key in FIELDS}
    if extracted is not None:
        print(f"extracted in {extracted.seconds:.1f} s, {extracted.cpu:.1f} CPU s", flush=True)
    builds = {"this": Build(REPOSITORY, store)}
    if not options.alone:
        builds["former"] = Build(former_build(), former_store(store))
    chosen = {name: known[name] for name in names}
    found = measure(chosen, builds, options.rounds, lambda line: print(line, flush=True))
    goals = recorded(wanted_of(found, wide.width))
    print(table(found))
    print(judged(goals))
    if options.keep is not None:
        result = {
            "device": {**before, "threads": os.environ.get("OMP_NUM_THREADS", "all"), "compute": options.device},
            "versions": versions_of("featstore", "numpy", "scipy", "torch", "transformers", "threadpoolctl"),
            "former": FORMER,
            "width": wide.width,
            "layers": wide.layers,
            "tokens": wide.tokens,
            "extraction": extraction,
            "goals": goals,
            "jobs": {name: one.rounds for name, one in found.items()},
            "ratios": {name: {key: one.ratio(key) for key in FIELDS} for name, one in found.items()},
        }
        print(keep(f"bench_wide_{options.keep}" if options.keep else "bench_wide", result))


if __name__ == "__main__":
    main()
