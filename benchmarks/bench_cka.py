"""CKA between all layers: ours, plain torch, and pytorch-cka, at the sizes where each form pays.

    OMP_NUM_THREADS=2 python benchmarks/bench_cka.py --keep
    python benchmarks/bench_cka.py --device cuda --keep

On a CPU: 5 x 5 layers at n = 8192, d = 576, errors against float64; wanted is eight times pytorch-cka's speed at an
error of at most 1e-6, and at most 1.1 times the time of the bare products X'Y of the 25 pairs and 10 layers. On a GPU:
the share of the measured bf16 peak that every kernel reaches, beside a torch GEMM with float32 output, torch.compile of
both and pytorch-cka, with peak memory; wanted are 85 % for linear kernels and 75 % for RBF. Without a GPU it says so
and runs what it can. Interleaved rounds, medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _measure import at_least, at_most, figures, interleaved, judged, keep, machine, recorded, table, versions_of

from align.kernels.api import cka_matrix, compare_layers
from align.kernels.forms import feature_flops, panel_flops
from align.metrics import debiased_cka

WANTED_CPU, WANTED_ERROR, WANTED_PRODUCTS = 8.0, 1e-6, 1.1
WANTED_SHARE = {"linear": 0.85, "rbf": 0.75}
#: Contender that computes no CKA, only the products that CKA is made of.
BARE = "bare products"
#: Layers of each model, rows and width, by the kernel that is judged there.
GPU_SIZES = [
    ("xcov pair", 1, 65_536, 4096, "linear", "feature"),
    ("5 x 5", 5, 16_384, 4096, "linear", "panels"),
    ("33 x 33", 33, 16_384, 4096, "linear", "panels"),
    ("5 x 5 rbf", 5, 16_384, 4096, "rbf", "panels"),
]


def every_pair(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


def layers_of(count: int, n: int, width: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Any]:
    """Two models' layers that share a core, with a mean of some sigma, as hidden states have."""
    generator = torch.Generator(device=device).manual_seed(0)
    core = torch.randn(n, width, generator=generator, device=device) * torch.arange(1, width + 1, device=device) ** -0.5
    found = []
    for k in range(2 * count):
        turn = torch.randn(width, width, generator=generator, device=device) / math.sqrt(width)
        noise = torch.randn(n, width, generator=generator, device=device)
        found.append((core @ turn + 0.02 * (k + 1) * noise + 3).to(dtype))
    return found


def bare_products(layers: list[Any], wanted: list[tuple[int, int]]) -> None:
    """X'Y of every pair and X'X of every layer in float32: what feature space cannot do without."""
    for i, j in [*wanted, *((k, k) for k in range(len(layers)))]:
        layers[i].T @ layers[j]


def concatenated_gemm(layers: list[Any]) -> torch.Tensor:
    """Biased CKA by one feature-space product of all layers side by side: the plainest fast way."""
    z = torch.cat([x - x.mean(0) for x in layers], dim=1)
    product = z.T @ z
    cuts = [x.shape[1] for x in layers]
    fro = torch.stack(
        [torch.stack([b.double().square().sum() for b in row.split(cuts, dim=1)]) for row in product.split(cuts, dim=0)]
    )
    root = fro.diagonal().sqrt()
    return fro / root[:, None] / root[None, :]


def gram_matrices(layers: list[Any]) -> torch.Tensor:
    """Debiased CKA by whole n x n Gram matrices in float32."""
    n = len(layers[0])
    grams = []
    for x in layers:
        x = x - x.mean(0)
        k = x @ x.T
        k.fill_diagonal_(0)
        grams.append((k, k.sum(0)))
    found = torch.empty(len(layers), len(layers), dtype=torch.float64)
    for i, (k, a) in enumerate(grams):
        for j, (m, b) in enumerate(grams[: i + 1]):
            rest = a.double().sum() * b.double().sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.double() @ b.double())
            found[i, j] = found[j, i] = (k * m).sum(dtype=torch.float64) + rest
    root = found.diagonal().sqrt()
    return found / root[:, None] / root[None, :]


def pytorch_cka() -> Callable[[list[Any]], Any] | None:
    try:
        features = importlib.import_module("cka").cka_from_features
    except ImportError:
        return None

    def cross(layers: list[Any]) -> torch.Tensor:
        centred = [x - x.mean(0) for x in layers]
        half = len(layers) // 2
        return features(centred[:half], centred[half:])

    return cross


