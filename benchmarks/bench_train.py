"""Steps a second of the gradient loop over a store, against the same arithmetic on tensors that are already there.

    python benchmarks/bench_train.py --width 512 --json
    python benchmarks/bench_train.py --device cuda --pairs 2.5M --width 4096 --whole-epoch --json

Both take forward pass, loss, backward pass, clipping, AdamW and the average of the weights. The loop also reads, widens
and copies rows, checks losses and keeps figures; CKA is off, and timed apart as a share of the steps between two of its
figures. Rounds are interleaved. The rows of a large store are a few shards under many names: what is measured is the
loop, not the disk, and the page cache holds them.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _measure import RESULTS, at_least, at_most, interleaved, judged, keep, machine, ratios, recorded, versions_of
from bench_loader import FORM, pairs_of, states

from align.layers import LayerPair
from align.maps.registry import map_type
from align.moments.scan import Scan
from align.moments.scatter import moments_of
from align.runs.plan import training_plan
from align.settings import LoopSettings
from align.training.loop import Training
from align.training.progress import Progress
from featstore.runtime.quantities import parse_budget
from featstore.store.format.documents import rows_document
from featstore.store.format.shards import LAYOUTS, encode_shard
from featstore.store.read.loader import SHARD_ROWS, PairBatches
from featstore.store.read.rows import RowReader

LAYOUT = LAYOUTS["hot"]
#: Goals: the loop's speed over that of the bare steps, and the share of CKA every 100 steps.
GOAL, CKA_GOAL = 0.95, 0.02


def write(path: Path, rows: int, width: int, distinct: int, seed: int) -> RowReader:
    """A store's shards, of which only some differ."""
    shards = -(-rows // SHARD_ROWS)
    for shard in range(shards):
        file = path / "c" / str(shard) / "0"
        file.parent.mkdir(parents=True)
        if shard < distinct:
            file.write_bytes(encode_shard(states(SHARD_ROWS, width, seed + shard), SHARD_ROWS, LAYOUT))
        else:
            os.link(path / "c" / str(shard % distinct) / "0", file)
    return RowReader(path, rows_document(shards * SHARD_ROWS, width, SHARD_ROWS, FORM, LAYOUT))


def spread(values: list[float]) -> dict[str, float]:
    p20, p50, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return {"p20": p20, "p50": p50, "p80": p80}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", default="affine", choices=["lora", "mlp", "linear", "affine"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--pairs", type=parse_budget, default=65_536, help="pairs of an epoch, such as 2.5M")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=150, help="steps of a round")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--distinct", type=int, default=2, help="shards of a side that differ")
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary directory")
    parser.add_argument("--whole-epoch", action="store_true", help="time one, instead of working it out")
    parser.add_argument("--json", action="store_true", help="one line instead of an indented object")
    parser.add_argument("--keep", action="store_true", help="add it to benchmarks/results/bench_train[_cuda].json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        result = measure(arguments, Path(name))
    print(json.dumps(result, indent=None if arguments.json else 2))
    if not arguments.json:
        print(judged(result["goals"]))
    if arguments.keep:
        print(kept_with_others("bench_train_cuda" if arguments.device.startswith("cuda") else "bench_train", result))


def kept_with_others(name: str, result: dict) -> Path:
    """Write a result in the place of the last one of its type, width and batch."""
    own, file = ("type", "width", "batch_size"), RESULTS / f"{name}.json"
    held = json.loads(file.read_text()) if file.is_file() else []
    others = [one for one in held if any(one[key] != result[key] for key in own)]
    return keep(name, [*others, result])


def measure(arguments: argparse.Namespace, root: Path) -> dict:
    size, width = arguments.batch_size, arguments.width
    rows = max(arguments.pairs, arguments.steps * size)
    x, y = (write(root / side, int(rows / 0.88), width, arguments.distinct, 100 * i) for i, side in enumerate("ab"))
    everything = pairs_of(x.rows)
    epoch = PairBatches(x, y, everything.where(np.arange(len(everything)) < arguments.pairs))
    some = PairBatches(x, y, everything.where(np.arange(len(everything)) < arguments.steps * size))
    val = PairBatches(x, y, everything.where(np.arange(len(everything)) < 2048))
    training = trainer(arguments, some, val)
    sync = torch.cuda.synchronize if training.device.type == "cuda" else lambda: None
    kept = resident(some, size, training.device)
    bare = trainer(arguments, some, val)
    contenders: dict[str, Callable[[], object]] = {
        "bare steps": lambda: (bare_steps(bare, kept), sync()),
        "loop": lambda: (loop_steps(training), sync()),
    }
    taken = interleaved(contenders, arguments.runs)
    ratio = ratios(taken, "bare steps")["loop"]
    rounds = [bare / loop for bare, loop in zip(taken["bare steps"], taken["loop"], strict=True)]
    per_step = {name: spread([1e3 * value / arguments.steps for value in values]) for name, values in taken.items()}
    cka = spread([probe_seconds(training, sync) for _ in range(arguments.runs + 2)][2:])
    share = cka["p50"] / (100 * per_step["loop"]["p50"] / 1e3)
    steps = -(-len(epoch) // size)
    result = {
        "device": torch.cuda.get_device_name() if training.device.type == "cuda" else "cpu",
        "machine": machine(),
        "versions": versions_of("torch", "accelerate", "numpy", "zarr"),
        "type": arguments.type,
        "precision": training.identity["precision"],
        "width": width,
        "batch_size": size,
        "threads": torch.get_num_threads(),
        "milliseconds_per_step": per_step,
        "loop_to_bare": ratio,
        "cka_milliseconds": {name: 1e3 * value for name, value in cka.items()},
        "cka_share_every_100_steps": share,
        "epoch": {
            "pairs": len(epoch),
            "steps": steps,
            "seconds": steps * per_step["loop"]["p50"] / 1e3,
            "measured": False,
        },
        "goals": recorded(
            {
                f"training at width {width}: speed over bare steps": at_least(GOAL, *rounds),
                f"training at width {width}: share of CKA every 100 steps": at_most(CKA_GOAL, share),
            }
        ),
    }
    if arguments.whole_epoch:
        whole = trainer(arguments, epoch, val)
        start = time.perf_counter()
        loop_steps(whole)
        sync()
        result["epoch"] |= {"seconds": time.perf_counter() - start, "measured": True}
    return result


def trainer(arguments: argparse.Namespace, train: PairBatches, val: PairBatches) -> Training:
    """A training before its first step."""
    settings = LoopSettings(
        device=arguments.device,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        lr=1e-3,
        epochs=10_000,
        skip="none",
        cka_every=1_000_000,
        # What whitening costs is a solver's business; here it need only be there.
        precondition=False,
    )
    block = next(iter(val.blocks(2048)))
    moments = moments_of(block.x, block.y, block.x.mean(0), block.y.mean(0))
    pair = LayerPair("a", (1,), "b", 1)
    silent = dict.fromkeys(("on_epoch", "on_map", "on_step", "tick"), lambda _: None)
    training = Training(
        training_plan(map_type(arguments.type), settings), pair, Scan(moments, moments), train, val,
        skip=None, **silent, checkpoint=None, store="",
    )  # fmt: skip
    # As in a real training, where whitening is on: one product more for every row.
    training.engine.module.preconditioner = torch.eye(arguments.width, device=training.device)
    training.engine.average.preconditioner = training.engine.module.preconditioner
    return training


def resident(batches: PairBatches, size: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The rows of a round, at most a gigabyte of them."""
    most = max((1 << 30) // (8 * size * batches.source.width), 4)
    kept = []
    for batch in batches.shuffled(size, 0, 1):
        kept.append(tuple(torch.from_numpy(rows).to(device) for rows in batch))
        if len(kept) == most:
            break
    return kept


def bare_steps(training: Training, kept: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """What a step must do, in plain torch, as many times as the loop does it."""
    engine, clip = training.engine, training.schedule.clip
    weights, means = list(engine.module.parameters()), list(engine.average.parameters())
    if not hasattr(training, "plain"):
        training.plain = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0, fused=True)
    half = training.identity["precision"] == "bfloat16"
    kind = training.device.type
    for step in range(training.steps):
        x, y = kept[step % len(kept)]
        with torch.autocast(kind, torch.bfloat16, enabled=half):
            y_hat = engine.module(x)
        training.objective(y_hat, y)[0].backward()
        torch.nn.utils.clip_grad_norm_(weights, clip)
        training.plain.step()
        training.plain.zero_grad(set_to_none=True)
        torch._foreach_lerp_(means, weights, 0.01)


def loop_steps(training: Training) -> None:
    epoch = training.progress.epoch
    training.take_steps(time.perf_counter())
    training.progress = Progress(epoch=epoch + 1, taken=training.progress.taken)


def probe_seconds(training: Training, sync: Callable[[], object]) -> float:
    sync()
    return training.probe(training.engine.average)[1]


if __name__ == "__main__":
    main()
