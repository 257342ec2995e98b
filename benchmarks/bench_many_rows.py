"""All of Wikitext-103 as far as metadata go: 70,000 units, 100 million rows of each model and as many pairs.

    python benchmarks/bench_many_rows.py --directory /scratch --former

The store is simulated (`tests/support/many_rows.py`): every document, unit, token and pair is there, and the rows of
a shard are those of all others, so that it takes two gigabytes. Each task runs in a process of its own, by this build
and, with `--former`, by the last one that read a manifest document by document. What counts is the task's seconds, its
processor seconds and the largest resident set of the process, imports and all. A task that takes more than `--memory`
is stopped there and has no figures. With `--small` it takes seconds, and its figures mean nothing.

Goals: the store opens within 1 s and 300 MB; a resume is planned within 10 s; selecting a split, drawing 10,000 pairs
and going through the order of an epoch takes at most 1 GB; so does the process that hands out the tasks of a scan over
rows, with fewer than 100,000 tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _former import REPOSITORY, former_build
from _measure import Goal, at_most, judged, keep, machine, recorded, versions_of

from tests.support.many_rows import SMALL, Size, begin, finish

_MB = 1e6
#: The last build that read one document for every unit, and held every column of a pair.
BEFORE = "57ec956"

#: What each task does: sources that both builds run, with `path` set. What is printed last is its figures.
TASKS = {
    "resume": """
from pathlib import Path
from featstore.store.format.elements import FORMATS
from featstore.store.format.shards import LAYOUTS
from featstore.store.write.row_writer import RowArrays, RowWriter
from featstore.store.write.writer import StoreWriter, exclusive
import json
begun = time.perf_counter()
with exclusive(Path(path)):
    writer = StoreWriter(Path(path))
    missing = 0
    for name in ("a", "b"):
        held = writer.view.model(name)
        rows = RowWriter(writer, name, RowArrays(held.rows, held.width, held.layers, held.attributes["shard_rows"],
            FORMATS["bfloat16"], LAYOUTS["hot"]))
        size = held.attributes["shard_rows"]
        missing += sum(len(rows.missing(at, at + size)) for at in range(0, held.rows, size))
print(json.dumps({"seconds": time.perf_counter() - begun, "missing": missing}))
""",
    "open": """
from featstore import open_store
import json
begun = time.perf_counter()
store = open_store(path)
print(json.dumps({"seconds": time.perf_counter() - begun, "models": len(store.models)}))
""",
    "fingerprint": """
from featstore import open_store
import json
store = open_store(path)
begun = time.perf_counter()
found = store.fingerprint
print(json.dumps({"seconds": time.perf_counter() - begun, "fingerprint": found}))
""",
    "select, sample, epoch": """
from featstore import open_store
from align.moments.scan import limit_rows
from featstore.store.read.loader import PairBatches
import hashlib, json
import numpy as np
store = open_store(path)
begun = time.perf_counter()
pairs = store.pairs("a", "b").select(split=0)
selected = time.perf_counter()
some = limit_rows(pairs, 10_000, 0)
x, y = store.rows("a", 1)[some.row_source], store.rows("b", 1)[some.row_target]
total = hashlib.sha256(np.asarray(some.row_source).tobytes() + np.asarray(some.token).tobytes() + x.tobytes())
sampled = time.perf_counter()
order = PairBatches(store.rows("a", 1), store.rows("b", 1), pairs, 1 << 28).order(1024, 0, 1)
seen = 0
for number in range(-(-len(order) // order.buffer_pairs)):
    buffer = order.buffer(number)
    seen += len(buffer)
    if number % 7 == 0:
        total.update(pairs.row_source[buffer].tobytes() + pairs.row_target[buffer].tobytes())
ended = time.perf_counter()
print(json.dumps({"seconds": ended - begun, "select": selected - begun, "sample": sampled - selected,
    "epoch": ended - sampled, "pairs": seen, "sha256": total.hexdigest()}))
""",
    "verify": """
from pathlib import Path
from featstore.store.inspect.verify import verify_store
import json
begun = time.perf_counter()
found = verify_store(Path(path), quiet=True)
print(json.dumps({"seconds": time.perf_counter() - begun, "files": found["files"], "damage": len(found["damage"])}))
""",
}

#: A scan of two layers by a scheduler in a process of its own, whose memory is measured, with one worker beside it.
SCAN = """
import json, subprocess, sys, tempfile
from pathlib import Path
from align.execution.cluster import Cluster
from align.similarity.scan.planning import Selection, Site
from align.similarity.scan.streaming import stream
from featstore import open_store

def peak():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def main():
    from distributed import Client
    store = open_store(path)
    selection = Selection(str(Path(path).absolute()), store.fingerprint, "a", "b", "end", False)
    counted = {"tasks": 0}
    class Counted(Cluster):
        def submit(self, function, /, *arguments):
            counted["tasks"] += 1
            return super().submit(function, *arguments)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "scheduler.json"
        started = [
            subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_scheduler", "--scheduler-file", str(where),
                "--port", "0", "--no-dashboard", "--host", "127.0.0.1"], stderr=subprocess.DEVNULL),
            subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(where),
                "--nthreads", "2", "--nworkers", "1", "--no-dashboard", "--no-nanny", "--memory-limit", "0"],
                stderr=subprocess.DEVNULL, cwd=folder),
        ]
        try:
            with Client(scheduler_file=str(where), timeout=60) as client:
                begun = time.perf_counter()
                stream(selection, [Site("a", 1, True), Site("b", 1, False)], executor=Counted(client), ranks=False,
                    quiet=True)
                spent = time.perf_counter() - begun
                found = {"scheduler": client.run_on_scheduler(peak), "worker": max(client.run(peak).values())}
        finally:
            for process in started:
                process.kill()
    print(json.dumps({"seconds": spent, **counted, **found, "client": peak()}))

