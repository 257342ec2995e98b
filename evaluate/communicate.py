"""Can B answer what only A has read? A reads a context, B a question; what B has of the context is the condition.

==============  =====================================================================================
condition       what B has of the context
==============  =====================================================================================
``silent``      nothing
``text``        the text: the ceiling
``summary``     some tokens in which A sums it up
``replace``     A's state at its last position, mapped, in place of B's at the question's last position
``sum``         the same, added to B's
``mean``        the same, averaged with B's
``aligned``     A's states at all positions, mapped, each where B would have read the same text; B's own
                states there are hidden from the question and the answer
==============  =====================================================================================

``replace``, ``sum`` and ``mean`` are those of "Communicating Activations Between Language Model Agents" (arXiv
2501.14082), with a map between two models. Each of the four has two controls: ``random``, vectors of the same norms,
and ``shuffled``, the mapped states of an example with another answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.aligners import Adapter, Aligner
from align.layers import LayerPair
from evaluate.controls import control_states
from evaluate.inject import source_positions
from evaluate.loading import Loaded, choose, load
from evaluate.messages import Reading, read, received, state_bytes, text_bytes, wire_format
from evaluate.tasks.asking import Prompt, PutIn, ask, prompts_of
from evaluate.tasks.base import Example, Task, is_right
from evaluate.tasks.verdicts import CONTROLS, METHODS, condition_name, describe, figures, gain, warnings_of
from featstore.console import Tick, progress
from featstore.errors import SpecError
from featstore.store.formats import Format

__all__ = ["COMMON", "communicate", "describe", "identity"]

#: Conditions without states.
COMMON = ("silent", "text", "summary")
_PER_PAIR = len(METHODS) * (1 + len(CONTROLS))


def communicate(
    adapter: Adapter,
    task: Task,
    *,
    layers: str | None = None,
    itself: bool = False,
    form: str = "bfloat16",
    summary_tokens: int = 16,
    max_new_tokens: int = 8,
    overrides: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    models: Mapping[str, Loaded] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Put a task to the models of a run in every condition.

    Args:
        adapter: A run's adapter; every direction it has is tried.
        task: From :func:`evaluate.tasks.make`.
        layers: Source layers, None for all.
        itself: Also let every target read for itself, at the target layers and with the identity as the map: what the
            channel gives where nothing is lost between two models.
        form: Storage format that states travel in.
        summary_tokens: Length of A's summaries.
        max_new_tokens: Length of B's free answers.
        overrides: ``NAME=REF`` for models that moved.
        device: Where to run.
        dtype: Compute dtype.
        seed: Of the controls.
        models: The run's models where they are loaded already.
        quiet: No progress.

    Returns:
        The contents of ``communicate.json``.

    Raises:
        AdapterError: The adapter's maps take windows, or it does not fit the models.
        SpecError: The run has no such layer, the format cannot travel, or an example does not fit into a model.
    """
    wire = wire_format(form)
    for name, count in (("summary", summary_tokens), ("answer", max_new_tokens)):
        if count < 1:
            raise SpecError(f"length of the {name} is {count}: must be 1 or more")
    chosen = choose(adapter, layers)
    named = dict.fromkeys(name for a in chosen for name in (a.pair.source, a.pair.target))
    loaded = {
        name: (models or {}).get(name) or load(adapter, name, overrides, device=device, dtype=dtype, quiet=quiet)
        for name in named
    }
    if itself:
        have = {a.pair.key for a in chosen}
        own = dict.fromkeys((a.pair.target, a.pair.target_layer) for a in chosen)
        new = [identity(name, layer, loaded[name].info.width) for name, layer in own]
        chosen = [*chosen, *(a for a in new if a.pair.key not in have)]
    directions = list(dict.fromkeys((a.pair.source, a.pair.target) for a in chosen))
    work = len(task.examples) * (len(COMMON) * len(directions) + _PER_PAIR * len(chosen))
    entries = {}
    with progress(f"communicate {task.name}", work, "answers", quiet=quiet) as tick:
        for source, target in directions:
            maps = [a for a in chosen if (a.pair.source, a.pair.target) == (source, target)]
            run = _Direction(task, loaded[source], loaded[target], wire, (summary_tokens, max_new_tokens), seed, tick)
            key = task.name if len(directions) == 1 else f"{task.name} ({source}->{target})"
            entries[key] = run.entry(maps)
    return {
        "adapter_type": adapter.card["type"],
        "format": form,
        "seed": seed,
        "summary_tokens": summary_tokens,
        "max_new_tokens": max_new_tokens,
        "decoding": "greedy",
        "interval": "accuracies: Wilson, 95 %; gains: 95 % of 1000 resamples of the examples",
        "tasks": entries,
    }