def on_cpu(arguments: argparse.Namespace) -> dict[str, Any]:
    n, width, count = arguments.rows, arguments.width, arguments.layers
    layers = layers_of(count, n, width)
    x, y = ([one.double().numpy() for one in side] for side in (layers[:count], layers[count:]))
    exact = np.array([[debiased_cka(one, other)[0] for other in y] for one in x])
    wanted = [(i, count + j) for i in range(count) for j in range(count)]
    contenders: dict[str, Callable[[], Any]] = {
        "ours": lambda: cka_matrix(layers, wanted=wanted),
        "ours, sample panels": lambda: cka_matrix(layers, wanted=wanted, form="panels"),
        "one torch GEMM (biased)": lambda: concatenated_gemm(layers),
        BARE: lambda: bare_products(layers, wanted),
        "n x n Grams in torch": lambda: gram_matrices(layers),
    }
    peer = pytorch_cka()
    missing = {}
    if peer is None:
        missing["pytorch-cka"] = "not installed: pip install pytorch-cka==1.1.3"
    else:
        contenders["pytorch-cka"] = lambda: peer(layers)
    errors = {}
    for name, work in contenders.items():
        if name == BARE:
            continue
        found = np.asarray(work(), dtype=np.float64)
        found = found if found.shape == exact.shape else found[:count, count:]
        errors[name] = float(np.abs(found - exact).max())
    taken = interleaved(contenders, arguments.runs)
    reference = "pytorch-cka" if peer is not None else "n x n Grams in torch"
    shown = figures(taken, reference, 1)
    print(table(f"{count} x {count} layers, n = {n}, d = {width}, float32", shown, "runs/s"))
    for name, error in errors.items():
        print(f"  {name:32} largest error {error:.1e}, {statistics.median(taken[name]):.2f} s")
    over = [mine / products for mine, products in zip(taken["ours"], taken[BARE], strict=True)]
    print(f"  ours takes {statistics.median(over):.3f} of the bare products' time ({min(over):.3f} .. {max(over):.3f})")
    faster = [theirs / mine for theirs, mine in zip(taken[reference], taken["ours"], strict=True)]
    goals = recorded(
        {
            "CKA 5 x 5, n = 8192, d = 576: time over the bare products'": at_most(WANTED_PRODUCTS, *over),
            f"CKA 5 x 5, n = 8192, d = 576: speed over {reference}": at_least(WANTED_CPU, *faster),
            "CKA 5 x 5, n = 8192, d = 576: largest error": at_most(WANTED_ERROR, errors["ours"]),
        }
    )
    print(judged(goals))
    for name, why in missing.items():
        print(f"{name}: {why}")
    return {
        "rows": n, "width": width, "layers": count, "seconds": taken, "errors": errors, "reference": reference,
        "ratio": shown["ours"]["ratio"], "of_the_bare_products": over, "missing": missing, "goals": goals,
    }  # fmt: skip


def on_gpu(arguments: argparse.Namespace) -> dict[str, Any]:
    device = arguments.device
    peak = measured_peak(device)
    print(f"{torch.cuda.get_device_name(device)}: {peak / 1e12:.0f} TFLOP/s bf16 measured (8192 cubed torch GEMM)")
    results = []
    for title, count, n, width, kernel, form in GPU_SIZES:
        layers = layers_of(count, n, width, device=device, dtype=torch.bfloat16)
        sigmas = [math.sqrt(2 * width)] * len(layers) if kernel == "rbf" else None
        widths = [width] * len(layers)
        every = every_pair(len(layers))
        flops = feature_flops(n, widths, "cuda", every) if form == "feature" else panel_flops(n, widths)
        spent: dict[str, list[float]] = {}

        def ours(layers: list[Any] = layers, kernel: str = kernel, form: str = form, sigmas: Any = sigmas) -> Any:
            return compare_layers(layers, kernel=kernel, sigmas=sigmas, form=form, backend="triton")  # type: ignore[arg-type]

        contenders: dict[str, Callable[[], Any]] = {"ours": ours}
        if kernel == "linear" and count <= 5:
            compiled = torch.compile(concatenated_gemm)
            contenders["torch GEMM"] = lambda layers=layers: concatenated_gemm(layers)
            contenders["torch.compile"] = lambda layers=layers, compiled=compiled: compiled(layers)
            if (peer := pytorch_cka()) is not None:
                contenders["pytorch-cka"] = lambda layers=layers, peer=peer: peer(layers)
        memory = {}
        for name, work in contenders.items():
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
            try:
                work()
                spent[name] = [synchronised(work) for _ in range(arguments.runs)]
            except torch.cuda.OutOfMemoryError:
                spent[name] = []
            memory[name] = torch.cuda.max_memory_allocated(device) - held
        median = {name: statistics.median(values) if values else math.nan for name, values in spent.items()}
        share = flops / median["ours"] / peak
        wanted = f"wanted {WANTED_SHARE[kernel]:.0%}"
        print(f"{title}: {1e3 * median['ours']:.1f} ms, {100 * share:.0f} % of the peak ({wanted})")
        for name in contenders:
            print(f"  {name:16} {1e3 * median[name]:9.2f} ms, {memory[name] / 2**20:8.0f} MiB beyond the rows")
        results.append(
            {"size": title, "rows": n, "width": width, "layers": count, "kernel": kernel, "form": form, "share": share,
             "seconds": spent, "memory": memory, "flops": flops}
        )  # fmt: skip
        del layers
        torch.cuda.empty_cache()
    return {"peak_flops": peak, "sizes": results}


def synchronised(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measured_peak(device: str) -> float:
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * 8192**3 / min(synchronised(lambda: a @ b) for _ in range(20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=5, help="of each model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/bench_cka[_cuda].json")
    parser.add_argument("--json", action="store_true", help="print the result as one line")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "device": {**machine(), "threads": os.environ.get("OMP_NUM_THREADS", "all")},
        "versions": versions_of("torch", "triton", "numpy", "pytorch-cka"),
    }
    cuda = arguments.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise SystemExit(f"--device {arguments.device}: torch sees no CUDA device here; run with --device cpu")
    if cuda:
        result["gpu"] = torch.cuda.get_device_name(arguments.device)
        result |= on_gpu(arguments)
    else:
        print("no GPU asked for: the shares of the peak are printed by --device cuda")
        result |= on_cpu(arguments)
    if arguments.json:
        print(json.dumps(result))
    if arguments.keep:
        print(keep("bench_cka_cuda" if cuda else "bench_cka", result))


if __name__ == "__main__":
    main()
