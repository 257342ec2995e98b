"""Tokens a second of the bare truncated forward in each compute dtype, and of the matrix product behind it.

    python benchmarks/bench_forward.py --model smollm2=.cache/demo/smollm2

Prints one JSON object: device, versions, and the median of five interleaved runs.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from featstore.models import loading as models
from featstore.models import residual as sites
from featstore.models.devices import resolve_device
from featstore.models.references import parse_model
from featstore.models.stack import residual_stream
from featstore.runtime.provenance import versions


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2=.cache/demo/smollm2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    device = resolve_device("auto")
    names = ("float32", "bfloat16")
    loaded = {name: models.load_model(parse_model(arguments.model), dtype=name) for name in names}
    streams = {name: residual_stream(model) for name, model in loaded.items()}
    ids = torch.randint(5, 1000, (arguments.batch, arguments.tokens), device=device)
    factors = {
        name: (
            torch.randn(2048, 576).to(device, getattr(torch, name)),
            torch.randn(576, 1536).to(device, getattr(torch, name)),
        )
        for name in names
    }
    forward: dict[str, list[float]] = {name: [] for name in names}
    product: dict[str, list[float]] = {name: [] for name in names}
    for run in range(arguments.runs + 1):
        for name in names:
            stream, (a, b) = streams[name], factors[name]
            taken = seconds(lambda s=stream: sites.capture(s, ids, [s.depth])), seconds(lambda x=a, y=b: x @ y)
            if run:  # the first warms up
                forward[name].append(taken[0])
                product[name].append(taken[1])
    flop = 2 * 2048 * 576 * 1536
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "tokens_per_second": {name: ids.numel() / statistics.median(values) for name, values in forward.items()},
        "gflops_2048x576x1536": {name: flop / statistics.median(values) / 1e9 for name, values in product.items()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
