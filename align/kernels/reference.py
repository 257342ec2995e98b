"""HSIC and CKA straight from n x n Gram matrices in float64: what every faster form must reproduce.

Bandwidth of the RBF kernel, once for the whole package: k(x, y) = exp(-|x - y|^2 / (2 sigma^2)) with
sigma^2 = fraction^2 * median of |x_i - x_j|^2 over the pairs i < j. So sigma is ``fraction`` times the median distance
between rows, as Kornblith et al. (2019, section 4) set it; the median is that of the squares, which for an even number
of pairs differs from the square of the median by nothing that matters.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from align.solvers.row_effects import Documents
from featstore.errors import FitError

Array = NDArray[np.float64]
Kernel = Literal["linear", "rbf"]
Estimator = Literal["debiased", "biased"]

#: Most rows from which a bandwidth is estimated: two million distances.
BANDWIDTH_ROWS = 2048


def check_names(kernel: str, estimator: str) -> None:
    """Refuse a kernel or an estimator that does not exist.

    Args:
        kernel: ``linear`` or ``rbf``.
        estimator: ``debiased`` or ``biased``.

    Raises:
        FitError: It is neither.
    """
    if kernel not in ("linear", "rbf"):
        raise FitError(f"no kernel {kernel!r}: linear or rbf")
    if estimator not in ("debiased", "biased"):
        raise FitError(f"no estimator {estimator!r}: debiased or biased")


def linear_gram(rows: Any) -> Array:
    """Inner products of the centred rows, float64 ``(n, n)``.

    Args:
        rows: ``(n, d)``. Both estimators are blind to a common shift of the rows; centring keeps rounding small.
    """
    x = np.asarray(rows, dtype=np.float64)
    x = x - x.mean(0)
    return np.asarray(x @ x.T)


def rbf_gram(rows: Any, sigma: float) -> Array:
    """exp(-|x_i - x_j|^2 / (2 sigma^2)), float64 ``(n, n)``.

    Args:
        rows: ``(n, d)``.
        sigma: Bandwidth, in units of the rows.
    """
    gram = linear_gram(rows)
    norms = np.diag(gram)
    distances = np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0.0)
    np.fill_diagonal(distances, 0.0)
    return np.asarray(np.exp(-distances / (2 * sigma * sigma)))


def hsic0(k: Array, m: Array) -> float:
    """Biased HSIC_0 = tr(K H L H) / (n-1)^2, H = I - 11'/n (Gretton et al. 2005, definition 2).

    Args:
        k: Gram matrix ``(n, n)`` of one side.
        m: That of the other.
    """
    n = len(k)
    centred = k - k.mean(0)[None, :] - k.mean(1)[:, None] + k.mean()
    return float(np.sum(centred * m)) / (n - 1) ** 2


def without_row_effects(k: Array, documents: Any) -> Array:
    """What is left of a kernel over pairs of rows of different documents: residuals of K_ij = a_i + a_j there.

    The normal equations themselves, dense, whatever their structure.

    Args:
        k: Gram matrix ``(n, n)``.
        documents: ``(n,)`` labels.

    Returns:
        float64 ``(n, n)``, 0 within documents.
    """
    labels = np.asarray(documents)
    between = labels[:, None] != labels[None, :]
    normal = np.diag(between.sum(1)).astype(np.float64) + between
    effects = np.linalg.lstsq(normal, np.where(between, k, 0.0).sum(1), rcond=None)[0]
    return np.asarray(np.where(between, k - effects[:, None] - effects[None, :], 0.0))


def hsic_of_residuals(a: Array, b: Array, documents: Documents) -> float:
    """HSIC over documents from :func:`without_row_effects` of two kernels: HSIC_1 where each row is its own document.

    Args:
        a: ``(n, n)`` of one side.
        b: That of the other.
        documents: How many rows each document has.

    Returns:
        The value; NaN where no pairs of rows are left.
    """
    return math.nan if documents.reason else float(np.sum(a * b)) / documents.freedom


def hsic1(k: Array, m: Array) -> float:
    """Unbiased HSIC_1 (Song et al. 2012, equation 5; used for CKA by Nguyen et al. 2021); NaN below 4 rows.

    [ tr(K~L~) + (1'K~1)(1'L~1) / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1 ] / (n(n-3)), K~ being K with a zero diagonal.

    Args:
        k: Gram matrix ``(n, n)`` of one side.
        m: That of the other.
    """
    n = len(k)
    if n < 4:
        return math.nan
    k, m = k.copy(), m.copy()
    np.fill_diagonal(k, 0.0)
    np.fill_diagonal(m, 0.0)
    sums_k, sums_m = k.sum(1), m.sum(1)
    total = np.sum(k * m) + sums_k.sum() * sums_m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums_k @ sums_m)
    return float(total / (n * (n - 3)))


def gram(rows: Any, kernel: Kernel, sigma: float | None = None) -> Array:
    """The Gram matrix of one set of rows, float64 ``(n, n)``.

    Args:
        rows: ``(n, d)``.
        kernel: ``linear`` or ``rbf``.
        sigma: Bandwidth of ``rbf``; :func:`median_bandwidth` when None.

    Raises:
        FitError: No such kernel, or the median distance is 0.
    """
    check_names(kernel, "debiased")
    if kernel == "linear":
        return linear_gram(rows)
    return rbf_gram(rows, median_bandwidth(rows) if sigma is None else sigma)


def hsic(k: Array, m: Array, estimator: Estimator = "debiased") -> float:
    """:func:`hsic1` or :func:`hsic0` by name.

    Args:
        k: Gram matrix ``(n, n)`` of one side.
        m: That of the other.
        estimator: ``debiased`` or ``biased``.

    Raises:
        FitError: No such estimator.
    """
    check_names("linear", estimator)
    return hsic1(k, m) if estimator == "debiased" else hsic0(k, m)


def cka(k: Array, m: Array, estimator: Estimator = "debiased") -> float:
    """CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) (Kornblith et al. 2019, equation 4).

    Args:
        k: Gram matrix ``(n, n)`` of one side.
        m: That of the other.
        estimator: ``debiased`` or ``biased``.

    Returns:
        The value, never clamped; NaN where a self-HSIC is not positive.

    Raises:
        FitError: No such estimator.
    """
    own = [hsic(k, k, estimator), hsic(m, m, estimator)]
    return hsic(k, m, estimator) / math.sqrt(own[0] * own[1]) if min(own) > 0 else math.nan


def evenly_spaced(n: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` of ``n`` positions, spread evenly, always the same ones.

    Args:
        n: Positions there are.
        most: Positions wanted.
    """
    count = min(n, most)
    return np.arange(count, dtype=np.int64) * n // max(count, 1)


