"""Text in four conditions: source alone, target alone, source to target, target to source, with controls beside.

The prompt's states at the mapped layer are replaced during the prefill; the tokens generated after it are the target's
own. Blocks below the layer still read the target's own prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from align.aligners import Adapter, Aligner
from evaluate.controls import control_states
from evaluate.inject import injecting, source_positions
from evaluate.loading import Loaded, choose, load
from featstore import sites, tokens
from featstore.console import progress
from featstore.errors import SpecError

PROMPTS = (
    "The capital of France is",
    "To solve this problem, we need to",
    "The future of artificial intelligence",
    "In the year 2050, humanity will",
    "The main difference between cats and dogs",
)
CONTROLS = ("mean", "random_norm", "shuffled")


@dataclass(frozen=True)
class Read:
    """A prompt as one model read it.

    Attributes:
        window: Its tokens.
        states: ``{layer: (tokens, width)}``.
        sink: bool ``(tokens,)``.
    """

    window: tokens.TokenizedWindow
    states: dict[int, torch.Tensor]
    sink: NDArray[np.bool_]


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """Prompts of a file, one a line; the five default ones without a file.

    Args:
        path: UTF-8 text file or None.

    Raises:
        SpecError: No such file, or nothing in it.
    """
    if path is None:
        return PROMPTS
    try:
        lines = tuple(line.rstrip("\n") for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--prompts {path}: cannot be read ({error}); give a UTF-8 file, one prompt a line") from error
    if not lines:
        raise SpecError(f"--prompts {path} holds no prompt; write one a line")
    return lines


def generate(
    adapter: Adapter,
    prompts: Sequence[str],
    *,
    layers: str | None = None,
    max_new_tokens: int = 32,
    overrides: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    models: Mapping[str, Loaded] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Continue every prompt, greedily, in every condition.

    Args:
        adapter: A run's adapter; the fourth condition needs one trained with ``--both``.
        prompts: Texts.
        layers: Source layers, None for all.
        max_new_tokens: Length of each continuation.
        overrides: ``NAME=REF`` for models that moved.
        device: Where to run.
        dtype: Compute dtype.
        seed: Of the random controls.
        models: The run's models where they are loaded already.
        quiet: No progress.

    Returns:
        The contents of ``generations.json``.

    Raises:
        SpecError: A prompt is longer than a model's context.
    """
    chosen = choose(adapter, layers)
    source, target = chosen[0].pair.source, chosen[0].pair.target
    loaded = {
        name: (models or {}).get(name) or load(adapter, name, overrides, device=device, dtype=dtype, quiet=quiet)
        for name in dict.fromkeys((source, target))
    }
    reads = {
        name: [_read(model, prompt, chosen, max_new_tokens) for prompt in prompts] for name, model in loaded.items()
    }
    directions = {
        "source_to_target": [a for a in chosen if (a.pair.source, a.pair.target) == (source, target)],
        "target_to_source": [
            a for a in chosen if (a.pair.source, a.pair.target) == (target, source) != (source, target)
        ],
    }
    entries = []
    with progress("generate", len(prompts) * (2 + len(chosen)), "texts", quiet=quiet) as tick:
        for i, prompt in enumerate(prompts):
            entry: dict[str, Any] = {"prompt": prompt, "source": source, "target": target}
            for role, name in (("source_alone", source), ("target_alone", target)):
                entry[role] = _continue(loaded[name], reads[name][i], None, 0, max_new_tokens)[0]
                tick(1)
            for role, aligners in directions.items():
                entry[role] = {}
                for aligner in aligners:
                    entry[role][aligner.pair.key] = _stitched(loaded, reads, i, aligner, max_new_tokens, seed)
                    tick(1)
            entries.append(entry)
    return {"max_new_tokens": max_new_tokens, "decoding": "greedy", "seed": seed, "entries": entries}


def _read(loaded: Loaded, prompt: str, aligners: Sequence[Aligner], extra: int) -> Read:
    window = tokens.tokenize(loaded.info.tokenizer, [prompt])[0]
    if len(window.ids) + extra > loaded.info.context:
        raise SpecError(
            f"prompt {prompt[:40]!r}... has {len(window.ids)} tokens; with {extra} new ones it exceeds the context of "
            f"{loaded.name!r} ({loaded.info.context}); shorten it or use a smaller --max-new-tokens"
        )
    layers = {layer for a in aligners if a.pair.source == loaded.name for layer in a.pair.source_layers}
    layers |= {a.pair.target_layer for a in aligners if a.pair.target == loaded.name}
    ids = torch.from_numpy(window.ids.astype(np.int64))[None].to(loaded.device)
    # Sinks show at any stored layer; all of them are captured to judge by the store's own rule.
    states = sites.capture(loaded.stream, ids, sorted(layers | set(loaded.median_norm)))
    flat = {layer: hidden[0] for layer, hidden in states.items()}
    sink = loaded.is_sink(flat).cpu().numpy()
    return Read(window, {layer: flat[layer] for layer in layers}, sink)


