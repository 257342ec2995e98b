"""Extraction with the sink beside the bare truncated forward, and the memory that an extraction needs.

    python benchmarks/bench_extract.py                       # SmolLM2 on the CPU, then memory at 10 k and 200 k tokens
    python benchmarks/bench_extract.py --device cuda         # an 8B-shaped Llama with random weights, store on /dev/shm
    python benchmarks/bench_extract.py --saelens venv-sae/bin/python   # with SAELens beside

`bare` runs the planned batches through the model up to the deepest layer wanted and drops the states. `sink` is the
walk of `featstore extract` itself over the same batches: states rounded where they are, copied to the host, gathered
into shards, checksummed, fsynced and renamed by a thread while the model computes on; its time ends when the last shard
is committed. Both run once a round, in random order; the ratio is the median over rounds.

On CUDA the model has the shape of Llama-3.1-8B. Its share of the bf16 peak counts two operations for every token and
weight of the blocks that run (attention scores left out), against an 8192 x 8192 matrix product measured in the same
run.

Memory is the largest resident size of a child process that runs the whole command with two small random models, five
layers each, at both numbers of tokens; what they store differs by more than a GiB.

SAELens' CacheActivationsRunner writes one layer a run, in float32, from windows of one length; it gets the same model
directory, as many tokens in windows of 256, and the deepest of our layers. It needs no hub when it gets a local model
as `AutoModelForCausalLM` and a dataset that is already tokenised. What it pins does not agree with what we need, so it
is started in an interpreter of its own, and left out, with the reason, where that fails. One that ran 6.54.12:

    python -m venv venv-sae
    venv-sae/bin/pip install --no-deps sae-lens 'transformer-lens<3' simple-parsing docstring-parser nltk plotly \\
        plotly-express tenacity babe python-dotenv jaxtyping wadler-lindig beartype better-abc fancy-einsum einops \\
        typeguard py2store config2py i2 dol
    venv-sae/bin/pip install wandb    # beside the libraries of this project, through a .pth file or their own install
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import (
    at_least,
    at_most,
    figures,
    interleaved,
    judged,
    keep,
    machine,
    recorded,
    seconds,
    table,
    versions_of,
)
from torch import nn

from featstore.demo.pair import build_pair
from featstore.demo.sample import sample_path
from featstore.extraction.forward import BatchReader
from featstore.extraction.job import prepare
from featstore.extraction.pilot import Pilot
from featstore.extraction.rows import walk
from featstore.extraction.settings import Settings
from featstore.models.devices import resolve_device
from featstore.models.loading import load_model
from featstore.models.stack import residual_stream
from featstore.runtime.provenance import versions
from featstore.store.format.elements import parse_format
from featstore.store.format.shards import parse_layout
from featstore.store.write.row_writer import RowArrays, RowWriter, write_groups
from featstore.store.write.writer import StoreWriter, exclusive
from featstore.text.plan import Plan, PlannedCorpus, PlannedModel

ROOT = Path(__file__).parents[1]
NAME = "model"
#: Dense bfloat16 product whose rate is called the peak.
MATRIX = 8192


# Models and plans ---------------------------------------------------------------------------------------------------


def demo_model() -> Path:
    demo = ROOT / ".cache" / "demo"
    return build_pair(demo, demo / "assets").source


def write_text(path: Path, documents: int) -> Path:
    """The committed sample over and over, each time as other documents."""
    lines = [json.loads(line)["text"] for line in gzip.decompress(sample_path().read_bytes()).splitlines()]
    texts = (f"{i // len(lines)}. {lines[i % len(lines)]}" for i in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def real(arguments: argparse.Namespace, root: Path) -> tuple[Plan, nn.Module]:
    """SmolLM2 on real text."""
    settings = Settings(
        model=(f"{NAME}={arguments.model or demo_model()}",),
        layers=(arguments.layers,),
        dataset=f"jsonl:{write_text(root / 'text.jsonl', 20 + arguments.tokens // 500)}",
        store=root / "unused.zarr",
        max_tokens=arguments.tokens,
        batch_tokens=arguments.batch_tokens,
        shard_rows=arguments.shard_rows,
        device="cpu",
        dtype=arguments.dtype,
    )
    job = prepare(settings, quiet=True)
    return job.plan, load_model(job.infos[NAME].spec, device="cpu", dtype=arguments.dtype)


def shaped_like_8b(arguments: argparse.Namespace, device: torch.device) -> nn.Module:
    """A Llama with the shape of Llama-3.1-8B, or a small one, and random weights, made where it will run."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    if arguments.small:
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 32}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
    config = LlamaConfig(**shape, max_position_embeddings=131072, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval().requires_grad_(requires_grad=False)


def random_plan(tokens: int, vocabulary: int, arguments: argparse.Namespace) -> Plan:
    """Random tokens in windows as long as 2048 bytes of English make them: 350 to 550 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(350, 551, tokens // 350 + 1)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    starts = np.append(starts[starts < tokens], tokens).astype(np.int64)
    windows = len(starts) - 1
    ids = rng.integers(0, vocabulary, tokens, dtype=np.int32)
    none = np.zeros(windows + 1, np.int64)
    text = PlannedCorpus(
        text=np.zeros(0, np.uint8),
        document_start=none[:2],
        document_id=np.zeros((1, 32), np.uint8),
        document_split=np.zeros(1, np.uint8),
        window_document=np.zeros(windows, np.int32),
        window_start=none[:windows],
        window_end=none[:windows],
    )
    model = PlannedModel(
        starts,
        ids,
        np.zeros(tokens, np.int32),
        np.zeros(tokens, bool),
        np.ones(tokens, bool),
        np.zeros(tokens, np.uint8),
    )
    return Plan(text, {NAME: model}, 2048, arguments.batch_tokens, arguments.shard_rows, {})


# Speed --------------------------------------------------------------------------------------------------------------


class Contenders:
    """The same batches without and with the sink.

    Args:
        plan: The plan.
        model: The model.
        layers: Layers to capture.
        root: Where stores go.
    """

    def __init__(self, plan: Plan, model: nn.Module, layers: list[int], root: Path) -> None:
        self.reader = BatchReader(residual_stream(model), plan, NAME)
        self.layers, self.root = layers, root
        self.width = int(model.config.get_text_config().hidden_size)
        self.groups = list(plan.groups(NAME))

    def _synchronize(self) -> None:
        if self.reader.device.type == "cuda":
            torch.cuda.synchronize(self.reader.device)

    def _batches(self) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
        for first, end in self.groups:
            yield from self.reader.plan.batches(NAME, first, end)

    def bare(self) -> None:
        for batch in self._batches():
            self.reader.states(batch, self.layers)
        self._synchronize()

    def sink(self) -> None:
        plan = self.reader.plan
        arrays = RowArrays(
            rows=plan.models[NAME].rows,
            width=self.width,
            layers=tuple(self.layers),
            shard_rows=plan.shard_rows,
            form=parse_format("bfloat16"),
            layout=parse_layout("hot"),
        )
        path = self.root / "store.zarr"
        with exclusive(path):
            writer = StoreWriter(path)
            write_groups(writer, NAME, arrays.form)
            rows = RowWriter(writer, NAME, arrays)
            walk(self.reader, rows, self.groups, Pilot({}), lambda _: None)
            self._synchronize()
            if not rows.complete:
                raise SystemExit("the walk left rows unwritten")

    def clear(self, _: str) -> None:
        shutil.rmtree(self.root / "store.zarr", ignore_errors=True)


def block_weights(model: nn.Module, layers: list[int]) -> int:
    """Weights of the blocks that a truncated forward runs."""
    blocks = residual_stream(model).blocks
    return sum(p.numel() for block in blocks[: max(layers)] for p in block.parameters() if p.dim() == 2)


def peak_flops(device: torch.device, runs: int = 10) -> float:
    """Operations a second of one large bfloat16 product; the median."""
    a, b = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        torch.cuda.synchronize(device)

    product()
    return 2 * MATRIX**3 / statistics.median(seconds(product) for _ in range(runs))


def sink_alone(contenders: Contenders, rows: int) -> dict[str, float]:
    """What the sink could take if the model were infinitely fast, GB/s of stored states."""
    from featstore.store.format.shards import encode_shard

    block = np.random.default_rng(0).integers(0, 1 << 16, (rows, contenders.width), dtype=np.uint16)
    path = contenders.root / "alone"
    layout = parse_layout("hot")
    with exclusive(path):
        writer = StoreWriter(path)
        encoded = [encode_shard(block, rows, layout)]
        found = {
            "encode a shard": seconds(lambda: encode_shard(block, rows, layout)),
            "commit a shard": seconds(lambda: writer.commit("unit", {"c/0/0": encoded[0]})),
        }
    if contenders.reader.device.type == "cuda":
        pinned = torch.empty(block.nbytes, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(block.nbytes, dtype=torch.uint8, device=contenders.reader.device)
        pinned.copy_(device)

        def copy() -> None:
            pinned.copy_(device, non_blocking=True)
            torch.cuda.synchronize()

        found["copy to the host"] = min(seconds(copy) for _ in range(5))
    shutil.rmtree(path)
    return {name: block.nbytes / 1e9 / spent for name, spent in found.items()}


def measure_speed(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    device = resolve_device(arguments.device)
    if device.type == "cuda" or arguments.random:
        model = shaped_like_8b(arguments, device)
        plan = random_plan(arguments.tokens, int(model.config.vocab_size), arguments)
    else:
        plan, model = real(arguments, root)
    layers = [int(k) for k in arguments.layers.split(",")]
    contenders = Contenders(plan, model, layers, root)
    work = {"bare": contenders.bare, "sink": contenders.sink}
    taken = interleaved(work, arguments.runs, before=contenders.clear)
    contenders.clear("")
    tokens = plan.models[NAME].rows
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine()["cpu"],
        "tokens": tokens,
        "layers": layers,
        "width": contenders.width,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "batch_tokens": plan.batch_tokens,
        "shard_rows": plan.shard_rows,
        "speed": figures(taken, "bare", tokens),
        "parts_gb_per_s": sink_alone(contenders, plan.shard_rows),
    }
    rate = result["speed"]["sink"]["rate"]
    result["states_gb_per_s"] = rate * len(layers) * contenders.width * 2 / 1e9
    goals = {"extraction: speed with the sink over the bare forward": at_least(0.97, result["speed"]["sink"]["ratio"])}
    if device.type == "cuda":
        peak = peak_flops(device)
        result["bf16_peak_tflops"] = peak / 1e12
        result["share_of_bf16_peak"] = rate * 2 * block_weights(model, layers) / peak
        goals["extraction: tokens a second, 8B shape, five layers"] = at_least(35_000.0, rate)
    result["goals"] = recorded(goals)
    return result


# SAELens ------------------------------------------------------------------------------------------------------------

_SAELENS = """
import json, sys, time
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from importlib.metadata import version

model, ids, layer, width, length, out = sys.argv[1:]
layer, width, length = int(layer), int(width), int(length)
ids = json.load(open(ids))
rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
tokens = len(rows) * length
config = CacheActivationsRunnerConfig(
    dataset_path="in memory", model_name=model, model_class_name="AutoModelForCausalLM", model_batch_size=8,
    hook_name=f"model.layers.{layer - 1}", d_in=width, training_tokens=tokens, context_size=length,
    new_cached_activations_path=out, shuffle=False, dtype="float32", device="cpu", prepend_bos=False,
    streaming=False, buffer_size_gb=min(2.0, tokens * width * 4 / 1e9),
)
runner = CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"input_ids": rows}))
start = time.perf_counter()
written = runner.run()
spent = time.perf_counter() - start
print(json.dumps({"tokens": len(written) * length, "seconds": spent, "version": version("sae-lens")}))
"""


def run_saelens(arguments: argparse.Namespace, speed: dict[str, Any], root: Path) -> dict[str, Any]:
    """Tokens a second of SAELens' runner, or why there are none."""
    plan, _ = real(arguments, root)
    ids = root / "ids.json"
    ids.write_text(json.dumps(plan.models[NAME].ids.tolist()))
    words = [arguments.model or demo_model(), ids, speed["layers"][-1], speed["width"], 256, root / "saelens"]
    done = subprocess.run(
        [arguments.saelens, "-c", _SAELENS, *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"left_out": (done.stderr.strip().splitlines() or ["it failed without a word"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    rate = found["tokens"] / found["seconds"]
    return {"version": found["version"], "layers": 1, "tokens_per_second": rate} | {
        "ours_with_all_layers_over_it": speed["speed"]["sink"]["rate"] / rate
    }


# Memory -------------------------------------------------------------------------------------------------------------


def tiny_model(directory: Path, tokenizer_from: Path, seed: int) -> Path:
    """A random Llama of 4 blocks and width 384, beside SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, directory / name)
    return directory


def measure_memory(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Peak resident size of the whole command, at a few and at many tokens."""
    models = [tiny_model(root / name, demo_model(), seed) for seed, name in enumerate("ab")]
    peaks: dict[int, float] = {}
    stored: dict[int, float] = {}
    for tokens in arguments.memory_tokens:
        store = root / f"memory-{tokens}.zarr"
        text = write_text(root / f"memory-{tokens}.jsonl", 20 + tokens // 500)
        words = ["extract", "--layers", "0,1,2,3,4", "--dataset", f"jsonl:{text}", "--store", store, "--device", "cpu"]
        words += ["--max-tokens", tokens, "--shard-rows", 4096, "--batch-tokens", 4096]
        words += [word for model in models for word in ("--model", f"{model.name}={model}")]
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "featstore", *map(str, words)],
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                cwd=ROOT,
                stdout=said,
                stderr=said,
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                said.seek(0)
                raise SystemExit(f"extraction of {tokens} tokens failed:\n{said.read()[-2000:]}")
        peaks[tokens] = usage.ru_maxrss / 1024
        stored[tokens] = sum(p.stat().st_size for p in store.rglob("*") if p.is_file()) / 2**20
        shutil.rmtree(store)
    few, many = min(peaks), max(peaks)
    return {
        "peak_mib": {str(tokens): value for tokens, value in peaks.items()},
        "stored_mib": {str(tokens): value for tokens, value in stored.items()},
        "ratio": peaks[many] / peaks[few],
        "goals": recorded(
            {f"extraction: memory at {many} tokens over that at {few}": at_most(1 / 0.9, peaks[many] / peaks[few])}
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", type=Path, help="on the CPU: a model directory instead of SmolLM2")
    parser.add_argument("--random", action="store_true", help="the randomly weighted Llama on the CPU, too")
    parser.add_argument("--small", action="store_true", help="32 blocks of width 128, to try the script")
    parser.add_argument("--layers", help="five layers; by default spread over the depth")
    parser.add_argument("--tokens", type=int, help="by default 16,384 on the CPU, 131,072 on CUDA")
    parser.add_argument("--batch-tokens", type=int, help="by default 4,096 on the CPU, 32,768 on CUDA")
    parser.add_argument("--shard-rows", type=int, help="by default 4,096 on the CPU, 16,384 on CUDA")
    parser.add_argument("--dtype", default="auto", help="on the CPU")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory-tokens", type=int, nargs="*", default=[10_000, 200_000], help="none: leave it out")
    parser.add_argument("--saelens", help="a Python that has sae-lens")
    parser.add_argument("--directory", type=Path, help="where stores go; by default /dev/shm on CUDA, else temporary")
    parser.add_argument("--json", action="store_true", help="one line instead of tables")
    parser.add_argument("--out", type=Path, help="directory of the result file; by default benchmarks/results")
    arguments = parser.parse_args()
    cuda = arguments.device.startswith("cuda")
    deep = cuda or arguments.random
    arguments.layers = arguments.layers or ("0,8,16,24,32" if deep else "6,12,18,24,30")
    arguments.tokens = arguments.tokens or (131_072 if cuda else 16_384)
    arguments.batch_tokens = arguments.batch_tokens or (32_768 if cuda else 4096)
    arguments.shard_rows = arguments.shard_rows or (16_384 if cuda else 4096)
    where = arguments.directory or (Path("/dev/shm") if cuda else None)
    result: dict[str, Any] = {"machine": machine(), "versions": versions(), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(dir=where) as name:
        result["extraction"] = measure_speed(arguments, Path(name))
        if arguments.saelens and not deep:
            result["saelens"] = run_saelens(arguments, result["extraction"], Path(name))
            result["versions"] |= versions_of("datasets")
    if arguments.memory_tokens:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
            result["memory"] = measure_memory(arguments, Path(name))
    path = keep("bench_extract_cuda" if cuda else "bench_extract", result, *([arguments.out] if arguments.out else []))
    print(json.dumps(result) if arguments.json else f"{text_of(result)}\nwritten to {path}")


def text_of(result: dict[str, Any]) -> str:
    """The result for people."""
    run = result["extraction"]
    lines = [
        f"{run['tokens']} tokens, layers {run['layers']} of width {run['width']} in {run['dtype']} on {run['device']}",
        table("forward to the deepest layer", run["speed"], "tok/s"),
        f"  {run['states_gb_per_s']:.3f} GB/s of states; the sink alone, GB/s: "
        + ", ".join(f"{part} {rate:.2f}" for part, rate in run["parts_gb_per_s"].items()),
    ]
    if "bf16_peak_tflops" in run:
        lines.append(f"  {run['share_of_bf16_peak']:.1%} of the bf16 peak of {run['bf16_peak_tflops']:.3g} TFLOP/s")
    if "saelens" in result:
        lines.append(f"SAELens, one layer: {json.dumps(result['saelens'])}")
    goals = dict(run["goals"])
    if "memory" in result:
        memory = result["memory"]
        for tokens, peak in memory["peak_mib"].items():
            lines.append(
                f"memory, {tokens} tokens: {peak:.0f} MiB at most, {memory['stored_mib'][tokens]:.0f} MiB stored"
            )
        goals |= memory["goals"]
    lines.append(judged(goals))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
