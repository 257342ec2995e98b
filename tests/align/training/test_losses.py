"""Losses against torch.nn.functional and against what they are at chance."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from align.training.losses import combined, cosine, infonce, infonce_chance, mse
from align.training.plan import LOSSES as NAMES
from align.training.plan import parse_loss
from featstore.errors import SpecError


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 32, 8, generator=generator).unbind()


def test_mse_and_cosine(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    y_hat, y = batch
    torch.testing.assert_close(mse(y_hat, y), ((y_hat - y) ** 2).mean())
    torch.testing.assert_close(mse(y_hat, y, unit=4.0), ((y_hat - y) ** 2).mean() / 4)
    expected = functional.cosine_embedding_loss(y_hat, y, torch.ones(32))
    torch.testing.assert_close(cosine(y_hat, y), expected)
    assert cosine(-2 * y, y).item() == pytest.approx(2, abs=1e-6)


def test_bfloat16_is_summed_in_float32(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    y_hat, y = (t.bfloat16() for t in batch)
    for loss in (mse(y_hat, y), cosine(y_hat, y), infonce(y_hat, y)[0]):
        assert loss.dtype == torch.float32
    torch.testing.assert_close(mse(y_hat, y), mse(y_hat.float(), y.float()))


def test_infonce_is_cross_entropy_both_ways(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    y_hat, y = batch
    similarity = torch.stack([functional.cosine_similarity(row[None], y) for row in y_hat]) / 0.2
    right = similarity.diagonal()
    rows = (similarity.logsumexp(1) - right).mean()
    columns = (similarity.logsumexp(0) - right).mean()
    assert abs(rows - columns) > 1e-3, "the case should tell the directions apart"
    loss, top1 = infonce(y_hat, y, temperature=0.2)
    torch.testing.assert_close(loss, (rows + columns) / 2)
    nearest = (similarity.argmax(1) == torch.arange(32)).float().mean()
    nearest_back = (similarity.argmax(0) == torch.arange(32)).float().mean()
    torch.testing.assert_close(top1, (nearest + nearest_back) / 2)


def test_a_constant_prediction_sits_at_ln_b(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, y = batch
    loss, _ = infonce(torch.ones(20, 8), torch.ones(20, 8))
    assert loss.item() == pytest.approx(infonce_chance(20))
    assert infonce_chance(20) == pytest.approx(2.9957, abs=1e-4)
    # At a high temperature everything is near chance; independent rows do not get below it.
    independent, _ = infonce(torch.ones(32, 8), y, temperature=100.0)
    assert independent.item() == pytest.approx(math.log(32), abs=1e-3)


def test_infonce_of_the_right_answer(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, y = batch
    loss, top1 = infonce(3 * y, y, temperature=0.01)
    assert loss.item() < 1e-3
    assert top1.item() == 1.0
    shuffled, wrong = infonce(y.roll(1, 0), y, temperature=0.01)
    assert shuffled.item() > math.log(32)
    assert wrong.item() == 0.0


def test_infonce_gradient(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    y_hat = batch[0].clone().requires_grad_()
    loss, top1 = infonce(y_hat, batch[1])
    assert not top1.requires_grad
    loss.backward()
    assert y_hat.grad is not None
    step, _ = infonce(y_hat.detach() - 0.01 * y_hat.grad, batch[1])
    assert step < loss.detach()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature(temperature: float) -> None:
    with pytest.raises(SpecError, match="temperature must be positive"):
        infonce(torch.ones(2, 2), torch.ones(2, 2), temperature=temperature)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mse=1,cosine=0,infonce=0", (1.0, 0.0, 0.0)),
        ("mse=1", (1.0, 0.0, 0.0)),
        (" infonce = 0.5 , mse = 2e-1 ", (0.2, 0.0, 0.5)),
    ],
)
def test_parse(text: str, expected: tuple[float, ...]) -> None:
    weights = parse_loss(text)
    assert tuple(weights) == NAMES
    assert tuple(weights.values()) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l1=1", "'l1=1'.*mse, cosine, infonce"),
        ("mse", "'mse'.*NAME=WEIGHT"),
        ("mse=1,", "''.*NAME=WEIGHT"),
        ("", "NAME=WEIGHT"),
        ("mse=1,mse=2", "mse twice"),
        ("mse=one", "'one' is not a number"),
        ("mse=-1,cosine=1", "not -1"),
        ("mse=nan", "finite"),
        ("mse=inf", "finite"),
        ("mse=0,cosine=0", "no component a positive weight"),
    ],
)
def test_parse_names_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_loss(text)


def test_combined(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    y_hat, y = batch[0].clone().requires_grad_(), batch[1]
    centre = y.mean(0)
    total, parts = combined(
        y_hat,
        y,
        parse_loss("mse=2,cosine=0.5,infonce=0.25"),
        centre=centre,
        temperature=0.3,
        unit=4.0,
    )
    contrast, top1 = infonce(y_hat - centre, y - centre, temperature=0.3)
    want = {
        "mse": mse(y_hat, y) / 4,
        "cosine": cosine(y_hat - centre, y - centre),
        "infonce": contrast,
        "infonce_top1": top1,
    }
    assert list(parts) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(parts[name], value.detach())
        assert not parts[name].requires_grad
    torch.testing.assert_close(total, 2 * want["mse"] + 0.5 * want["cosine"] + 0.25 * want["infonce"])
    assert total.requires_grad


def test_combined_leaves_out_what_weighs_nothing(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    total, parts = combined(*batch, parse_loss("cosine=1"))
    assert list(parts) == ["cosine"]
    torch.testing.assert_close(total, cosine(*batch))
    with pytest.raises(SpecError, match="positive weight"):
        combined(*batch, dict.fromkeys(NAMES, 0.0))
