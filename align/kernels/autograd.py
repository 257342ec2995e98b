r"""CKA of two batches of rows as something to train on: value and gradient, each from products only.

With U the U-centred Gram matrix (Song et al. 2012; zero on the diagonal),

    U(L)_ij = L_ij + 1'L~1 / ((n-1)(n-2)) - (r_i + r_j) / (n-2)     (i != j),     r = L~1,

HSIC_1 = \sum_ij K~_ij U(L)_ij / (n(n-3)), so dHSIC_1/dK = U(L) / (n(n-3)) =: P(L). For HSIC_0 P(L) = H L H / (n-1)^2
on all entries. Hence for c = HSIC(K,L) / sqrt(HSIC(K,K) HSIC(L,L)):

    dc/dK = P(L) / sqrt(HSIC(K,K) HSIC(L,L)) - c P(K) / HSIC(K,K).

Linear kernel: with centred X, Y, C = X'Y, b_i = |y_i|^2, B = \sum b,

    2 P(L) X = 2 [Y C' - n/(n-2) b*X + B/((n-1)(n-2)) X] / (n(n-3)), centred over the rows

(for HSIC_0: 2 Y C' / (n-1)^2), and no n x n matrix appears. RBF: with W = dc/dK,
dc/dx_i = -2/sigma^2 \sum_j W_ij K_ij (x_i - x_j), in strips of rows whose kernel values are computed a second time.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from align.kernels.centre import check_layers
from align.kernels.reference import Estimator, Kernel, check_names, median_bandwidth
from featstore.errors import FitError

#: Rows of a Gram matrix that are held at once.
_STRIP = 1024


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Centred rows, float64 if they are so already and float32 otherwise."""
    kept = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(torch.float64) - x.mean(0, dtype=torch.float64)).to(kept)


def _norms(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float64).square().sum(1)


def _ratio(own: tuple[torch.Tensor, torch.Tensor], cross: torch.Tensor) -> torch.Tensor:
    """CKA from the three HSIC, NaN where a self-HSIC is not positive."""
    defined = (own[0] > 0) & (own[1] > 0)
    return torch.where(defined, cross / (own[0] * own[1]).sqrt(), math.nan)


def _linear_hsic(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    n = len(a)
    square = c.to(torch.float64).square().sum()
    if estimator == "biased":
        return square / (n - 1) ** 2
    return (square - n / (n - 2) * (a @ b) + a.sum() * b.sum() / ((n - 1) * (n - 2))) / (n * (n - 3))


def _linear_pull(
    x: torch.Tensor, y: torch.Tensor, c: torch.Tensor, b: torch.Tensor, estimator: Estimator
) -> torch.Tensor:
    """2 P(L) X of centred rows, c = X'Y, b the squared norms of ``y``; float64 (n, dx), not yet centred."""
    n = len(x)
    pull = (y @ c.T).to(torch.float64)
    if estimator == "biased":
        return 2 * pull / (n - 1) ** 2
    own = (b.sum() / ((n - 1) * (n - 2)) - n / (n - 2) * b)[:, None] * x
    return 2 * (pull + own) / (n * (n - 3))


class _LinearCka(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, estimator: Estimator) -> torch.Tensor:
        u, v = _wide(x), _wide(y)
        a, b = _norms(u), _norms(v)
        c = u.T @ v
        cross = _linear_hsic(c, a, b, estimator)
        own = (_linear_hsic(u.T @ u, a, a, estimator), _linear_hsic(v.T @ v, b, b, estimator))
        ctx.save_for_backward(x, y, c, cross, *own)
        ctx.estimator = estimator
        return _ratio(own, cross)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y, c, cross, *own = ctx.saved_tensors
        u, v = _wide(x), _wide(y)
        a, b = _norms(u), _norms(v)
        value, root = _ratio((own[0], own[1]), cross), (own[0] * own[1]).sqrt()
        found: list[torch.Tensor | None] = []
        sides = ((x, u, a, v, b, c, own[0]), (y, v, b, u, a, c.T, own[1]))
        for needed, (raw, mine, norms, other, other_norms, product, self_hsic) in zip(
            ctx.needs_input_grad[:2], sides, strict=True
        ):
            if not needed:
                found.append(None)
                continue
            pull = _linear_pull(mine, other, product, other_norms, ctx.estimator) / root
            pull -= value / self_hsic * _linear_pull(mine, mine, mine.T @ mine, norms, ctx.estimator)
            found.append(((pull - pull.mean(0)) * gradients[0]).to(raw.dtype))
        return (*found, None)


class _Strip(NamedTuple):
    """Rows ``start:stop`` of the Gram matrices; the diagonal is zero for the debiased estimator."""

    start: int
    stop: int
    k: torch.Tensor
    m: torch.Tensor


class _Grams:
    """RBF Gram matrices of two sides, in float64 strips computed anew whenever they are walked through."""

    def __init__(self, u: torch.Tensor, v: torch.Tensor, sigmas: tuple[float, float], estimator: Estimator) -> None:
        self.sides = ((u, _norms(u), sigmas[0]), (v, _norms(v), sigmas[1]))
        self.n, self.debiased = len(u), estimator == "debiased"

    def _strip(self, side: int, start: int, stop: int) -> torch.Tensor:
        rows, norms, sigma = self.sides[side]
        squares = (rows[start:stop] @ rows.T).to(torch.float64).mul_(-2) + norms[start:stop, None] + norms[None, :]
        k = squares.clamp_(min=0).mul_(-0.5 / sigma**2).exp_()
        # On the diagonal the distance is 0 and the kernel 1, whatever rounding says.
        k.diagonal(start).fill_(0.0 if self.debiased else 1.0)
        return k

    def __iter__(self) -> Any:
        for start in range(0, self.n, _STRIP):
            stop = min(start + _STRIP, self.n)
            yield _Strip(start, stop, self._strip(0, start, stop), self._strip(1, start, stop))

    def hsic(self) -> tuple[torch.Tensor, torch.Tensor]:
        """HSIC of (K, L), (K, K), (L, L), float64 (3,), and the row sums (2, n)."""
        n = self.n
        products = torch.zeros(3, dtype=torch.float64, device=self.sides[0][0].device)
        parts = []
        for strip in self:
            products += torch.stack(
                [(p * q).sum() for p, q in ((strip.k, strip.m), (strip.k, strip.k), (strip.m, strip.m))]
            )
            parts.append(torch.stack([strip.k.sum(1), strip.m.sum(1)]))
        rows = torch.cat(parts, dim=1)
        sums = rows.sum(1)
        cross = torch.stack([rows[i] @ rows[j] for i, j in ((0, 1), (0, 0), (1, 1))])
        totals = torch.stack([sums[i] * sums[j] for i, j in ((0, 1), (0, 0), (1, 1))])
        if self.debiased:
            return (products + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3)), rows
        return (products + totals / n**2 - 2 / n * cross) / (n - 1) ** 2, rows

    def pulled(self, k: torch.Tensor, rows: torch.Tensor, strip: _Strip) -> torch.Tensor:
        """P of one Gram matrix, rows of the strip."""
        n, total = self.n, rows.sum()
        both = rows[strip.start : strip.stop, None] + rows[None, :]
        if not self.debiased:
            return (k - both / n + total / n**2) / (n - 1) ** 2
        p = (k - both / (n - 2) + total / ((n - 1) * (n - 2))) / (n * (n - 3))
        p.diagonal(strip.start).zero_()
        return p