def median_bandwidth(rows: Any, fraction: float = 1.0, *, most: int = BANDWIDTH_ROWS) -> float:
    """``fraction * sqrt(median of |x_i - x_j|^2 over i < j)`` from at most ``most`` evenly spaced rows.

    Distances are float64, on the rows' own device.

    Args:
        rows: ``(n, d)``, an array or a tensor.
        fraction: Of the median distance; above 0.
        most: Rows to look at.

    Raises:
        FitError: Fewer than two rows, a fraction that is not positive, values that are not finite, or a median
            distance of 0.
    """
    if not (math.isfinite(fraction) and fraction > 0):
        raise FitError(f"a bandwidth of {fraction} median distances: give a fraction above 0")
    if len(rows) < 2:
        raise FitError(f"a median distance needs at least 2 rows, not {len(rows)}; give more rows")
    chosen = evenly_spaced(len(rows), most)
    x = rows[torch.from_numpy(chosen).to(rows.device)] if isinstance(rows, torch.Tensor) else np.asarray(rows)[chosen]
    x = torch.as_tensor(x).detach().to(torch.float64)
    x = x - x.mean(0)
    norms = x.square().sum(1)
    squares = (norms[:, None] + norms[None, :] - 2 * (x @ x.T)).clamp_(min=0)
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    ordered = squares[i, j].sort().values
    middle = len(ordered) // 2
    median = float(ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2)
    if not math.isfinite(median):
        raise FitError("rows for a bandwidth are not all finite; leave those out that are not")
    # Distances of equal rows come out of the subtraction as rounding, not as 0.
    if median <= 1e-14 * float(norms.max()):
        raise FitError("the median distance between rows is 0, so it gives no bandwidth; give one as sigma")
    return fraction * math.sqrt(median)
