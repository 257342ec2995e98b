"""Text in four conditions: source alone, target alone, source to target, target to source, with controls beside.

The prompt's states at the mapped layer are replaced during the prefill; the tokens generated after it are the target's
own. Blocks below the layer still read the target's own prompt.

Texts differ or agree at a glance; how much a condition changes is told by the likelihood, in nats per token, of the
receiving model's own continuation of the untouched prompt, teacher-forced under that condition. When text is sampled,
every condition of a prompt gets the same random numbers: texts differ only where the predictions do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.judging.table import JUDGED
from align.maps.fitted import Adapter
from evaluate.generation.voices import Heard, Put, Voice, heard
from evaluate.injection.controls import control_states
from evaluate.injection.loading import Loaded, Models, check_card, choose
from evaluate.injection.reading import Read, tokenized
from evaluate.injection.verified import leak_at, leak_mark, leak_words, recorded, side_channels
from evaluate.injection.wire import Rows, Wire, crossing, wire
from featstore.errors import SpecError
from featstore.models.devices import DeviceMap
from featstore.models.probe.prove import Needs
from featstore.models.references import NOTHING, Allowed
from featstore.models.sampling import Sampling
from featstore.runtime.console import Tick, progress

PROMPTS = (
    "The capital of France is",
    "To solve this problem, we need to",
    "The future of artificial intelligence",
    "In the year 2050, humanity will",
    "The main difference between cats and dogs",
)
CONTROLS = ("mean", "random_norm", "shuffled")
CONDITIONS = ("mapped", "self", *CONTROLS)
_ROLES = ("source_to_target", "target_to_source")


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """Prompts of a file, one a line; the five default ones without a file.

    Args:
        path: UTF-8 text file or None. Empty lines at its end are no prompts.

    Raises:
        SpecError: No such file, nothing in it, or an empty line before its last prompt: it may be a mistake or stand
            for an empty prompt, which no model could go on with.
    """
    if path is None:
        return PROMPTS
    try:
        # Not splitlines(): a form feed or a line separator within a prompt does not end it.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--prompts {path}: cannot be read ({error}); give a UTF-8 file, one prompt a line") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise SpecError(f"--prompts {path} holds no prompt; write one a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise SpecError(f"--prompts {path}: line {number} is empty; write one prompt a line and remove it")
    return tuple(lines)


def generate(
    adapter: Adapter,
    prompts: Sequence[str],
    *,
    layers: str | None = None,
    max_new_tokens: int = 32,
    overrides: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    device_map: DeviceMap | None = None,
    seed: int = 0,
    sample: Sampling | None = None,
    conditions: Sequence[str] = CONDITIONS,
    models: Mapping[str, Loaded] | None = None,
    allow_side_channel: bool = False,
    allowed: Allowed = NOTHING,
    quiet: bool = False,
) -> dict[str, Any]:
    """Continue every prompt in every condition.

    Args:
        adapter: The maps of a run; the fourth condition needs one trained with ``--both``.
        prompts: Texts.
        layers: Source layers, None for all.
        max_new_tokens: Length of each continuation.
        overrides: ``NAME=REF`` for models that moved.
        device: Where to run.
        dtype: Compute dtype.
        device_map: Where the modules of models go, instead of one device.
        seed: Of the random controls.
        sample: How to draw tokens; None for the likeliest each time.
        conditions: Which of :data:`CONDITIONS` to write texts in, besides each model alone.
        models: The run's models where they are loaded already.
        allow_side_channel: Whether layers are taken that leak past the stream; the leak stands beside the texts.
        allowed: Whether models are loaded that the card names and the user has not, and pickled weights read.
        quiet: No progress.

    Returns:
        The contents of ``generations.json``. ``likelihood`` of an entry has the keys of its texts: nats per token of
        the receiving model's own continuation (``target_alone``, and for ``target_to_source`` ``source_alone``).

    Raises:
        AdapterError: The run is damaged or does not fit a model.
        ModelLoadError: A model is not at hand.
        StrangeReferenceError: The card names a model that the user has not named.
        ProbeError: A layer has a side channel, or a model cannot go on from a prompt.
        SpecError: A prompt has no tokens or is longer than a model's context, there is none, or no such layer.
    """
    if not prompts:
        raise SpecError("there is no prompt to continue; give one at least")
    if set(conditions) - set(CONDITIONS):
        raise SpecError(f"conditions {', '.join(conditions)}: choose any of {', '.join(CONDITIONS)}")
    check_card(adapter)
    chosen = choose(adapter, layers)
    wires = [wire(adapter, aligner) for aligner in chosen]
    source, target = chosen[0].pair.source, chosen[0].pair.target
    layers_of = {name: tuple(a.pair.target_layer for a in chosen if a.pair.target == name) for name in (source, target)}
    needs = {name: Needs(continuing=True, layers=own) for name, own in layers_of.items()}
    both = Models(
        adapter,
        (source, target),
        overrides,
        device=device,
        dtype=dtype,
        device_map=device_map,
        quiet=quiet,
        given=models,
        needs=needs,
        allow_side_channel=allow_side_channel,
        allowed=allowed,
    )
    # Both models and all prompts are known to fit before the wait for the weights.
    shorten = "shorten it or use a smaller --max-new-tokens"
    windows = {name: tokenized(name, both.info(name), prompts, max_new_tokens, remedy=shorten) for name in both.names}
    entries: list[dict[str, Any]] = [
        {"prompt": prompt, "source": source, "target": target, "likelihood": {}} for prompt in prompts
    ]
    for entry in entries:
        for block in (entry, entry["likelihood"]):
            block |= dict.fromkeys(("source_alone", "target_alone")) | {role: {} for role in _ROLES}
    verified: dict[str, Any] = {}
    known: dict[str, Heard] = {}
    left = list(wires)
    work = len(prompts) * (len(both.names) + len(conditions) * len(chosen))
    with progress("generate", work, "texts", quiet=quiet) as tick:
        # One model at a time. The source is heard, then the target, which has all it needs by then; where maps go
        # both ways, the source comes back.
        for name in (*both.names, *both.names):
            mine = [to for to in left if to.aligner.pair.target == name and known.keys() | {name} >= _ends(to)]
            if name in known and not mine:
                continue
            with both.lent(name) as model:
                verified[name] = recorded(model, needs[name])
                if name not in known:
                    known[name] = heard(model, windows[name], chosen, max_new_tokens, sample, tick)
                    _write_alone(entries, known[name])
                for to in mine:
                    _write_mapped(entries, model, to, known, conditions, prompts, (max_new_tokens, sample, seed), tick)
                del model
            left = [to for to in left if to not in mine]
    leaks = {a.pair.key: leak_at(verified, a.pair.target, a.pair.target_layer) for a in chosen}
    # Wires are written as their targets were there; a result has them in the order of the run.
    order = [a.pair.key for a in chosen]
    for entry in entries:
        for block in (entry, entry["likelihood"]):
            for role in _ROLES:
                block[role] = {key: block[role][key] for key in order if key in block[role]}
    return {
        "max_new_tokens": max_new_tokens,
        "decoding": "greedy" if sample is None else _sampling(sample),
        "seed": seed,
        "likelihood": "nats per token of the receiving model's own continuation of the untouched prompt",
        "entries": entries,
        "leaks": leaks,
        "warnings": side_channels(leaks),
        "judged": JUDGED,
        "verified": {name: verified[name] for name in both.names},
    }


def _write_alone(entries: Sequence[dict[str, Any]], alone: Heard) -> None:
    for entry, text, value in zip(entries, alone.texts, alone.nats, strict=True):
        for role in ("source_alone", "target_alone"):
            if entry[role.removesuffix("_alone")] == alone.name:
                entry[role], entry["likelihood"][role] = text, value


def _write_mapped(
    entries: Sequence[dict[str, Any]],
    model: Loaded,
    to: Wire,
    known: Mapping[str, Heard],
    conditions: Sequence[str],
    prompts: Sequence[str],
    how: tuple[int, Sampling | None, int],
    tick: Tick,
) -> None:
    """Let a target go on under every condition of a map."""
    pair, (length, sample, seed) = to.aligner.pair, how
    here = known[pair.target]
    role = _ROLES[entries[0]["source"] != pair.source]
    states = _states(to, known[pair.source].reads, here.reads, prompts, seed)
    for batch, seen in zip(here.batches, here.reads, strict=True):
        voice = Voice(model, seen, batch, length, sample)
        for condition in conditions:
            injection = voice.injection(pair.target_layer, condition, [states[i] for i in batch])
            texts = voice.text(voice.say(injection))
            nats = voice.score(injection, [here.said[i] for i in batch])
            for i, text, value in zip(batch, texts, nats, strict=True):
                there = not isinstance(states[i][1][condition], str)
                for block, figure in ((entries[i], text), (entries[i]["likelihood"], value)):
                    block[role].setdefault(pair.key, {})[condition] = figure if there else None
            tick(len(batch))


def _ends(to: Wire) -> set[str]:
    return {to.aligner.pair.source, to.aligner.pair.target}


def _states(
    to: Wire,
    there: Sequence[Read],
    here: Sequence[Read],
    prompts: Sequence[str],
    seed: int,
) -> list[Put]:
    """What every condition puts into every prompt; None stands for the target's own states."""
    layers = to.aligner.pair.source_layers
    rows = [read_.rows(row, layers) for read_ in there for row in range(len(read_.windows))]
    (first, first_sinks), (second, second_sinks) = (
        ([w for read_ in side for w in read_.windows], [s for read_ in side for s in read_.sinks])
        for side in (there, here)
    )
    texts = [crossing(*each) for each in zip(first, second, first_sinks, second_sinks, strict=True)]
    mapped = [to.states(x, text, to.pieces(prompt)) for x, text, prompt in zip(rows, texts, prompts, strict=True)]
    # A map of windows cannot map single states of other prompts: what it made of them is drawn from.
    pools = (
        [x[~text.source_sink & ~text.source.special] for x, text in zip(rows, texts, strict=True)]
        if to.aligner.takes_rows
        else mapped
    )
    found: list[Put] = []
    for i, (x, text) in enumerate(zip(rows, texts, strict=True)):
        rng = np.random.default_rng((seed, i))
        rest = np.concatenate([pools[i][:0], *(pool for j, pool in enumerate(pools) if j != i)])
        drawn = rest[rng.integers(len(rest), size=len(text.places))] if len(rest) else None
        other, other_mapped = (drawn, None) if to.aligner.takes_rows else (None, drawn)
        source = x[text.taken[text.places]]
        states: dict[str, Rows | str | None] = {"mapped": mapped[i], "self": None}
        for name in CONTROLS:
            states[name] = control_states(
                name, to.aligner, source, other, rng, seed, mapped=mapped[i], other_mapped=other_mapped
            )
        found.append((text, states))
    return found