main()
"""
TASKS["scan"] = SCAN


#: By task and figure the most it may take.
WANTED = {
    "open": {("seconds", "s"): 1.0, ("peak", "MB"): 300.0},
    "resume": {("seconds", "s"): 10.0},
    "select, sample, epoch": {("peak", "MB"): 1000.0},
    "scan": {("scheduler", "MB"): 1000.0, ("tasks", "tasks"): 100_000.0},
}


def spend(build: Path, source: str, path: Path, memory: int, seconds: float) -> dict[str, Any]:
    """Run a task; its figures, or why there are none."""
    bound = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({memory}, {memory}))"
    script = f"import time\n{bound}\npath = {str(path)!r}\n{source}"
    own = {**os.environ, "PYTHONPATH": str(build), "HF_HUB_OFFLINE": "1"}

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=out, stderr=err, env=own, cwd=build)
        begun = time.perf_counter()
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.perf_counter() - begun > seconds:
                process.kill()
                os.wait4(process.pid, 0)
                process.returncode = -9
                return {"stopped": f"after {seconds:g} s"}
            time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
        out.seek(0)
        err.seek(0)
        if process.returncode:
            last = (err.readlines() or ["killed"])[-1].strip()
            return {"stopped": f"at {peak / _MB:.0f} MB: {last[:120]}", "peak": peak}
        return {"cpu": cpu, "peak": peak, **json.loads(out.read().splitlines()[-1])}


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every figure of some runs; what is no figure has to be the same."""
    if any("stopped" in run for run in runs):
        return next(run for run in runs if "stopped" in run)
    return {
        key: statistics.median(run[key] for run in runs) if isinstance(value, float) else value
        for key, value in runs[0].items()
    }


def measure(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    size = SMALL if arguments.small else Size()
    builds = {"this build": REPOSITORY, **({"former build": former_build(BEFORE)} if arguments.former else {})}
    path = root / "simulated"
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": versions_of("numpy", "zarr", "dask"),
        "units": size.units,
        "rows": size.rows,
        "tasks": {},
    }
    memory, goals = int(arguments.memory * 1e9), {}
    begin(path, size)
    for title, source in TASKS.items():
        if title == "open":
            finish(path, size)
        if arguments.only and title not in arguments.only:
            continue
        runs = 1 if title in ("verify", "scan") else arguments.runs
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in builds}
        for _ in range(runs):
            for name, build in builds.items():
                taken[name].append(spend(build, source, path, memory, arguments.seconds))
                print(title, name, json.dumps(taken[name][-1]), file=sys.stderr)
        result["tasks"][title] = {name: middle(of) for name, of in taken.items()}
        goals |= wanted_of(title, taken["this build"])
    result["goals"] = recorded(goals)
    return result


def wanted_of(title: str, runs: list[dict[str, Any]]) -> dict[str, Goal]:
    """The goals of a task; one that was stopped has none."""
    what, goals = f"100 M rows, {title}", {}
    for (key, unit), most in WANTED.get(title, {}).items():
        scale = _MB if unit == "MB" else 1
        if all(key in run for run in runs):
            name = "MB of the scheduler" if key == "scheduler" else unit
            goals[f"{what}: {name}"] = at_most(most, *(run[key] / scale for run in runs))
    return goals


def text_of(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['units']} units of rows, {result['rows']} rows of each model"]
    for title, of in result["tasks"].items():
        for name, run in of.items():
            said = run.get("stopped") or (
                f"{run['seconds']:8.2f} s {run['cpu']:8.2f} s of processor {run['peak'] / _MB:8.0f} MB"
            )
            if "tasks" in run:
                said += f"; {run['tasks']} tasks, scheduler {run['scheduler'] / _MB:.0f} MB"
            lines.append(f"  {title:24} {name:14} {said}")
    return "\n".join([*lines, judged(result["goals"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a store of 128 units")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--former", action="store_true", help="run the former build beside this one")
    parser.add_argument("--memory", type=float, default=8.0, help="GB that a task may take before it is stopped")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which a task is stopped")
    parser.add_argument("--only", nargs="*", help="titles of the tasks to run")
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary directory")
    parser.add_argument("--json", action="store_true", help="one line instead of a table")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/bench_many_rows.json")
    arguments = parser.parse_args()
    if arguments.small and arguments.keep:
        parser.error("--keep: the figures of --small mean nothing, leave one of the two out")
    root = Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        result = measure(arguments, root)
    finally:
        shutil.rmtree(root)
    print(json.dumps(result) if arguments.json else text_of(result))
    stopped = [title for title, of in result["tasks"].items() if "stopped" in of["this build"]]
    if arguments.keep and stopped:
        raise SystemExit(f"nothing is kept: {', '.join(stopped)} was stopped; allow --seconds or --memory")
    if arguments.keep:
        print(f"written to {keep('bench_many_rows', result)}")


if __name__ == "__main__":
    main()