def identity(model: str, layer: int, width: int) -> Aligner:
    """The map of a layer to itself.

    Args:
        model: Name.
        layer: 0..L.
        width: Of its stream.
    """
    zero = np.zeros(width, np.float32)
    names = ("mean_source", "mean_target", "control_mean_source", "control_mean")
    tensors = {"weight": np.eye(width, dtype=np.float32), **dict.fromkeys(names, zero)}
    return Aligner(LayerPair(model, (layer,), model, layer), tensors, {"map": "identity"})


@dataclass
class _Direction:
    """One model reads, the other (or the same) answers."""

    task: Task
    source: Loaded
    target: Loaded
    wire: Format
    lengths: tuple[int, int]
    seed: int
    tick: Tick

    def entry(self, maps: Sequence[Aligner]) -> dict[str, Any]:
        """The direction's part of ``communicate.json``."""
        task, examples = self.task, self.task.examples
        answers: dict[str, list[str]] = {}
        sizes: dict[str, float] = {}
        summaries = self._summaries()
        told = {
            "silent": ([task.question_text(e) for e in examples], [""] * len(examples)),
            "text": ([task.text(e) for e in examples], [e.context for e in examples]),
            "summary": ([task.text(e, s) for e, s in zip(examples, summaries, strict=True)], summaries),
        }
        for name, (texts, sent) in told.items():
            answers[name] = self._ask(self._prompts(texts), {name: None})[name]
            sizes[name] = float(np.mean([text_bytes(text) for text in sent]))
        contexts = [task.context_text(e) for e in examples]
        spans = [len(e.context.encode()) for e in examples]
        start = _start(task.context_prompt)
        kept = sorted({layer for a in maps for layer in a.pair.source_layers})
        readings = read(self.source, contexts, [start] * len(examples), spans, kept)
        places, prompts = self._aligned_prompts(told["text"][0], spans, readings)
        reasons: dict[str, str] = {}
        questions = self._prompts(told["silent"][0])
        for aligner in maps:
            states, why = self._states(aligner, readings, places)
            reasons |= {f"{name} {aligner.pair.key}": reason for name, reason in why.items()}
            for whole, shown in ((False, questions), (True, prompts)):
                # A state that several positions take travels once.
                count = float(np.mean([len(set(p)) for p in places])) if whole else 1.0
                given = {f"{name} {aligner.pair.key}": g for name, g in states.items() if (g.how == "aligned") == whole}
                answers |= self._ask(shown, given)
                sizes |= dict.fromkeys(given, count * state_bytes(1, aligner.widths[0], self.wire))
            # The progress counts what cannot be done as done.
            self.tick(len(examples) * len(why))
        return self._judged(maps, answers, sizes, reasons, summaries)

    def _prompts(self, texts: Sequence[str]) -> list[Prompt]:
        return prompts_of(self.target, texts, [e.choices for e in self.task.examples], self.lengths[1])

    def _ask(self, prompts: Sequence[Prompt], put_in: Mapping[str, PutIn | None]) -> dict[str, list[str]]:
        found = ask(self.target, prompts, put_in, length=self.lengths[1], tick=self.tick)
        examples = self.task.examples
        return {
            name: [e.choices[a] if isinstance(a, int) else a for e, a in zip(examples, answers, strict=True)]
            for name, answers in found.items()
        }

    def _summaries(self) -> list[str]:
        texts = [self.task.summary_text(e) for e in self.task.examples]
        prompts = prompts_of(self.source, texts, [()] * len(texts), self.lengths[0])
        found = ask(self.source, prompts, {"summary": None}, length=self.lengths[0], tick=lambda _: None)
        return [" ".join(str(text).split()) for text in found["summary"]]

    def _aligned_prompts(
        self, texts: Sequence[str], spans: Sequence[int], readings: Sequence[Reading]
    ) -> tuple[list[NDArray[np.int64]], list[Prompt]]:
        """Per example the source position of every position that takes a state, and the prompts with their places."""
        start = _start(self.task.text_prompt)
        own = read(self.target, texts, [start] * len(texts), spans, ())
        whole = self._prompts(texts)
        taken, prompts = [], []
        for reading, mine, prompt in zip(readings, own, whole, strict=True):
            at = source_positions(reading.window, mine.window)
            at[mine.sink | ((at >= 0) & reading.sink[np.maximum(at, 0)])] = -1
            takers = np.flatnonzero(at >= 0)
            # The rest begins with the first token that has read beyond the context.
            end = int(np.flatnonzero(~mine.window.special).max(initial=0)) + 1
            taken.append(at[takers])
            prompts.append(Prompt(prompt.ids[:end], prompt.ids[end:], prompt.choices, tuple(map(int, takers))))
        return taken, prompts

    def _states(
        self, aligner: Aligner, readings: Sequence[Reading], places: Sequence[NDArray[np.int64]]
    ) -> tuple[dict[str, PutIn], dict[str, str]]:
        """What each condition of a layer pair puts in, and why some cannot be."""
        layers, layer = aligner.pair.source_layers, aligner.pair.target_layer
        rng = np.random.default_rng(self.seed)
        partners = _partners(self.task.examples, rng)
        result: dict[str, PutIn] = {}
        reasons: dict[str, str] = {}
        sent = {
            False: [received(r.rows(layers, [r.last]), self.wire) for r in readings],
            True: [received(r.rows(layers, at), self.wire) for r, at in zip(readings, places, strict=True)],
        }
        for whole, rows in sent.items():
            new: dict[str | None, list[NDArray[np.float32]]] = {None: [aligner.apply(x) for x in rows], "random": []}
            for x in rows:
                noise = control_states("random_norm", aligner, x, None, rng, self.seed)
                if not isinstance(noise, str):
                    new["random"].append(noise)
            if partners is not None:
                mapped = new[None]
                new["shuffled"] = [_stretched(mapped[j], len(x)) for j, x in zip(partners, rows, strict=True)]
            for method in METHODS:
                if (method == "aligned") != whole:
                    continue
                for control in (None, *CONTROLS):
                    name = condition_name(method, control)
                    if control in new:
                        result[name] = PutIn(layer, new[control], method, "hide" if whole else "own")
                    else:
                        reasons[name] = "no two examples have different answers"
        return result, reasons

    def _judged(
        self,
        maps: Sequence[Aligner],
        answers: Mapping[str, Sequence[str]],
        sizes: Mapping[str, float],
        reasons: dict[str, str],
        summaries: Sequence[str],
    ) -> dict[str, Any]:
        task = self.task
        right = {
            name: np.array([_right(task, e, a) for e, a in zip(task.examples, given, strict=True)])
            for name, given in answers.items()
        }
        conditions = {}
        for name, found in right.items():
            condition, _, pair = name.partition(" ")
            conditions[name] = {"condition": condition, "pair": pair or None, **figures(found, sizes[name])}
        gains: dict[str, dict[str, Any]] = {}
        for pair in (a.pair.key for a in maps):
            for method in METHODS:
                against = {"silent": "silent"}
                against |= {control: f"{condition_name(method, control)} {pair}" for control in CONTROLS}
                mapped = right[f"{method} {pair}"]
                gains[f"{method} {pair}"] = {
                    control: gain(mapped, right[other]) for control, other in against.items() if other in right
                }
        return {
            "task": task.name,
            "source": self.source.name,
            "target": self.target.name,
            "n": len(task.examples),
            "chance": task.chance,
            "chance_is": task.chance_is,
            "scoring": "choice of the highest likelihood" if task.has_choices else "answer in the first line",
            "conditions": conditions,
            "gains": gains,
            "pairs": {
                a.pair.key: {"map_numbers": 0 if a.options.get("map") == "identity" else a.shipped} for a in maps
            },
            "reasons": reasons,
            "warnings": warnings_of(right, [a.pair.key for a in maps], task.chance, gains),
            "examples": [
                {
                    "context": e.context,
                    "question": e.question,
                    "answer": e.answers[0],
                    "summary": summaries[i],
                    "given": {name: given[i] for name, given in answers.items()},
                }
                for i, e in enumerate(task.examples)
            ],
        }


def _start(prompt: str) -> int:
    """First byte of the context in a prompt; nothing that varies comes before it."""
    return len(prompt.partition("{context}")[0].encode())


def _right(task: Task, example: Example, answer: str) -> bool:
    return answer == example.answers[0] if task.has_choices else is_right(answer, example.answers)


def _partners(examples: Sequence[Example], rng: np.random.Generator) -> list[int] | None:
    """For every example another one with another answer, or None where one has none."""
    result = []
    for example in examples:
        others = [j for j, other in enumerate(examples) if not set(other.answers) & set(example.answers)]
        if not others:
            return None
        result.append(int(rng.choice(others)))
    return result


def _stretched(rows: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """As many rows as are needed, in their order, some twice or not at all."""
    if not len(rows):
        return np.zeros((count, rows.shape[1]), np.float32)
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