def _stitched(
    loaded: dict[str, Loaded], reads: dict[str, list[Read]], i: int, aligner: Aligner, length: int, seed: int
) -> dict[str, str | None]:
    pair = aligner.pair
    source, target = reads[pair.source][i], reads[pair.target][i]
    taken = source_positions(source.window, target.window)
    taken[target.sink | ((taken >= 0) & source.sink[np.maximum(taken, 0)])] = -1
    places = np.flatnonzero(taken >= 0)
    rng = np.random.default_rng((seed, i))

    def rows(read: Read) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (
            torch.cat([read.states[layer].float() for layer in pair.source_layers], dim=-1).cpu().numpy()
        )
        return values

    states = rows(source)[taken[places]]
    pool = [rows(r)[~r.sink & ~r.window.special] for j, r in enumerate(reads[pair.source]) if j != i]
    rest = np.concatenate(pool) if pool else np.zeros((0, states.shape[1]), np.float32)
    other = rest[rng.integers(len(rest), size=len(places))] if len(rest) else None
    own = target.states[pair.target_layer]
    conditions: dict[str, Any] = {"mapped": aligner.apply(states), "self": own[places]}
    for name in CONTROLS:
        conditions[name] = control_states(name, aligner, states, other, rng, seed)
    usable = {name: value for name, value in conditions.items() if not isinstance(value, str)}
    hidden = own[None].repeat(len(usable), 1, 1)
    for row, value in enumerate(usable.values()):
        hidden[row, places] = torch.as_tensor(value).to(hidden.device, hidden.dtype)
    texts = _continue(loaded[pair.target], target, hidden, pair.target_layer, length)
    return dict.fromkeys(conditions) | dict(zip(usable, texts, strict=True))


@torch.inference_mode()
def _continue(loaded: Loaded, read: Read, hidden: torch.Tensor | None, layer: int, length: int) -> list[str]:
    """Greedy continuation of a prompt, one text for each row of injected states (or one of the model alone)."""
    count = 1 if hidden is None else len(hidden)
    ids = torch.from_numpy(read.window.ids.astype(np.int64))[None].repeat(count, 1).to(loaded.device)
    stop = loaded.model.generation_config.eos_token_id
    ends = [stop] if isinstance(stop, int) else list(stop or [])
    last = torch.tensor(ends, dtype=torch.long, device=loaded.device)
    if hidden is None:
        output = loaded.model(input_ids=ids, use_cache=True)
    else:
        with injecting(loaded.stream, layer, hidden, whole=False):
            output = loaded.model(input_ids=ids, use_cache=True)
    new: list[torch.Tensor] = []
    done = torch.zeros(count, dtype=torch.bool, device=loaded.device)
    for _ in range(length):
        step = output.logits[:, -1].argmax(dim=-1)
        new.append(step)
        done |= torch.isin(step, last)
        if bool(done.all()) or len(new) == length:
            break
        output = loaded.model(input_ids=step[:, None], past_key_values=output.past_key_values, use_cache=True)
    texts = []
    for row in torch.stack(new, dim=1).tolist():
        # A finished row went on while others were not done; that is not part of its text.
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        texts.append(loaded.info.tokenizer.decode(row[:end], skip_special_tokens=True))
    return texts


def describe(result: dict[str, Any]) -> str:
    """The texts for people.

    Args:
        result: From :func:`generate`.
    """
    lines = []
    for entry in result["entries"]:
        lines.append(f"{entry['prompt']!r}")
        lines.append(f"  {entry['source']} alone: {entry['source_alone']!r}")
        lines.append(f"  {entry['target']} alone: {entry['target_alone']!r}")
        for role in ("source_to_target", "target_to_source"):
            for key, texts in entry[role].items():
                lines.append(f"  {key}: {texts['mapped']!r}")
                lines += [f"    {name}: {texts[name]!r}" for name in CONTROLS if texts[name] is not None]
    return "\n".join(lines)
