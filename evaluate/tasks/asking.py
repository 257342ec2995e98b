"""Puts prompts to the answerer, with states where there are any, and takes its answers.

A prompt has a part into which states may go and a rest that follows it. With ``hide`` the rest and the answer read of
the first part only what was put in, which is why the two are passed one after the other. Prompts of one batch are
padded at the left; rests of several lengths go into several batches, so that no padding comes between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evaluate.continuing import left_padded, prompt_states
from evaluate.inject import Injection, aligned, inject, last
from evaluate.loading import Loaded
from evaluate.messages import check_context
from featstore import tokens
from featstore.console import Tick

#: Rows of a batch, and tokens: a step of generation costs little more for many rows than for one.
_ROWS, _TOKENS = 64, 16384


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
        result.append(Prompt(ids, [], tuple(ends)))
    extra = max([length, *(len(end) for prompt in result for end in prompt.choices)])
    check_context(loaded, max(len(prompt.ids) for prompt in result), extra, "the longest prompt")
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
        SpecError: States do not fit the prompts.
        NonFiniteStateError: A state holds NaN or infinity.
    """
    answers: dict[str, list[str | int]] = {name: [""] * len(prompts) for name in put_in}
    layers = sorted({given.layer for given in put_in.values() if given is not None})
    for rows in _batches(prompts):
        batch = [prompts[row] for row in rows]
        ids, padding = left_padded([prompt.ids for prompt in batch])
        ids = ids.to(loaded.device)
        padding = None if padding is None else padding.to(loaded.device)
        own = prompt_states(loaded.model, loaded.stream, ids, layers, padding=padding) if layers else {}
        for name, given in put_in.items():
            injection = None if given is None else _injection(given, rows, batch, own[given.layer], padding)
            found: list[str | int] = []
            if batch[0].choices:
                found.extend(_chosen(loaded, batch, ids, padding, injection))
            else:
                found.extend(_written(loaded, batch, ids, padding, injection, length))
            for row, answer in zip(rows, found, strict=True):
                answers[name][row] = answer
            tick(len(rows))
    return answers


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Numbers of prompts whose rests are of one length, those of like length together."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].rest), len(prompts[i].ids)))
    batch: list[int] = []
    for i in order:
        # In this order the one that is added is the longest.
        full = len(batch) == _ROWS or (len(batch) + 1) * len(prompts[i].ids) > _TOKENS
        if batch and (full or len(prompts[i].rest) != len(prompts[batch[0]].rest)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _injection(
    given: PutIn, rows: Sequence[int], batch: Sequence[Prompt], own: torch.Tensor, padding: torch.Tensor | None
) -> Injection:
    states = [given.states[row] for row in rows]
    if given.how == "aligned":
        # Places count from the prompt's first token, the stream from its padding.
        places = [[own.shape[1] - len(p.ids) + place for place in p.places] for p in batch]
        return aligned(own, states, places, layer=given.layer, keep=given.keep, padding=padding)
    joined = np.concatenate(states)
    return last(own, joined, layer=given.layer, how=given.how, keep=given.keep, padding=padding)


class _Conversation:
    """Cached passes over a batch, each with the mask and positions that its padding needs."""

    def __init__(self, loaded: Loaded, ids: torch.Tensor, padding: torch.Tensor | None) -> None:
        self._model = loaded.model
        self._real = torch.zeros((len(ids), 0), dtype=torch.bool, device=ids.device)
        self._past: Any = None
        self.logits = self._pass(ids, torch.ones_like(ids, dtype=torch.bool) if padding is None else ~padding)[:, -1:]

    def hear(self, new: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, new tokens, vocabulary)`` of tokens that follow."""
        self.logits = self._pass(new, torch.ones_like(new, dtype=torch.bool), keep=0)
        return self.logits

    def _pass(self, new: torch.Tensor, real: torch.Tensor, keep: int = 1) -> torch.Tensor:
        self._real = torch.cat([self._real, real], dim=1)
        extra: dict[str, Any] = {}
        if not bool(self._real.all()):
            places = (self._real.cumsum(dim=1) - 1).clamp(min=0)
            extra = {"attention_mask": self._real.long(), "position_ids": places[:, -new.shape[1] :]}
        output = self._model(input_ids=new, past_key_values=self._past, use_cache=True, logits_to_keep=keep, **extra)
        self._past = output.past_key_values
        logits: torch.Tensor = output.logits
        return logits


def _written(
    loaded: Loaded,
    batch: Sequence[Prompt],
    ids: torch.Tensor,
    padding: torch.Tensor | None,
    injection: Injection | None,
    length: int,
) -> list[str]:
    """Greedy answers."""
    stop = loaded.model.generation_config.eos_token_id
    ends = {stop} if isinstance(stop, int) else set(stop or ())
    new: list[list[int]] = []
    with nullcontext() if injection is None else inject(loaded.stream, injection, whole=False):
        talk = _Conversation(loaded, ids, padding)
        if batch[0].rest:
            talk.hear(torch.tensor([prompt.rest for prompt in batch], device=ids.device))
        while True:
            step = talk.logits[:, -1].argmax(dim=-1)
            new.append(step.tolist())
            if len(new) == length or all(ends & set(row) for row in zip(*new, strict=True)):
                break
            talk.hear(step[:, None])
    texts = []
    for row in zip(*new, strict=True):
        # A finished row went on while others were not done; that is not part of its text.
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(loaded.info.tokenizer.decode(list(row[:end]), skip_special_tokens=True))
    return texts


def _chosen(
    loaded: Loaded,
    batch: Sequence[Prompt],
    ids: torch.Tensor,
    padding: torch.Tensor | None,
    injection: Injection | None,
) -> list[int]:
    """The choice of the highest likelihood; each has a pass of its own, since a cache is written to."""
    scores = torch.full((len(batch), max(len(prompt.choices) for prompt in batch)), -torch.inf, dtype=torch.float64)
    for at in range(scores.shape[1]):
        ends = [prompt.choices[at] if at < len(prompt.choices) else [] for prompt in batch]
        longest = max(len(end) for end in ends)
        # Padded at the right: attention is causal, so what is scored never sees it.
        wanted = torch.tensor([end + [0] * (longest - len(end)) for end in ends], device=ids.device)
        rest = torch.tensor([prompt.rest for prompt in batch], dtype=torch.long, device=ids.device)
        told = torch.cat([rest, wanted[:, :-1]], dim=1)
        with nullcontext() if injection is None else inject(loaded.stream, injection, whole=False):
            talk = _Conversation(loaded, ids, padding)
            logits = torch.cat([talk.logits, talk.hear(told)], dim=1) if told.shape[1] else talk.logits
        said = torch.log_softmax(logits[:, rest.shape[1] :].float(), dim=-1)
        table = said.gather(2, wanted[:, :, None])[:, :, 0].double().cpu()
        for row, end in enumerate(ends):
            if end:
                scores[row, at] = table[row, : len(end)].sum()
    best: list[int] = scores.argmax(dim=1).tolist()
    return best
