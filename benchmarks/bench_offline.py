"""One epoch of `lora` from a store, against the same epoch with both models in the loop.

    OMP_NUM_THREADS=2 python benchmarks/bench_offline.py --documents 12

In the loop both models read the windows of the train and validation documents, and then the same steps follow; so its
epoch is that forward pass and the offline epoch added up. Two ways: the whole models with all their hidden states, as
one asks transformers for them, and no further than the mapped layer. Rounds are interleaved; the goal is a hundredfold.
Needs the demo models, which `featstore demo` or `featstore calibrate` builds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import at_least, judged, keep, machine, recorded, seconds, versions_of

from align.runs.train import train
from align.settings import LoopSettings, Settings
from featstore.demo.pair import build_pair
from featstore.demo.sample import sample_path
from featstore.models import loading as models
from featstore.models import residual as sites
from featstore.models.references import parse_model
from featstore.models.stack import residual_stream
from featstore.store import Store, open_store

CACHE = Path(__file__).parents[1] / ".cache" / "demo"
WANTED = 100


def extract(store: Path, references: list[str], documents: int) -> Store:
    named = [word for reference in references for word in ("--model", reference)]
    size = ("--max-documents", str(documents), "--max-document-bytes", "1200", "--layers", "50%")
    command = ("extract", *named, "--dataset", f"jsonl:{sample_path()}", *size, "--store", str(store))
    subprocess.run([sys.executable, "-m", "featstore", *command], check=True, stdout=subprocess.DEVNULL)
    return open_store(store)


def windows(store: Store, name: str, batch: int) -> list[torch.Tensor]:
    """Token ids of the train and validation windows, the longest first so that a batch pads little."""
    tokens, corpus = store.tokens(name), store.corpus
    split = corpus.document_split[corpus.window_document]
    found = [tokens.id[tokens.window == w] for w in np.flatnonzero(split < 2)]
    found = sorted((ids for ids in found if len(ids)), key=len, reverse=True)
    batches = []
    for start in range(0, len(found), batch):
        part = found[start : start + batch]
        ids = torch.zeros((len(part), len(part[0])), dtype=torch.long)
        for row, one in zip(ids, part, strict=True):
            row[: len(one)] = torch.from_numpy(one.astype(np.int64))
        batches.append(ids)
    return batches


def epoch_seconds(store: Store, out: Path, epochs: int) -> list[float]:
    """What the log says of every epoch, without epoch 0, which trains nothing."""
    loop = LoopSettings(epochs=epochs, patience=epochs)
    train(Settings(str(store.path), "lora", loop=loop), out, quiet=True)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines if line["event"] == "epoch" and line["epoch"] > 0]


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    pair = build_pair(CACHE, CACHE / "assets")
    references = [f"smollm2={pair.source}", f"twin={pair.target}"]
    store = extract(directory / "s.zarr", references, arguments.documents)
    read = []
    for reference in references:
        spec = parse_model(reference)
        model = models.load_model(spec, device="cpu", dtype="float32")
        read.append((model, windows(store, spec.name, arguments.batch), store.model(spec.name).layers))

    @torch.inference_mode()
    def forward() -> None:
        for model, batches, layers in read:
            stream = residual_stream(model)
            for ids in batches:
                sites.capture(stream, ids, layers)

    @torch.inference_mode()
    def whole() -> None:
        for model, batches, _ in read:
            for ids in batches:
                model(input_ids=ids, output_hidden_states=True, use_cache=False)

    offline, online, all_through = [], [], []
    for run in range(arguments.runs + 1):
        steps = epoch_seconds(store, directory / f"run{run}", arguments.epochs)
        reading, reading_all = seconds(forward), seconds(whole)
        if run:  # the first round warms up
            offline.append(statistics.median(steps))
            online.append(reading + offline[-1])
            all_through.append(reading_all + offline[-1])
    pairs = store.pairs(*store.models).select()
    return {
        "train_pairs": int((pairs.split == 0).sum()),
        "tokens": sum(int(ids.numel()) for _, batches, _ in read for ids in batches),
        "seconds": {"offline": offline, "in the loop": all_through, "in the loop, to the mapped layer": online},
        "ratio": statistics.median(b / a for a, b in zip(offline, all_through, strict=True)),
        "ratio_to_mapped_layer": statistics.median(b / a for a, b in zip(offline, online, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="windows of one forward pass")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary directory")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/bench_offline.json")
    parser.add_argument("--json", action="store_true", help="print the result as one line")
    arguments = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        measured = measure(arguments, Path(name))
    result = {
        "device": {**before, "threads": os.environ.get("OMP_NUM_THREADS", "all")},
        "versions": versions_of("featstore", "numpy", "torch", "transformers"),
        "wanted": WANTED,
        **measured,
    }
    for label, spent in measured["seconds"].items():
        print(f"  {label:34} {statistics.median(spent):9.4f} s an epoch of {measured['train_pairs']} pairs")
    goals = recorded(
        {
            "an epoch from the store over one through the models": at_least(WANTED, measured["ratio"]),
            "the same, models stopped at the mapped layer": at_least(WANTED, measured["ratio_to_mapped_layer"]),
        }
    )
    result["goals"] = goals
    print(judged(goals))
    if arguments.json:
        print(json.dumps(result))
    if arguments.keep:
        print(keep("bench_offline", result))


if __name__ == "__main__":
    main()
