"""What a trained map is trained against, in torch.

Every loss takes predictions and targets of shape (B, d) and is computed in float32 whatever the
autocast type, since a mean over a million bfloat16 squares has two digits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import SpecError


def mse(y_hat: Tensor, y: Tensor, *, unit: float = 1.0) -> Tensor:
    """Mean squared error over all elements, divided by ``unit``.

    Args:
        y_hat: (B, d) predictions.
        y: (B, d) targets.
        unit: Mean squared error of predicting the train mean; then 1 means "no better than the
            mean" at every layer, and the other components keep their weight beside it.
    """
    return functional.mse_loss(y_hat.float(), y.float()) / unit


def cosine(y_hat: Tensor, y: Tensor) -> Tensor:
    """1 - cosine similarity, mean over rows: 0 is the same direction, 1 orthogonal, 2 opposite.

    Args:
        y_hat: (B, d) predictions. Subtract the train mean from both sides first, or their common
            mean decides.
        y: (B, d) targets.
    """
    return 1.0 - functional.cosine_similarity(y_hat.float(), y.float(), dim=-1).mean()


def infonce(y_hat: Tensor, y: Tensor, *, temperature: float = 0.07) -> tuple[Tensor, Tensor]:
    """Contrastive loss in both directions over the rows of one batch (van den Oord et al. 2018).

    Chance is ln B for a batch of B rows: a loss that sits there has learned nothing, however stable
    it looks. The gain ln B - loss is a lower bound on the mutual information in nats, so it can
    never exceed ln B. The candidates are the rows of this very batch: accumulating gradients over
    batches adds none.

    Args:
        y_hat: (B, d) predictions, centred on the train mean.
        y: (B, d) targets, centred on it too; the i-th is the right answer for the i-th prediction.
        temperature: Divides the cosine similarities.

    Returns:
        ``(loss, top1)``: nats, the mean of predictions-to-targets and targets-to-predictions, and
        the share of rows whose right partner is the nearest, over both directions, without
        gradient.

    Raises:
        SpecError: The temperature is not positive.
    """
    if not temperature > 0:
        raise SpecError(f"temperature must be positive, not {temperature}; give one such as 0.05")
    guess = functional.normalize(y_hat.float(), dim=-1)
    true = functional.normalize(y.float(), dim=-1)
    logits = guess @ true.T / temperature
    labels = torch.arange(len(logits), device=logits.device)
    loss = (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2
    with torch.no_grad():
        hits = (logits.argmax(dim=1) == labels).float() + (logits.argmax(dim=0) == labels).float()
        top1 = hits.mean() / 2
    return loss, top1


def infonce_chance(batch: int) -> float:
    """The InfoNCE loss of a map that has learned nothing: ln B, in nats.

    Args:
        batch: Rows in a batch.
    """
    return math.log(batch)


def combined(
    y_hat: Tensor,
    y: Tensor,
    weights: dict[str, float],
    *,
    centre: Tensor | None = None,
    temperature: float = 0.07,
    unit: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum that is minimised, and its components before weighting.

    Args:
        y_hat: (B, d) predictions.
        y: (B, d) targets.
        weights: From :func:`align.training.plan.parse_loss`. Components with weight 0 are not computed.
        centre: (d,) the target's train mean, subtracted from both sides for cosine and InfoNCE.
        temperature: For InfoNCE.
        unit: For MSE.

    Returns:
        ``(total, parts)``; parts are detached scalars by name, and ``infonce_top1`` beside
        ``infonce``.

    Raises:
        SpecError: No component has a positive weight, or the temperature is not positive.
    """
    terms: list[Tensor] = []
    parts: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        terms.append(weights[name] * value)
        parts[name] = value.detach()

    if weights.get("mse", 0) > 0:
        add("mse", mse(y_hat, y, unit=unit))
    direction_hat, direction = y_hat.float(), y.float()
    if centre is not None:
        direction_hat, direction = direction_hat - centre, direction - centre
    if weights.get("cosine", 0) > 0:
        add("cosine", cosine(direction_hat, direction))
    if weights.get("infonce", 0) > 0:
        loss, top1 = infonce(direction_hat, direction, temperature=temperature)
        add("infonce", loss)
        parts["infonce_top1"] = top1
    if not terms:
        raise SpecError(f"no component of the loss has a positive weight: {weights}; give one, such as mse=1")
    return torch.stack(terms).sum(), parts
