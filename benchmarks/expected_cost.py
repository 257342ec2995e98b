"""What the whole programme would cost for two models that are not at hand: arithmetic over assumed rates.

    python benchmarks/expected_cost.py [--forward 27000] [--disk 2e9] [--products 2e13] [--solves 5e11]

The defaults are Llama-3.1-8B and Mistral-7B-v0.3 over a million tokens each. Nothing is measured: the counts come from
the programme's own list of commands, the rates are assumptions that are printed beside what follows from them. 27,000
tokens a second is a published rate of an 8B model with five captured layers on one H200 (SpecForge).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from align.layers import LayerPair
from evaluate.reproduce.places import LAYERS, Places
from evaluate.reproduce.programme import Scale, Step, programme
from featstore.models.references import parse_layers
from featstore.runtime.console import human_bytes, human_seconds

#: Passes of a window by layer pair: the stitched conditions without the clean one, which all pairs share.
_CONDITIONS = 8
#: What `--eval-models` does after an epoch: stitched tokens by condition, and texts by tokens and conditions.
_EPOCH_TOKENS, _EPOCH_TEXTS = 1000, 5 * 24 * 6
#: Tokens of a question with its context, and of its answer; conditions of a layer pair and beside them.
_QUESTION, _ANSWER, _METHODS, _COMMON = 60, 8, 12, 3
#: A solve needs about this many times width^3 operations: eigenvectors or an SVD.
_SOLVE = 12


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1e6, help="of each model in the store")
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--stitch-tokens", type=int, default=20_000)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--forward", type=float, default=27_000, help="tokens/s of a model reading")
    parser.add_argument("--decode", type=float, default=30, help="steps/s of a model writing, a batch at a time")
    parser.add_argument("--disk", type=float, default=2e9, help="bytes/s read or written")
    parser.add_argument("--products", type=float, default=2e13, help="operations/s of float32 products, on a GPU")
    parser.add_argument("--solves", type=float, default=5e11, help="operations/s of float64 solves, on the CPU")
    given = parser.parse_args()

    layers = parse_layers([LAYERS], {"m": given.depth})["m"]
    pairs = tuple(LayerPair("a", (layer,), "b", layer) for layer in layers)
    places = Places("a", "b", {"a": given.depth, "b": given.depth}, pairs)
    scale = Scale(stitch_tokens=str(given.stitch_tokens), examples=given.examples)
    steps = programme(Path("s.zarr"), Path("out"), places, scale, (given.width, given.width))

    row = given.width * 2
    states = 2 * given.tokens * len(layers) * row
    maps = sum(_maps(step, places) for step in steps if step.fits)
    disk = {"states (bfloat16)": states, "maps of all runs (float32)": maps * given.width**2 * 4}
    for name, size in disk.items():
        print(f"disk: {name:34} {human_bytes(size)}")
    print(f"disk: {'both together':34} {human_bytes(sum(disk.values()))}")

    stitched = sum(_stitched(step, places) for step in steps) * given.stitch_tokens
    asked = sum(_asked(step) for step in steps) * given.examples
    trainings = [step for step in steps if step.fits and "--epochs" in step.arguments]
    fits = [step for step in steps if step.fits and step not in trainings]
    read = sum(_pairs(step, places) for step in fits) * given.tokens * 2 * row
    trained = sum(_pairs(step, places) for step in trainings) * scale.epochs * given.tokens * 2 * row
    products = sum(_pairs(step, places) for step in fits) * 3 * 2 * given.tokens * given.width**2
    solves = sum(_maps(step, places) for step in fits) * _SOLVE * given.width**3
    seconds = {
        "extraction: both models read": 2 * given.tokens / given.forward,
        "extraction: states written": states / given.disk,
        "closed forms: states read": read / given.disk,
        "closed forms: products": products / given.products,
        "closed forms: solves": solves / given.solves,
        "training: states read": trained / given.disk,
        "stitched losses": stitched / given.forward,
        "tasks: questions read": asked * _QUESTION / given.forward,
        "tasks: answers written": asked / given.examples * _ANSWER / given.decode,
        "every epoch in the model": (scale.epochs + 1)
        * (_EPOCH_TOKENS * (_CONDITIONS + 1) / given.forward + _EPOCH_TEXTS / given.decode),
    }
    for name, value in seconds.items():
        print(f"time: {name:34} {human_seconds(value)}")
    print(f"time: {'all of it, nothing overlapping':34} {human_seconds(sum(seconds.values()))}")
    print(f"assumed, not measured: {given.forward:,.0f} tokens/s read, {given.decode:g} steps/s written,", end=" ")
    print(f"{human_bytes(given.disk)}/s of disk, {given.products:.0e} and {given.solves:.0e} operations/s", end="; ")
    print("loading of weights is left out")


def _option(step: Step, name: str) -> str | None:
    return step.arguments[step.arguments.index(name) + 1] if name in step.arguments else None


def _pairs(step: Step, places: Places) -> int:
    """Layer pairs whose states a fit reads."""
    layers = _option(step, "--layers")
    count = len(places.pairs) if layers is None else len(layers.split(","))
    return count * (2 if "--both" in step.arguments else 1)


def _maps(step: Step, places: Places) -> int:
    """Matrices of width x width that a run ships; a joint map has one for every source layer, LoRA its base as well."""
    own = len(places.inner) if "--joint" in step.arguments else 2 if _option(step, "--type") == "lora" else 1
    return _pairs(step, places) * own


def _stitched(step: Step, places: Places) -> int:
    """Passes over the stitched tokens."""
    if not step.name.startswith("stitch "):
        return 0
    run = step.name.split()[1]
    one_way = run.startswith(("self-", "compress-"))
    count = len(places.inner) if run == "joint" else 1 if "--layers" in step.arguments or one_way else len(places.pairs)
    ways = 1 if one_way else 2
    return ways * (1 + count * _CONDITIONS) + ("--source-alone" in step.arguments) * 2


def _asked(step: Step) -> int:
    """Answers to every question."""
    if not step.name.startswith("communicate "):
        return 0
    if "--itself" in step.arguments:
        # Both directions, and each model with itself.
        return 4 * (_COMMON + _METHODS)
    return _COMMON + 3


if __name__ == "__main__":
    main()
