"""Differentiable CKA against autograd through the n x n formula, finite differences, and what training does with it."""

from __future__ import annotations

import math

import pytest
import torch

from align.kernels import autograd
from align.kernels.autograd import batch_cka
from align.kernels.reference import median_bandwidth
from featstore.errors import FitError

CASES = [(kernel, estimator) for kernel in ("linear", "rbf") for estimator in ("debiased", "biased")]
SIGMAS = (2.0, 4.0)


def naive(x, y, kernel, estimator):
    """CKA from whole Gram matrices, for autograd to walk through."""
    n = len(x)

    def gram(rows, sigma):
        if kernel == "linear":
            return rows @ rows.T
        return torch.exp(-(rows[:, None] - rows[None]).square().sum(-1) / (2 * sigma**2))

    def hsic(k, m):
        eye = torch.eye(n, dtype=x.dtype)
        if estimator == "biased":
            return torch.trace(k @ (eye - 1 / n) @ m @ (eye - 1 / n)) / (n - 1) ** 2
        k, m = k * (1 - eye), m * (1 - eye)
        cross = k.sum(1) @ m.sum(1)
        return ((k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))

    k, m = gram(x, SIGMAS[0]), gram(y, SIGMAS[1])
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


def options(kernel, estimator):
    return {"kernel": kernel, "estimator": estimator} | ({"sigmas": SIGMAS} if kernel == "rbf" else {})


def batches(n=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64) + 2
    y = x @ torch.randn(5, 7, generator=generator, dtype=torch.float64)
    y = y + torch.randn(n, 7, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


@pytest.mark.parametrize(("kernel", "estimator"), CASES)
def test_value_and_gradient_are_those_of_the_formula(kernel, estimator, monkeypatch):
    monkeypatch.setattr(autograd, "_STRIP", 5)
    x, y = batches()
    value, expected = batch_cka(x, y, **options(kernel, estimator)), naive(x, y, kernel, estimator)
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    for mine, theirs in zip(torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True):
        assert (mine - theirs).abs().max() < 1e-10


@pytest.mark.parametrize(("kernel", "estimator"), CASES)
def test_finite_differences(kernel, estimator):
    assert torch.autograd.gradcheck(lambda x, y: batch_cka(x, y, **options(kernel, estimator)), batches(8))


@pytest.mark.parametrize(("kernel", "estimator"), CASES)
def test_one_side_alone_and_the_same_tensor_twice(kernel, estimator):
    x, y = batches()
    both = torch.autograd.grad(batch_cka(x, y, **options(kernel, estimator)), (x, y))
    for side, (a, b) in enumerate(((x, y.detach()), (x.detach(), y))):
        (alone,) = torch.autograd.grad(3 * batch_cka(a, b, **options(kernel, estimator)), (x, y)[side])
        assert torch.allclose(alone, 3 * both[side], rtol=1e-12, atol=1e-14)
    same = options(kernel, estimator) | ({"sigmas": (2.0, 2.0)} if kernel == "rbf" else {})
    value = batch_cka(x, x, **same)
    assert value.item() == pytest.approx(1, abs=1e-12)
    assert torch.autograd.grad(value, x)[0].abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_narrow_types(kernel, dtype):
    x, y = batches(64, dtype)
    value = batch_cka(x, y, **options(kernel, "debiased"))
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    expected = naive(*wide, kernel, "debiased")
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = torch.autograd.grad(value, (x, y))
    assert [g.dtype for g in gradients] == [dtype, dtype]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, wide), strict=True):
        assert (mine.double() - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_training_on_it_finds_a_map(kernel):
    """Independent random features learn to be similar to a target."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 6, generator=generator), torch.randn(80, 3, generator=generator)
    y = torch.cat([y[:, :1], x[:, :2] + 0.1 * y[:, 1:]], 1)
    weight = torch.randn(6, 3, generator=generator).requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=0.05)
    values = []
    for _ in range(80):
        optimiser.zero_grad()
        value = batch_cka(x @ weight, y, kernel=kernel)
        (1 - value).backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] > values[0] + 0.2


def test_bandwidths_default_to_the_median_distance():
    x, y = batches()
    given = batch_cka(x, y, kernel="rbf", sigmas=(median_bandwidth(x), median_bandwidth(y)))
    assert batch_cka(x, y, kernel="rbf").item() == given.item()


def test_undefined_and_refused():
    x, y = batches()
    assert math.isnan(batch_cka(torch.ones(8, 3, dtype=torch.float64), y[:8]).item())
    with pytest.raises(FitError, match="at least 4 rows, not 3"):
        batch_cka(x[:3], y[:3])
    with pytest.raises(FitError, match="11 rows and layer 0 has 12"):
        batch_cka(x, y[:11])
    with pytest.raises(FitError, match="no kernel 'poly'"):
        batch_cka(x, y, kernel="poly")
    with pytest.raises(FitError, match="no estimator 'unbiased'"):
        batch_cka(x, y, estimator="unbiased")
    with pytest.raises(FitError, match="for the rbf kernel"):
        batch_cka(x, y, sigmas=SIGMAS)
    for sigmas in ((1.0, 0.0), (1.0,), (math.nan, 1.0)):
        with pytest.raises(FitError, match="give two above 0"):
            batch_cka(x, y, kernel="rbf", sigmas=sigmas)
    with pytest.raises(FitError, match="int64"):
        batch_cka(x, torch.ones(12, 2, dtype=torch.int64))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kernel", "estimator"), CASES)
def test_the_same_on_a_gpu(kernel, estimator):
    x, y = batches()
    a, b = (t.detach().cuda().requires_grad_() for t in (x, y))
    value, expected = (batch_cka(*sides, **options(kernel, estimator)) for sides in ((a, b), (x, y)))
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    for mine, theirs in zip(torch.autograd.grad(value, (a, b)), torch.autograd.grad(expected, (x, y)), strict=True):
        assert (mine.cpu() - theirs).abs().max() < 1e-10
