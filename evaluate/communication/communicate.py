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
and ``shuffled``, the mapped states of an example with another answer. A ``compress`` map reads windows of states and
makes nothing of a single one: it has ``aligned`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.judging.table import JUDGED
from align.layers import LayerPair
from align.maps.fitted import Adapter, Aligner
from evaluate.communication.asking import Prompt, PutIn, ask, parted, prompts_of
from evaluate.communication.messages import (
    Reading,
    deliverable,
    read,
    received,
    state_bytes,
    text_bytes,
    wire_format,
)
from evaluate.communication.saying import Said, say, spans_of, start_of
from evaluate.communication.tasks.base import Example, Task
from evaluate.communication.verdicts import (
    CONTROLS,
    METHODS,
    beats_of,
    condition_name,
    describe,
    figures,
    gain,
    undelivered,
    warnings_of,
)
from evaluate.injection.controls import control_states
from evaluate.injection.loading import Loaded, Models, check_card, choose
from evaluate.injection.reading import spelt
from evaluate.injection.verified import leak_at, recorded, side_channels, start_token
from evaluate.injection.wire import Crossing, Rows, Wire, crossing, wire
from featstore.errors import SpecError
from featstore.models.devices import DeviceMap
from featstore.models.probe.prove import Needs
from featstore.models.references import NOTHING, Allowed
from featstore.runtime.console import Tick, progress
from featstore.store.format.elements import Format

__all__ = ["COMMON", "Exchange", "describe", "identity", "prepare"]

#: Conditions without states.
COMMON = ("silent", "text", "summary")


@dataclass(frozen=True, eq=False)
class Exchange:
    """Two models and their maps, ready for tasks: a run resolved once, however many tasks follow.

    Attributes:
        adapter_type: Type of the run's maps.
        wires: Its maps, in the order of the results.
        models: The models, one of which is in memory at a time.
        needs: By name what is done with a model.
        form: Storage format that states travel in.
        summary_tokens: Length of A's summaries.
        max_new_tokens: Length of B's free answers.
        seed: Of the controls.
        quiet: No progress.
    """

    adapter_type: str
    wires: tuple[Wire, ...]
    models: Models
    needs: Mapping[str, Needs]
    form: Format
    summary_tokens: int
    max_new_tokens: int
    seed: int
    quiet: bool
    _held: dict[str, Loaded] = field(default_factory=dict, repr=False)
    _verified: dict[str, Any] = field(default_factory=dict, repr=False)
    _start_tokens: dict[str, Any] = field(default_factory=dict, repr=False)

    def result(self, task: Task) -> dict[str, Any]:
        """Put a task to the models in every condition.

        Args:
            task: From :func:`evaluate.communication.tasks.named.make`.

        Returns:
            The contents of ``communicate.json``. ``bytes`` of a condition is what travels for an example in the mean:
            the bytes of a text, those of the states in the format, or latents x latent_dim x bytes a number of every
            window of the context (:meth:`evaluate.injection.wire.Wire.rate`).

        Raises:
            OffsetError: An example has a character that a model's tokenizer cannot spell.
            SpecError: An example does not fit into a model.
        """
        directions = list(dict.fromkeys((w.aligner.pair.source, w.aligner.pair.target) for w in self.wires))
        for source, target in directions:
            # What cannot be read is said before the first of many answers, not after hours of them.
            for name, texts in ((source, _sources_texts(task)), (target, _targets_texts(task))):
                for written in texts:
                    spelt(self.models.info(name).tokenizer, written, f"model {name!r}: example")
        work = len(task.examples) * (len(COMMON) * len(directions) + sum(map(_conditions, self.wires)))
        said: dict[str, Said] = {}
        # What a target makes of the text, or of nothing, does not depend on who has read it.
        alike: dict[Any, list[str]] = {}
        found: dict[tuple[str, str], dict[str, Any]] = {}
        with progress(f"communicate {task.name}", work, "answers", quiet=self.quiet) as tick:
            # One model at a time. A source says all it has to say to anybody, then the next is asked; where maps go
            # both ways, the first comes back to be asked.
            for name in (*self.models.names, *self.models.names):
                answers = [
                    each for each in directions if each[1] == name and each[0] in {*said, name} and each not in found
                ]
                speaks = name not in said and any(source == name for source, _ in directions)
                if answers or speaks:
                    self._turn(task, name, directions, answers, said, alike, found, tick)
        entries = {}
        for source, target in directions:
            key = task.name if len(directions) == 1 else f"{task.name} ({source}->{target})"
            entries[key] = found[source, target]
        return {
            "adapter_type": self.adapter_type,
            "judged": JUDGED,
            "format": self.form.name,
            "seed": self.seed,
            "summary_tokens": self.summary_tokens,
            "max_new_tokens": self.max_new_tokens,
            "decoding": "greedy",
            "interval": "accuracies: Wilson, 95 %; gains: Tango, 95 %, and exact p; both over clusters of questions",
            "tasks": entries,
            "verified": {name: self._verified[name] for name in self.models.names},
            **({"start": starts} if (starts := self._starts(entries)) else {}),
        }

    def _starts(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """The start token of every model that answered with its prompt hidden."""
        hidden = {
            entry["target"]: None
            for entry in entries.values()
            if any(block["condition"] == "aligned" for block in entry["conditions"].values())
        }
        return {name: self._start_tokens[name] for name in hidden}

    def _turn(
        self,
        task: Task,
        name: str,
        directions: Sequence[tuple[str, str]],
        answers: Sequence[tuple[str, str]],
        said: dict[str, Said],
        alike: dict[Any, list[str]],
        found: dict[tuple[str, str], dict[str, Any]],
        tick: Tick,
    ) -> None:
        """Let one model say what it has to say, and answer whom it can answer."""
        model = self._model(name)
        maps = {
            each: [w for w in self.wires if (w.aligner.pair.source, w.aligner.pair.target) == each]
            for each in directions
        }
        if name not in said and any(source == name for source, _ in directions):
            layers = {
                k
                for (source, _), of in maps.items()
                if source == name
                for w in of
                for k in w.aligner.pair.source_layers
            }
            said[name] = say(model, task, sorted(layers), self.summary_tokens)
        for each in answers:
            leaks = {w.aligner.pair.key: leak_at(self._verified, name, w.aligner.pair.target_layer) for w in maps[each]}
            run = _Direction(
                task, each[0], model, said[each[0]], self.form, self.max_new_tokens, self.seed, tick, leaks, alike
            )
            found[each] = run.entry(maps[each])

    def _model(self, name: str) -> Loaded:
        """A model, which stays until another one is needed."""
        if name not in self._held:
            self._held.clear()
            self.models.freed()
            model = self.models.load(name).tested(self.needs[name])
            self._held[name] = model
            self._verified[name] = recorded(model, self.needs[name])
            self._start_tokens[name] = start_token(model)
        return self._held[name]


def prepare(
    adapter: Adapter,
    *,
    layers: str | None = None,
    itself: bool = False,
    form: str = "bfloat16",
    summary_tokens: int = 16,
    max_new_tokens: int = 8,
    overrides: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    device_map: DeviceMap | None = None,
    seed: int = 0,
    models: Mapping[str, Loaded] | None = None,
    allow_side_channel: bool = False,
    allowed: Allowed = NOTHING,
    quiet: bool = False,
) -> Exchange:
    """Resolve a run for tasks: choose its maps and find its models, which are loaded when their turn comes.

    Args:
        adapter: The maps of a run; every direction it has is tried.
        layers: Source layers, None for all.
        itself: Also let every target read for itself, at the target layers and with the identity as the map: what the
            channel gives where nothing is lost between two models.
        form: Storage format that states travel in. It is none of a ``compress`` map's: there the latents travel, in
            the numbers they were trained for.
        summary_tokens: Length of A's summaries.
        max_new_tokens: Length of B's free answers.
        overrides: ``NAME=REF`` for models that moved.
        device: Where to run.
        dtype: Compute dtype.
        device_map: Where the modules of models go, instead of one device.
        seed: Of the controls.
        models: The run's models where they are loaded already.
        allow_side_channel: Whether layers are taken that leak past the stream; the leak stands beside the figures.
        allowed: Whether models are loaded that the card names and the user has not, and pickled weights read.
        quiet: No progress.

    Raises:
        AdapterError: A map does not fit its card, or the card does not fit the models.
        StrangeReferenceError: The card names a model that the user has not named.
        ProbeError: A layer has a side channel, or a model cannot go on from a prompt.
        SpecError: The run has no such layer, or the format cannot travel.
    """
    states_form = wire_format(form)
    for name, count in (("summary", summary_tokens), ("answer", max_new_tokens)):
        if count < 1:
            raise SpecError(f"length of the {name} is {count}: must be 1 or more")
    check_card(adapter)
    chosen = choose(adapter, layers)
    # A map that does not fit its card is refused before the wait for the weights.
    wires = [wire(adapter, a) for a in chosen]
    names = [name for a in chosen for name in (a.pair.source, a.pair.target)]
    answering: dict[str, tuple[int, ...]] = {}
    for a in chosen:
        answering[a.pair.target] = (*answering.get(a.pair.target, ()), a.pair.target_layer)
    needed = Models(
        adapter,
        names,
        overrides,
        device=device,
        dtype=dtype,
        device_map=device_map,
        quiet=quiet,
        given=models,
        needs={name: Needs(continuing=True, layers=answering.get(name, ())) for name in names},
        allow_side_channel=allow_side_channel,
        allowed=allowed,
    )
    # Where hiding fails, states for a whole context cannot be told from the context itself: those conditions are left
    # out, with the reason, and the others run.
    needs = {name: Needs(continuing=True, layers=answering.get(name, ()), hide=True) for name in needed.names}
    if itself:
        have = {a.pair.key for a in chosen}
        own = dict.fromkeys((a.pair.target, a.pair.target_layer) for a in chosen)
        new = [identity(name, layer, int(adapter.card["models"][name]["width"])) for name, layer in own]
        wires += [wire(adapter, a) for a in new if a.pair.key not in have]
    return Exchange(
        adapter.card["type"], tuple(wires), needed, needs, states_form, summary_tokens, max_new_tokens, seed, quiet
    )


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
    """One model has read, the other (or the same) answers."""

    task: Task
    source: str
    target: Loaded
    said: Said
    form: Format
    length: int
    seed: int
    tick: Tick
    leaks: Mapping[str, float | None]
    alike: dict[Any, list[str]]

    def entry(self, maps: Sequence[Wire]) -> dict[str, Any]:
        """The direction's part of ``communicate.json``."""
        task, examples = self.task, self.task.examples
        delivered = [
            deliverable(self.target.info.tokenizer, written, partial(task.text, e))
            for e, written in zip(examples, self.said.summaries, strict=True)
        ]
        summaries = [message for message, _ in delivered]
        told = {
            "text": ([task.text(e) for e in examples], [e.context for e in examples]),
            "summary": ([task.text(e, s) for e, s in zip(examples, summaries, strict=True)], summaries),
        }
        answers: dict[str, list[str]] = {}
        sizes = {"silent": 0.0}
        for name, (texts, sent) in told.items():
            answers |= self._ask(self._prompts(texts), {name: None})
            sizes[name] = float(np.mean([text_bytes(text) for text in sent]))
        spans, readings = spans_of(task), self.said.readings
        texts_read, prompts = self._aligned_prompts(told["text"][0], spans, readings)
        reasons: dict[str, str] = {}
        # All that asks the question alone is asked together, because the question is then read once.
        alone: dict[str, PutIn | None] = {"silent": None}
        for to in maps:
            key = to.aligner.pair.key
            states, why = self._states(to, readings, texts_read, prompts)
            reasons |= {f"{name} {key}": reason for name, reason in why.items()}
            put = {f"{name} {key}": given for name, given in states.items()}
            sizes |= {name: self._size(to, given.how, texts_read) for name, given in put.items()}
            alone |= {name: given for name, given in put.items() if given.how != "aligned"}
            answers |= self._ask(prompts, {name: given for name, given in put.items() if given.how == "aligned"})
            # The progress counts what cannot be done as done.
            self.tick(len(examples) * (_conditions(to) - len(put)))
        answers |= self._ask(self._prompts([task.question_text(e) for e in examples]), alone)
        entry = self._judged(maps, {name: answers[name] for name in sizes}, sizes, reasons, summaries)
        lost = [missing for _, missing in delivered]
        entry["undelivered"] = sum(lost)
        if any(lost):
            entry["warnings"].append(undelivered(lost, self.target.name))
        return entry

    def _prompts(self, texts: Sequence[str]) -> list[Prompt]:
        return prompts_of(self.target, texts, [e.choices for e in self.task.examples], self.length)

    def _ask(self, prompts: Sequence[Prompt], put_in: Mapping[str, PutIn | None]) -> dict[str, list[str]]:
        asked = str([(prompt.ids, prompt.rest) for prompt in prompts])
        known = {
            name: self.alike[self.target.name, asked]
            for name, one in put_in.items()
            if one is None and (self.target.name, asked) in self.alike
        }
        self.tick(len(known) * len(prompts))
        left = {name: one for name, one in put_in.items() if name not in known}
        found = ask(self.target, prompts, left, length=self.length, tick=self.tick) if left else {}
        examples = self.task.examples
        answers = {
            name: [e.choices[a] if isinstance(a, int) else a for e, a in zip(examples, given, strict=True)]
            for name, given in found.items()
        }
        for name in [name for name, one in left.items() if one is None]:
            self.alike[self.target.name, asked] = answers[name]
        return answers | known

    def _aligned_prompts(
        self, texts: Sequence[str], spans: Sequence[int], readings: Sequence[Reading]
    ) -> tuple[list[Crossing], list[Prompt]]:
        """The contexts under both tokenizers, and the prompts with the places that take states."""
        start = start_of(self.task.text_prompt)
        own = read(self.target, texts, [start] * len(texts), spans, ())
        crossings, prompts = [], []
        for reading, mine, prompt in zip(readings, own, self._prompts(texts), strict=True):
            text = crossing(reading.window, mine.window, reading.sink, mine.sink)
            # The rest begins with the first token that has read beyond the context.
            end = int(np.flatnonzero(~mine.window.special).max(initial=0)) + 1
            crossings.append(text)
            places = tuple(map(int, text.places))
            prompts.append(Prompt(prompt.ids[:end], prompt.ids[end:], prompt.choices, places))
        return crossings, prompts

    def _states(
        self, to: Wire, readings: Sequence[Reading], texts: Sequence[Crossing], prompts: Sequence[Prompt]
    ) -> tuple[dict[str, PutIn], dict[str, str]]:
        """What each condition of a layer pair puts in, and why some cannot be."""
        aligner, layers = to.aligner, to.aligner.pair.source_layers
        rng = np.random.default_rng(self.seed)
        partners = _partners(self.task.examples, rng)
        result: dict[str, PutIn] = {}
        reasons: dict[str, str] = {}
        sent: dict[bool, list[Rows]] = {}
        if aligner.takes_rows:
            sent[False] = [aligner.apply(received(r.rows(layers, [r.last]), self.form)) for r in readings]
        else:
            names = ", ".join(method for method in METHODS if method != "aligned")
            reasons[names] = "the map reads windows of states and makes nothing of a single one"
        sent[True] = []
        for example, reading, text in zip(self.task.examples, readings, texts, strict=True):
            rows = reading.rows(layers, range(len(reading.window.ids)))
            if aligner.takes_rows:
                # Those that travel. Of a map of windows the latents do, which its own encoder rounds.
                used = text.taken[text.places]
                rows[used] = received(rows[used], self.form)
            sent[True].append(to.states(rows, text, to.pieces(example.context)))
        refused = self.target.verdict.layers[str(aligner.pair.target_layer)].hide_refused
        why = f"--keep hide fails the two-prompt test: {refused}" if refused is not None else None
        why = why or parted(prompts, self.target.stream.batching.switch, self.length)
        if why is not None:
            reasons["aligned"] = why
            del sent[True]
        for whole, mapped in sent.items():
            new: dict[str | None, list[Rows]] = {None: mapped, "random": []}
            for x in mapped:
                noise = control_states("random_norm", aligner, x, None, rng, self.seed, mapped=x)
                if not isinstance(noise, str):
                    new["random"].append(noise)
            if partners is not None:
                new["shuffled"] = [_stretched(mapped[j], len(x)) for j, x in zip(partners, mapped, strict=True)]
            for method in METHODS:
                if (method == "aligned") != whole:
                    continue
                for control in (None, *CONTROLS):
                    name = condition_name(method, control)
                    if control in new:
                        keep = "hide" if whole else "own"
                        result[name] = PutIn(aligner.pair.target_layer, new[control], method, keep)
                    else:
                        reasons[name] = "no two examples have different answers"
        return result, reasons

    def _size(self, to: Wire, how: str, texts: Sequence[Crossing]) -> float:
        """Mean bytes that travel for an example."""
        rate = self._rate(to)
        if rate is not None:
            return rate["latent_bytes"] * rate["windows"] / len(texts)
        # A state that several positions take travels once.
        counts = [len(set(text.taken[text.places])) for text in texts] if how == "aligned" else [1]
        return float(np.mean(counts)) * state_bytes(1, to.aligner.widths[0], self.form)

    def _rate(self, to: Wire) -> dict[str, float | int] | None:
        """What a map of windows sends for all contexts together; None for a map of rows."""
        ends = [[0, *to.pieces(e.context)] for e in self.task.examples]
        return to.rate([size for row in ends for size in np.diff(row).tolist()])

    def _judged(
        self,
        maps: Sequence[Wire],
        answers: Mapping[str, Sequence[str]],
        sizes: Mapping[str, float],
        reasons: dict[str, str],
        summaries: Sequence[str],
    ) -> dict[str, Any]:
        task = self.task
        right = {
            name: np.array([task.is_right(e, a) for e, a in zip(task.examples, given, strict=True)])
            for name, given in answers.items()
        }
        clusters = [example.group for example in task.examples]
        conditions = {}
        for name, found in right.items():
            condition, _, pair = name.partition(" ")
            conditions[name] = {"condition": condition, "pair": pair or None, **figures(found, sizes[name], clusters)}
        gains: dict[str, dict[str, Any]] = {}
        keys = [to.aligner.pair.key for to in maps]
        for pair in keys:
            for method in METHODS:
                mapped = right.get(f"{method} {pair}")
                if mapped is None:
                    continue
                against = {"silent": "silent"}
                against |= {control: f"{condition_name(method, control)} {pair}" for control in CONTROLS}
                gains[f"{method} {pair}"] = {
                    control: gain(mapped, right[other], clusters)
                    for control, other in against.items()
                    if other in right
                }
        pairs: dict[str, dict[str, Any]] = {}
        for to in maps:
            own = to.aligner.options.get("map") == "identity"
            pairs[to.aligner.pair.key] = {"map_numbers": 0 if own else to.aligner.shipped}
            if (rate := self._rate(to)) is not None:
                pairs[to.aligner.pair.key]["rate"] = rate
            pairs[to.aligner.pair.key]["leak"] = self.leaks[to.aligner.pair.key]
        return {
            "task": task.name,
            "source": self.source,
            "target": self.target.name,
            "n": len(task.examples),
            "clusters": len(set(clusters)),
            "chance": task.chance,
            "chance_is": task.chance_is,
            "scoring": "choice of the highest likelihood"
            if task.has_choices
            else "first answer named in the first line",
            "conditions": conditions,
            "text_over_silent": gain(right["text"], right["silent"], clusters),
            "gains": gains,
            "beats": beats_of(gains),
            "pairs": pairs,
            "reasons": reasons,
            "warnings": [*side_channels(self.leaks), *warnings_of(right, keys, task.chance, gains, clusters)],
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


def _conditions(to: Wire) -> int:
    """How many conditions a map has, controls included."""
    return (len(METHODS) if to.aligner.takes_rows else 1) * (1 + len(CONTROLS))


def _sources_texts(task: Task) -> tuple[list[str], ...]:
    """What the source reads of a task, example by example."""
    return [task.context_text(e) for e in task.examples], [task.summary_text(e) for e in task.examples]


def _targets_texts(task: Task) -> tuple[list[str], ...]:
    """What the target reads of a task, example by example."""
    return [task.question_text(e) for e in task.examples], [task.text(e) for e in task.examples]


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