class _RbfCka(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, estimator: Estimator, sigmas: tuple[float, float]
    ) -> torch.Tensor:
        hsic, rows = _Grams(_wide(x), _wide(y), sigmas, estimator).hsic()
        ctx.save_for_backward(x, y, hsic, rows)
        ctx.estimator, ctx.sigmas = estimator, sigmas
        return _ratio((hsic[1], hsic[2]), hsic[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y, hsic, rows = ctx.saved_tensors
        u, v = _wide(x), _wide(y)
        grams = _Grams(u, v, ctx.sigmas, ctx.estimator)
        value, root = _ratio((hsic[1], hsic[2]), hsic[0]), (hsic[1] * hsic[2]).sqrt()
        needed = ctx.needs_input_grad[:2]
        pulls = [torch.zeros(side.shape, dtype=torch.float64, device=x.device) for side in (u, v)]
        for strip in grams:
            p = [grams.pulled(k, r, strip) for k, r in zip((strip.k, strip.m), rows, strict=True)]
            for side, (mine, k) in enumerate(((u, strip.k), (v, strip.m))):
                if not needed[side]:
                    continue
                weights = (p[1 - side] / root - value / hsic[1 + side] * p[side]) * k
                wide = mine.to(torch.float64)
                part = slice(strip.start, strip.stop)
                pulls[side][part] = weights.sum(1)[:, None] * wide[part] - weights @ wide
        found = [
            (-2 / sigma**2 * pull * gradients[0]).to(raw.dtype) if need else None
            for need, sigma, pull, raw in zip(needed, ctx.sigmas, pulls, (x, y), strict=True)
        ]
        return (*found, None, None)


def batch_cka(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    kernel: Kernel = "linear",
    estimator: Estimator = "debiased",
    sigmas: tuple[float, float] | None = None,
) -> torch.Tensor:
    """CKA of two batches of paired rows, differentiable once in both.

    Bandwidths are constants of the gradient. The debiased value of a small batch may be negative.

    Args:
        x: ``(n, dx)`` float64, float32, float16 or bfloat16, on the CPU or a GPU.
        y: ``(n, dy)``, on the same device.
        kernel: ``linear`` or ``rbf``.
        estimator: ``debiased`` (HSIC_1) or ``biased`` (HSIC_0).
        sigmas: Bandwidths of the two sides; their median distances when None.

    Returns:
        float64 scalar; NaN where a self-HSIC is not positive.

    Raises:
        FitError: Fewer than 4 rows, shapes, devices or types that do not fit, an unknown name, or bandwidths that
            are not positive or asked of the linear kernel.
    """
    check_names(kernel, estimator)
    check_layers([x, y])
    if kernel == "linear":
        if sigmas is not None:
            raise FitError("bandwidths are for the rbf kernel; leave sigmas out for the linear one")
        return torch.as_tensor(_LinearCka.apply(x, y, estimator))
    used = (median_bandwidth(x), median_bandwidth(y)) if sigmas is None else sigmas
    if len(used) != 2 or not all(math.isfinite(s) and s > 0 for s in used):
        raise FitError(f"bandwidths {used}: give two above 0")
    return torch.as_tensor(_RbfCka.apply(x, y, estimator, used))
