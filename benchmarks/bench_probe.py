"""What the probe adds to an extraction: its seconds beside those of the same model's passes over text.

    python benchmarks/bench_probe.py --model .cache/demo/smollm2

Timed in turn, in one process and on one loaded model: finding the blocks and the tests that storing states needs
(`probe`), and the forward passes of an extraction at a few layers over `--tokens` tokens in windows of `--window`
(`passes`). An extraction does more than its passes (text, rounding, writing), so the share that is printed is an upper
bound. `load` is the time of reading the weights, which a new model costs once more.
"""

from __future__ import annotations

import argparse

import torch
from _measure import at_most, figures, interleaved, judged, keep, machine, recorded, seconds, table, versions_of

from featstore.models import stack
from featstore.models.loading import load_model
from featstore.models.probe.reading import test_reading
from featstore.models.references import ModelSpec
from featstore.models.residual import capture

#: Tokens of the extraction that the goal is stated for.
_EXTRACTION = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/demo/smollm2", help="directory or hub id")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of text that are passed in a round")
    parser.add_argument("--window", type=int, default=500, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=8, help="windows of a pass")
    parser.add_argument("--runs", type=int, default=5, help="rounds that count")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/bench_probe.json")
    arguments = parser.parse_args()
    spec = ModelSpec("m", arguments.model)
    held: list[torch.nn.Module] = []
    load = seconds(lambda: held.append(load_model(spec)))
    [model] = held
    stream = stack.residual_stream(model)
    layers = sorted({0, stream.depth // 4, stream.depth // 2, 3 * stream.depth // 4, stream.depth})
    ids = stack.ordinary_ids(model, arguments.tokens // arguments.window, arguments.window, seed=1)

    def passes() -> None:
        for first in range(0, len(ids), arguments.batch):
            capture(stream, ids[first : first + arguments.batch], layers)

    def probe() -> None:
        stack.forget(model)
        test_reading(stack.residual_stream(model))

    taken = interleaved({"passes": passes, "probe": probe}, arguments.runs)
    rows = figures(taken, "passes", 1.0)
    # "ratio" is the speed of the probe over that of one round of passes.
    share = ids.numel() / rows["probe"]["ratio"] / _EXTRACTION
    print(table(f"probe of {arguments.model}, beside passes over {ids.numel()} tokens", rows, "1/s"))
    print(f"the weights load in {load:.2f} s; the probe takes {share:.2%} of the passes over {_EXTRACTION} tokens")
    goals = recorded({"probe of a model over an extraction": at_most(0.03, share)})
    print(judged(goals))
    if arguments.keep:
        result = {"machine": machine(), "versions": versions_of("torch", "transformers"), "rows": rows, "share": share}
        result["goals"] = goals
        keep("bench_probe", result)


if __name__ == "__main__":
    main()
