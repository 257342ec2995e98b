"""Puts prompts to the answerer, with states where there are any, and takes its answers.

A prompt has a part into which states may go and a rest that follows it. With ``hide`` the rest and the answer read of
the first part only what was put in, which is why the two are passed one after the other. Prompts of one batch are
padded at the left; rests of several lengths go into several batches, so that no padding comes between.

Several conditions of the same prompts are rows of one batch: a step of generation costs little more for many rows than
for few. Where they differ in the prompt's last token alone, what comes before it is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evaluate.communication.messages import check_context
from evaluate.injection.continuing import check_speaker, prompt_states
from evaluate.injection.loading import Loaded
from featstore.errors import SpecError
from featstore.models import residual as sites
from featstore.models.answering import left_padded
from featstore.models.injection import Injection, aligned, inject, last
from featstore.models.loading import refuse_unknown_ids
from featstore.models.passes import Passes
from featstore.runtime.console import Tick
from featstore.text import tokens

#: Prompts of a batch; its rows, which are prompts under several conditions; and its tokens.
_PROMPTS, _ROWS, _TOKENS = 64, 256, 16384


@dataclass(frozen=True)
class Prompt:
    """What the answerer reads.

    Attributes:
        ids: Tokens that states may be put into.
        rest: Tokens that follow; may be empty.
        choices: Tokens of every choice; empty for a free answer.
        places: Positions in ``ids`` that take states.
    """

    ids: list[int]
    rest: list[int]
    choices: tuple[list[int], ...] = ()
    places: tuple[int, ...] = ()


@dataclass(frozen=True)
class PutIn:
    """States for a list of prompts.

    Attributes:
        layer: Of the answerer.
        states: Per prompt float32 ``(places, width)``.
        how: ``replace``, ``sum`` or ``mean`` into the last position, or ``aligned`` into the prompt's places.
        keep: ``own`` or ``hide``.
    """

    layer: int
    states: Sequence[NDArray[np.float32]]
    how: str
    keep: str = "own"


def prompts_of(loaded: Loaded, texts: Sequence[str], choices: Sequence[Sequence[str]], length: int) -> list[Prompt]:
    """Tokenise prompts and what may follow them.

    Args:
        loaded: The answerer.
        texts: Prompts, special tokens added as the tokenizer does.
        choices: Per prompt what it is to choose from, or nothing.
        length: New tokens of a free answer.

    Raises:
        SpecError: A prompt does not fit into the model.
        VocabularyError: The model's embedding has no row for a token.
    """
    tokenizer = loaded.info.tokenizer
    read = [window.ids.tolist() for window in tokens.tokenize(tokenizer, texts)]
    result = []
    for text, ids, options in zip(texts, read, choices, strict=True):
        ends = []
        for option in options:
            whole = tokenizer(f"{text} {option}", return_attention_mask=False, verbose=False)["input_ids"]
            # A tokenizer that joins the prompt's end with the choice gives the choice's own tokens instead.
            joined = whole[: len(ids)] != ids or len(whole) == len(ids)
            ends.append(tokenizer(f" {option}", add_special_tokens=False)["input_ids"] if joined else whole[len(ids) :])
        refuse_unknown_ids(loaded.info, np.array([*ids, *(token for end in ends for token in end)]))
        result.append(Prompt(ids, [], tuple(ends)))
    extra = max([length, *(len(end) for prompt in result for end in prompt.choices)])
    check_context(loaded, [len(prompt.ids) for prompt in result], extra, "the longest prompt")
    return result


@torch.inference_mode()
def ask(
    loaded: Loaded, prompts: Sequence[Prompt], put_in: Mapping[str, PutIn | None], *, length: int, tick: Tick
) -> dict[str, list[str | int]]:
    """Take the answers to prompts under several conditions.

    Args:
        loaded: The answerer.
        prompts: All with choices, or none.
        put_in: By condition what is put in, None for nothing.
        length: New tokens of a free answer.
        tick: Called with the number of answers given.

    Returns:
        By condition one answer a prompt: its text, or the number of the choice of the highest likelihood (the sum of
        its tokens' log-probabilities).

    Raises:
        SpecError: States do not fit the prompts; with ``hide``, a prompt without a rest has a last token that takes no
            state: the answer would begin with what is to be hidden; or a prompt and its answer pass the length where
            the model changes its position encoding.
        NonFiniteStateError: A state holds NaN or infinity.
    """
    why = parted(prompts, loaded.stream.batching.switch, length) if put_in else None
    if why is not None:
        raise SpecError(f"model {loaded.name!r}: {why}; use shorter examples, or longer ones")
    how = loaded.stream.continuing
    # What is read again is read without what was put in: prompts are read once only where their cache is gone on from.
    once = how.kind != "recomputed" and how.branching != "reread"
    answers: dict[str, list[str | int]] = {name: [""] * len(prompts) for name in put_in}
    for rows in _batches(prompts, padded=how.padding, switch=loaded.stream.batching.switch):
        batch = _batch(loaded, [prompts[row] for row in rows])
        given = {
            name: None if one is None else PutIn(one.layer, [one.states[row] for row in rows], one.how, one.keep)
            for name, one in put_in.items()
        }
        for names, at_end in _stacks(given, batch.ids, once=once):
            stack = [given[name] for name in names]
            with ExitStack() as context:
                passes = batch.at_end(stack) if at_end else batch.begun(stack, context)
                found = batch.answers(passes, len(stack), length)
            for i, name in enumerate(names):
                for row, answer in zip(rows, found[i * len(rows) : (i + 1) * len(rows)], strict=True):
                    answers[name][row] = answer
            tick(len(names) * len(rows))
    return answers


def parted(prompts: Sequence[Prompt], switch: int | None, length: int) -> str | None:
    """Whether a prompt and its answer are read in passes under two position encodings.

    Args:
        prompts: Those to be asked.
        switch: Length at which the model changes its position encoding; None for none.
        length: New tokens of a free answer.

    Returns:
        Which prompt, in words; None for none.
    """
    if switch is None:
        return None
    for prompt in prompts:
        # Without a rest, the last token may come in a pass of its own.
        first = len(prompt.ids) - (not prompt.rest)
        end = len(prompt.ids) + len(prompt.rest) + max([length, *map(len, prompt.choices)])
        if first <= switch < end:
            return f"a prompt of {first} tokens is read on to {end}, and the position encoding changes at {switch}"
    return None


def _batches(prompts: Sequence[Prompt], *, padded: bool, switch: int | None) -> Iterator[list[int]]:
    """Numbers of prompts that may share a batch, those of like length together.

    Their rests are of one length, they themselves too unless they may be padded, and all are on one side of a switch.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].rest), len(prompts[i].ids)))
    batch: list[int] = []
    for i in order:
        # In this order the one that is added is the longest.
        full = len(batch) == _PROMPTS or (len(batch) + 1) * len(prompts[i].ids) > _TOKENS
        unlike = False
        if batch:
            one, other = len(prompts[i].ids), len(prompts[batch[0]].ids)
            unlike = (not padded and one != other) or (switch is not None and other <= switch < one)
        if batch and (full or unlike or len(prompts[i].rest) != len(prompts[batch[0]].rest)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _stacks(given: Mapping[str, PutIn | None], ids: torch.Tensor, *, once: bool) -> Iterator[tuple[list[str], bool]]:
    """Conditions whose rows make one batch, and whether they differ in the prompts' last token alone.

    Without ``once`` no two conditions share what comes before it.
    """
    end = [name for name, one in given.items() if one is None or (one.how != "aligned" and one.keep == "own")]
    # A prompt of one token has nothing before it to share, and one condition nobody to share with.
    shared = set(end) if once and len(end) > 1 and ids.shape[1] > 1 else set()
    alike: dict[object, list[str]] = {}
    for name, one in given.items():
        key: object = "end" if name in shared else None if one is None else (one.layer, one.keep)
        alike.setdefault(key, []).append(name)
    most = max(1, min(_ROWS // len(ids), _TOKENS // ids.numel()))
    for key, names in alike.items():
        for first in range(0, len(names), most):
            yield names[first : first + most], key == "end"


def _batch(loaded: Loaded, prompts: Sequence[Prompt]) -> _Batch:
    ids, padding = left_padded([prompt.ids for prompt in prompts])
    return _Batch(loaded, prompts, ids.to(loaded.device), None if padding is None else padding.to(loaded.device))


class _Batch:
    """Prompts that go through the answerer together. Rows of several conditions come condition by condition."""

    def __init__(
        self, loaded: Loaded, prompts: Sequence[Prompt], ids: torch.Tensor, padding: torch.Tensor | None
    ) -> None:
        self.ids = ids
        self._loaded, self._prompts, self._padding = loaded, prompts, padding
        self._before: Passes | None = None
        self._own: dict[int, torch.Tensor] = {}

    def at_end(self, given: Sequence[PutIn | None]) -> Passes:
        """Pass the prompts under conditions that differ in the last token alone."""
        count = len(self.ids)
        if self._before is None:
            self._before = Passes(self._loaded.stream)
            self._before.read(self.ids[:, :-1], None if self._padding is None else self._padding[:, :-1])
        passes = self._before.branch(torch.arange(count).repeat(len(given)))

        def put(layer: int) -> sites.SiteFunction:
            def into(current: torch.Tensor) -> torch.Tensor:
                new = current.clone()
                for i, one in enumerate(given):
                    if one is not None and one.layer == layer:
                        part = slice(i * count, (i + 1) * count)
                        new[part] = last(current[part], np.concatenate(one.states), layer=layer, how=one.how).hidden
                return new

            return into

        with ExitStack() as stack:
            for layer in sorted({one.layer for one in given if one is not None}):
                stack.enter_context(sites.at_site(self._loaded.stream, layer, put(layer)))
            passes.read(self.ids[:, -1:].repeat(len(given), 1))
        return passes

    def begun(self, given: Sequence[PutIn | None], context: ExitStack) -> Passes:
        """Pass the prompts under conditions of one layer; what they hide stays hidden in the context."""
        made = [self._injection(one) for one in given if one is not None]
        padding = None if self._padding is None else self._padding.repeat(len(given), 1)
        if made:
            hidden, replaced = (torch.cat([getattr(one, name) for one in made]) for name in ("hidden", "replaced"))
            injection = Injection(made[0].layer, hidden, replaced, made[0].keep, padding)
            if not self._prompts[0].rest:
                check_speaker(injection)
            context.enter_context(inject(self._loaded.stream, injection, whole=False))
        passes = Passes(self._loaded.stream)
        passes.read(self.ids.repeat(len(given), 1), padding)
        return passes

    def _injection(self, given: PutIn) -> Injection:
        if given.layer not in self._own:
            model, stream = self._loaded.model, self._loaded.stream
            self._own |= prompt_states(model, stream, self.ids, [given.layer], padding=self._padding)
        own = self._own[given.layer]
        if given.how == "aligned":
            # Places count from the prompt's first token, the stream from its padding.
            places = [[own.shape[1] - len(p.ids) + place for place in p.places] for p in self._prompts]
            return aligned(own, given.states, places, layer=given.layer, keep=given.keep, padding=self._padding)
        state = np.concatenate(given.states)
        return last(own, state, layer=given.layer, how=given.how, keep=given.keep, padding=self._padding)

    def answers(self, passes: Passes, times: int, length: int) -> list[str | int]:
        """What is said after the prompts' rests."""
        rest = torch.tensor([prompt.rest for prompt in self._prompts], dtype=torch.long)
        logits = passes.read(rest.repeat(times, 1)) if rest.shape[1] else passes.logits
        if self._prompts[0].choices:
            return [*self._chosen(passes, logits, times)]
        return [*self._written(passes, logits, length)]

    def _written(self, passes: Passes, logits: torch.Tensor, length: int) -> list[str]:
        """Greedy answers."""
        stop = self._loaded.model.generation_config.eos_token_id
        ends = {stop} if isinstance(stop, int) else set(stop or ())
        new: list[list[int]] = []
        while True:
            step = logits[:, -1].argmax(dim=-1)
            new.append(step.tolist())
            if len(new) == length or all(ends & set(row) for row in zip(*new, strict=True)):
                break
            logits = passes.read(step[:, None])
        texts = []
        for row in zip(*new, strict=True):
            # A finished row went on while others were not done; that is not part of its text.
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            texts.append(self._loaded.info.tokenizer.decode(list(row[:end]), skip_special_tokens=True))
        return texts

    def _chosen(self, passes: Passes, first: torch.Tensor, times: int) -> list[int]:
        """The choices of the highest likelihood; each goes on by itself from the same prompt."""
        most = max(len(prompt.choices) for prompt in self._prompts)
        scores = torch.full((len(self._prompts) * times, most), -torch.inf, dtype=torch.float64)
        for at in range(most):
            ends = [prompt.choices[at] if at < len(prompt.choices) else [] for prompt in self._prompts] * times
            longest = max(len(end) for end in ends)
            # Padded at the right: attention is causal, so what is scored never sees it.
            wanted = torch.tensor([end + [0] * (longest - len(end)) for end in ends], device=first.device)
            logits = first
            if longest > 1:
                logits = torch.cat([first, passes.branch().read(wanted[:, :-1], keep=longest - 1)], dim=1)
            said = torch.log_softmax(logits.float(), dim=-1).gather(2, wanted[:, :, None])[:, :, 0].double().cpu()
            for row, end in enumerate(ends):
                if end:
                    scores[row, at] = said[row, : len(end)].sum()
        best: list[int] = scores.argmax(dim=1).tolist()
        return best