def _sampling(sample: Sampling) -> str:
    return f"sampled (temperature {sample.temperature:g}, top-p {sample.top_p:g}, seed {sample.seed})"


def describe(result: dict[str, Any]) -> str:
    """The texts for people, each with the likelihood of the receiving model's own text under its condition.

    Args:
        result: From :func:`generate`.
    """
    marks = {key: leak_mark(leak) for key, leak in result.get("leaks", {}).items()}
    lines = []
    for entry in result["entries"]:
        nats = entry["likelihood"]
        lines.append(f"{entry['prompt']!r}")
        lines += [
            f"  {entry[role]} alone: {entry[f'{role}_alone']!r}{_likelihood(nats[f'{role}_alone'])}"
            for role in ("source", "target")
        ]
        for role in ("source_to_target", "target_to_source"):
            for key, texts in entry[role].items():
                own = nats[role][key]
                beside = f"  [{marks[key]}]" if marks.get(key) else ""
                lines.append(f"  {key}: {texts['mapped']!r}{_likelihood(own['mapped'])}{beside}")
                lines += [
                    f"    {name}: {texts[name]!r}{_likelihood(own[name])}{beside}"
                    for name in CONTROLS
                    if texts[name] is not None
                ]
    lines += [f"{key}: {leak_words(leak)}" for key, leak in result.get("leaks", {}).items() if leak != 0]
    if result["entries"]:
        lines.append("in brackets: nats per token of the receiving model's own text under that condition")
    return "\n".join(lines)


def _likelihood(nats: float | None) -> str:
    return "" if nats is None else f"  [{nats:.2f}]"
