"""Fitting the small model's weights on few processor minutes: counts first, then short windows, long ones last.

Most of what so small a model can learn in minutes is which token follows which. That is learnt from the table of all
neighbours at once: embedding and head alone, while the blocks write nothing, are a bigram of rank d, and one step on
the table costs a third of a step on one batch of text. Then the blocks learn from text what the last token does not
tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from featstore.demo.training.optimiser import optimisers
from featstore.demo.training.tokens import batches

#: Called after every step with its number from 1 and its loss in nats per token.
Tick = Callable[[int, float], object]


@dataclass(frozen=True)
class Shape:
    """Size of the model.

    Attributes:
        pieces: Vocabulary.
        width: d, of the residual stream.
        inner: Width within a block's MLP.
        blocks: Their number.
        heads: Attention heads.
    """

    pieces: int = 4096
    width: int = 192
    inner: int = 512
    blocks: int = 4
    heads: int = 3


@dataclass(frozen=True)
class Stage:
    """Steps on windows of one length.

    Attributes:
        steps: Batches.
        windows: Windows in each.
        length: Tokens that a window predicts.
    """

    steps: int
    windows: int
    length: int


#: Short windows cost least; long ones teach the positions that a document of the demo has.
STAGES = (Stage(steps=160, windows=16, length=128), Stage(steps=40, windows=4, length=512))
_MATRICES, _OTHERS = 0.008, 0.0003
#: Steps on the table of neighbours, and their learning rate.
COUNT_STEPS, _COUNT_RATE = 80, 0.02
_WARM_UP = 0.05
_MAX_POSITIONS = 1024


def _silent(_step: int, _loss: float) -> None:
    """Say nothing."""


def fresh_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    """The model before training, in float32.

    Args:
        shape: Its size.
        seed: Fixes the weights; torch's global generator is left as it was.
    """
    config = LlamaConfig(
        vocab_size=shape.pieces,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def fit_counts(
    model: LlamaForCausalLM,
    table: NDArray[np.float32],
    totals: NDArray[np.int64],
    *,
    steps: int = COUNT_STEPS,
    tick: Tick = _silent,
) -> None:
    """Silence the blocks and fit embedding and head to a bigram, in place.

    Args:
        model: From :func:`fresh_model`.
        table: (pieces, pieces) float32, the probability of each token (column) after each token (row).
        totals: (pieces,) int64, how often each row counts.
        steps: Of AdamW on the whole table.
        tick: Called with the cross-entropy.
    """
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    wanted = torch.from_numpy(table)
    weights = torch.from_numpy(totals / totals.sum()).to(torch.float32)
    parameters = [model.model.embed_tokens.weight, model.lm_head.weight]
    optimiser = torch.optim.AdamW(parameters, lr=_COUNT_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, steps + 1):
        optimiser.param_groups[0]["lr"] = _COUNT_RATE * min(step / (_WARM_UP * steps), 1 - (step - 1) / steps)
        rows = model.lm_head(model.model.norm(model.model.embed_tokens.weight))
        # wanted is no parameter: its product with the logarithm is the cross-entropy of every row.
        loss = -(weights * (wanted * functional.log_softmax(rows, dim=1)).sum(1)).sum()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        tick(step, loss.item())


def fit(
    model: LlamaForCausalLM,
    documents: Sequence[Tensor],
    *,
    seed: int,
    stages: Sequence[Stage] = STAGES,
    tick: Tick = _silent,
) -> None:
    """Train the model in place; its thread count is the caller's.

    The learning rates rise over the first 5 % of the steps and fall to zero in a straight line from there.

    Args:
        model: From :func:`fresh_model`.
        documents: Tokens of each, (tokens,) int64.
        seed: Fixes the order of the documents.
        stages: What is trained on, one after the other.
        tick: Called with the mean loss of the batch.
    """
    optimisers_ = optimisers(model, matrices=_MATRICES, others=_OTHERS)
    groups = [(group, group["lr"]) for optimiser in optimisers_ for group in optimiser.param_groups]
    steps = sum(stage.steps for stage in stages)
    model.train()
    for step, batch in enumerate(_schedule(documents, stages, seed), start=1):
        share = min(step / (_WARM_UP * steps), (steps - step + 1) / ((1 - _WARM_UP) * steps), 1.0)
        for group, full in groups:
            group["lr"] = share * full
        loss = losses(model, batch).mean()
        loss.backward()
        for optimiser in optimisers_:
            optimiser.step()
            optimiser.zero_grad()
        tick(step, loss.item())
    model.eval()


def _schedule(documents: Sequence[Tensor], stages: Sequence[Stage], seed: int) -> Iterator[Tensor]:
    for place, stage in enumerate(stages):
        endless = batches(documents, windows=stage.windows, length=stage.length, seed=seed + place)
        yield from islice(endless, stage.steps)


def losses(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Loss of every token but the first of each row.

    Args:
        model: Any causal model.
        batch: (rows, tokens) int64.

    Returns:
        (rows, tokens - 1) float32, nats.
    """
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    targets = batch[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
