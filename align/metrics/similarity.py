"""Linear CKA from rows, debiased over documents; and from moments, which know no documents: HSIC_1 and HSIC_0.

The estimators by name: ``debiased`` leaves out all pairs of rows within a document, ``debiased-rows`` pairs of a row
with itself alone (the unbiased HSIC_1 of Song et al. 2012), ``biased`` none (HSIC_0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from align.moments.scatter import Array, Moments, Rows, means, moments_of, moved, paired_with_itself
from align.solvers.row_effects import Documents, alone, in_order
from featstore.errors import FitError

#: A self-HSIC this small against the terms it is the difference of is rounding.
_ROUNDING = 1e-12

#: Up to so many rows in memory are compared in float64 throughout, which takes next to no time. HSIC_1 subtracts what
#: a row has in common with itself. Where one row is a hundred times as long as the others, the difference of float32
#: products is off by 1e-4 in CKA, by how much depends on the order in which the kernels of a BLAS add up. The more rows
#: there are, the less one of them weighs, and the longer float64 takes.
FEW_ROWS = 1024
#: Rows this many times as long as the median are multiplied in float64 even then.
LONG_ROW = 8.0
#: Where more than this share of rows is that long, all are: a median of them says little.
_LONG_SHARE = 1 / 8
#: Where the median row is no longer than that, squares are near the smallest float32.
_SMALLEST = 1e-15
#: Rows of one product, which is added up in float64.
_PRODUCT_ROWS = 4096
#: Features whose sums by document are held at a time.
_FEATURES = 256
_NAMES = ("first", "second")


def _centred(m: Moments) -> Moments:
    return moved(m, *means(m))


def _hsic1_centred(m: Moments) -> tuple[float, float]:
    """HSIC_1 of moments about the mean, and the size of the terms it is the difference of."""
    n = m.n
    fro, diagonal = float(np.sum(m.c * m.c)), n / (n - 2) * m.d
    product = m.a * m.b / ((n - 1) * (n - 2))
    return (fro - diagonal + product) / (n * (n - 3)), (fro + diagonal + product) / (n * (n - 3))


def hsic1_linear(m: Moments) -> float:
    """Unbiased HSIC_1 (Song et al. 2012) with linear kernels, from moments about any origin.

    [ |C|_F^2 - n/(n-2) D + AB/((n-1)(n-2)) ] / (n(n-3)) about the mean. May be negative. NaN below
    4 rows.

    Args:
        m: Moments of the pairs; ``paired_with_itself(m, "x")`` for a self term.
    """
    return _hsic1_centred(_centred(m))[0] if m.n >= 4 else math.nan


def hsic0_linear(m: Moments) -> float:
    """Biased HSIC_0 = |Xc'Yc|_F^2 / (n-1)^2 with linear kernels; NaN below 2 rows.

    Args:
        m: Moments of the pairs about any origin.
    """
    return float(np.sum(_centred(m).c ** 2)) / (m.n - 1) ** 2 if m.n >= 2 else math.nan


def _constant_side(m: Moments) -> str | None:
    """Name the side whose rows are equal to the float32 rounding of their mean."""
    return _constant("first", m.a, m.n, m.origin_x) or _constant("second", m.b, m.n, m.origin_y)


def _constant(name: str, spread: float, n: int, mean: Array) -> str | None:
    eps = float(np.finfo(np.float32).eps)
    return f"the {name} set of states does not vary" if spread <= n * eps * eps * float(mean @ mean) else None


def debiased_cka_from_moments(m: Moments) -> tuple[float, str | None]:
    """CKA with unbiased HSIC_1 and linear kernels; 0 on average for independent rows of any width.

    Never clamped: it may be negative. HSIC_1 is a product of U-centred kernels, so it lies within [-1, 1] to rounding.

    Args:
        m: Moments of the pairs about any origin.

    Returns:
        ``(value, None)``, or ``(nan, reason)`` below 4 rows or where a side has no similarity
        structure (self-HSIC zero or below, to rounding).
    """
    if m.n < 4:
        return math.nan, f"debiased CKA needs at least 4 rows, not {m.n}"
    m = _centred(m)
    if reason := _constant_side(m):
        return math.nan, reason
    selves = []
    for name, side in (("first", "x"), ("second", "y")):
        value, size = _hsic1_centred(paired_with_itself(m, side))
        # A self-HSIC is never negative in exact arithmetic; at this size only rounding is left.
        if not value > _ROUNDING * size:
            return math.nan, f"self-HSIC of the {name} set of states is not positive"
        selves.append(value)
    return _hsic1_centred(m)[0] / math.sqrt(selves[0] * selves[1]), None


def biased_cka_from_moments(m: Moments) -> tuple[float, str | None]:
    """CKA with the biased HSIC_0 and linear kernels: near 1 for *any* data when n is below d.

    Args:
        m: Moments of the pairs about any origin.

    Returns:
        ``(value, None)``, or ``(nan, reason)`` below 2 rows or where a side does not vary.
    """
    if m.n < 2:
        return math.nan, f"CKA needs at least 2 rows, not {m.n}"
    m = _centred(m)
    if reason := _constant_side(m):
        return math.nan, reason
    norms = float(np.linalg.norm(m.gx)) * float(np.linalg.norm(m.gy))
    return float(np.sum(m.c * m.c)) / norms, None


def _check_finite(*sides: Rows) -> None:
    if not all(np.isfinite(rows).all() for rows in sides):
        raise FitError(
            "a true or predicted state is not finite; look for damaged rows with `featstore verify`, or for a map that "
            "diverged"
        )


def _moments_near_mean(x: Rows, y: Rows) -> Moments:
    _check_finite(x, y)
    if len(x) <= FEW_ROWS:
        x, y = (np.asarray(rows, dtype=np.float64) for rows in (x, y))
    return moments_of(x, y, *(np.mean(r, axis=0, dtype=np.float64) for r in (x, y)))


def debiased_cka(
    x: Rows, y: Rows, documents: ArrayLike | None = None, *, correct_features: bool = False
) -> tuple[float, str | None]:
    """Debiased CKA with linear kernels over pairs of rows of different documents.

    The cosine of what is left of the two kernels without their row effects, over the pairs of rows of different
    documents (:mod:`align.solvers.row_effects`). 0 on average for states that have nothing in common but the documents
    they were read from, whatever their width and however few these are. Without documents every row is its own: CKA
    with the unbiased HSIC_1 of Song et al. (2012), equation 5. Rows of one document then count as independent, and with
    few of them raise the figure of unrelated states. Never clamped: it may be negative.

    Few rows (:data:`FEW_ROWS`), and fewer rows than dimensions, are compared by their Gram matrices; more by
    cross-products of their dimensions. Of more than few, float32 rows are multiplied in float32 and summed in float64.

    Args:
        x: (n, dx).
        y: (n, dy), the i-th row paired with the i-th of ``x``.
        documents: (n,) labels, which document each pair is of; rows of one need not follow each other. None for a
            document each.
        correct_features: Take the dimensions of each side for a sample of a larger population of features, drawn apart
            for x and for y, and estimate the CKA of the populations (Chun et al. 2025, arXiv 2502.15104): in the self
            terms a feature is never multiplied with itself. This is for a few recorded of many units. The dimensions
            of a state are all that there are; of them the figure as it is is the right one, and the correction answers
            another question. The two sides must not share features: of x with itself it is above 1.

    Returns:
        ``(value, None)``, or ``(nan, reason)`` below 4 rows, where no two rows are of different documents, or where a
        side has no similarity structure (self-HSIC zero or below, to rounding).

    Raises:
        FitError: Shapes do not fit or a row is not finite.
    """
    return debiased_ckas(x, y, [documents], correct_features=correct_features)[0]


@dataclass(eq=False)
class FirstSide:
    """What the first of two sets of rows alone adds to CKA: computed with the first of several second sets.

    Attributes:
        rows: The rows about their mean, or None before.
        reason: Why they cannot be compared, or None.
        gram: Products of rows among themselves, where these are fewer than dimensions.
        square: Of the products of dimensions among themselves, the sum of squares, where rows are more.
    """

    rows: Rows | None = None
    reason: str | None = None
    gram: Rows | None = None
    square: float | None = None


def debiased_ckas(
    x: Rows,
    y: Rows,
    groupings: Sequence[ArrayLike | None],
    *,
    correct_features: bool = False,
    first: FirstSide | None = None,
    overwrite: bool = False,
) -> list[tuple[float, str | None]]:
    """:func:`debiased_cka` of the same rows for several notions of a document, whose products are made once.

    Args:
        x: (n, dx).
        y: (n, dy).
        groupings: Labels (n,) each, or None for every row its own document.
        correct_features: As for :func:`debiased_cka`.
        first: Of these very ``x``, where they were compared with rows of as many dimensions before; filled where it is
            empty.
        overwrite: Whether float32 rows may be replaced by those about their mean.

    Raises:
        FitError: Shapes do not fit or a row is not finite.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise FitError(
            f"paired rows need shapes (n, dx) and (n, dy), not {x.shape} and {y.shape}"
            "; give a row of each side for every pair"
        )
    ordered = [(None, alone(len(x))) if labels is None else in_order(labels) for labels in groupings]
    for _, documents in ordered:
        if documents.n != len(x):
            raise FitError(f"{documents.n} document labels for {len(x)} rows: give one for each row")
    if len(x) < 2 or all(documents.reason for _, documents in ordered):
        return [(math.nan, documents.reason or "no rows") for _, documents in ordered]
    wide = len(x) <= FEW_ROWS
    few = wide or len(x) <= min(x.shape[1], y.shape[1])
    first = FirstSide() if first is None else first
    # What the Gram matrices are made of is as large as they are, and not needed beside them.
    rows_stay = correct_features or not few
    if first.rows is None and (first.gram is None or rows_stay):
        first.rows, first.reason = _prepared("first", x, wide=wide, overwrite=overwrite)
    second, why_not = _prepared("second", y, wide=wide, overwrite=overwrite)
    reason = first.reason or why_not
    sides = [first.rows, second] if rows_stay and first.rows is not None else []
    grams: list[Rows] = []
    squares = np.zeros((2, 2))
    if reason is None and few:
        if first.gram is None and first.rows is not None:
            first.gram = _gram(first.rows)
        if not rows_stay:
            first.rows = None
        grams = [gram for gram in (first.gram, _gram(second)) if gram is not None]
        del second
    elif reason is None:
        squares = _squares(sides, first.square)
        first.square = float(squares[0, 0])
    found: list[tuple[float, str | None]] = []
    for order, documents in ordered:
        if why := documents.reason or reason:
            found.append((math.nan, why))
            continue
        # Rows of a store come document by document, and need no copy in another order.
        if order is not None and bool((order[1:] > order[:-1]).all()):
            order = None
        rows_in_order = sides if order is None else [rows[order] for rows in sides]
        if few:
            hsic, size = _hsic_of_grams([k if order is None else k[np.ix_(order, order)] for k in grams], documents)
        else:
            hsic, size = _hsic_of_features(rows_in_order, squares, documents)
        found.append(_cosine(hsic, size, rows_in_order if correct_features else None, documents))
    return found


def _prepared(name: str, rows: Rows, *, wide: bool, overwrite: bool) -> tuple[Rows, str | None]:
    """Rows about their mean, and why they cannot be compared."""
    _check_finite(rows)
    mean: Array = np.mean(rows, axis=0, dtype=np.float64)
    away = _about(rows, mean, wide=wide, overwrite=overwrite)
    return away, _constant(name, float(np.einsum("ij,ij->", away, away, dtype=np.float64)), len(rows), mean)


def _about(rows: Rows, mean: Array, *, wide: bool, overwrite: bool = False) -> Rows:
    """Rows about their mean: in float64, or else rounded to float32 after the subtraction."""
    if wide or rows.dtype == np.float64 or rows.dtype.kind in "iu":
        return np.subtract(rows, mean, dtype=np.float64)
    found = rows if overwrite and rows.dtype == np.float32 else np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), FEW_ROWS):
        part = slice(start, start + FEW_ROWS)
        found[part] = np.subtract(rows[part], mean, dtype=np.float64)
    return found


def _gram(rows: Rows) -> Array:
    """float64 products of rows among themselves: of float32 rows float32 products, but for those of long rows.

    What is summed of the products are differences between rows, and one row that is much longer than the others would
    leave its rounding in all of them.
    """
    # One array on both sides: numpy then computes one triangle only.
    products = rows @ rows.T
    if products.dtype == np.float64:
        return products
    gram: Array = products.astype(np.float64)
    del products
    length = np.sqrt(gram.diagonal())
    usual = float(np.median(length))
    long = np.flatnonzero(length > LONG_ROW * usual)
    # Squares that float32 cannot hold, and rows of which none is the usual one.
    if not _SMALLEST < usual < math.inf or len(long) > _LONG_SHARE * len(rows):
        exact = rows.astype(np.float64)
        return exact @ exact.T
    if len(long):
        own = rows[long].astype(np.float64)
        for start in range(0, len(rows), FEW_ROWS):
            part = slice(start, start + FEW_ROWS)
            gram[long, part] = own @ rows[part].astype(np.float64).T
        gram[:, long] = gram[long].T
    return gram


def _hsic_of_grams(grams: Sequence[Array], documents: Documents) -> tuple[Array, Array]:
    """Sums of products of two kernels without row effects, float64 (2, 2), and the size of their terms, (2,)."""
    with ExitStack() as without:
        for gram in grams:
            without.enter_context(_across(gram, documents))
        sums = np.stack([k.sum(axis=0) for k in grams])
        products = np.array([[float(np.vdot(k, m)) for m in grams] for k in grams])
    starts = np.cumsum(documents.sizes) - documents.sizes
    by_document = np.add.reduceat(sums, starts, axis=1)
    weighted = (sums * np.repeat(documents.weights, documents.sizes)) @ sums.T
    shared = documents.shared(weighted, by_document, by_document)
    return products - 2 * shared, np.diag(products + 2 * np.abs(shared))


@contextmanager
def _across(gram: Array, documents: Documents) -> Iterator[None]:
    """A kernel with zeros within documents, which are put back: a copy of it would take longer than what is asked."""
    ends = np.cumsum(documents.sizes).tolist()
    if len(ends) == documents.n:
        diagonal = gram.diagonal().copy()
        np.fill_diagonal(gram, 0.0)
        try:
            yield
        finally:
            np.fill_diagonal(gram, diagonal)
        return
    places = [slice(end - size, end) for end, size in zip(ends, documents.sizes.tolist(), strict=True)]
    within = [gram[place, place].copy() for place in places]
    for place in places:
        gram[place, place] = 0.0
    try:
        yield
    finally:
        # Others are compared with the first of the two afterwards.
        for place, block in zip(places, within, strict=True):
            gram[place, place] = block


def _squares(sides: Sequence[Rows], known: float | None = None) -> Array:
    """|X'Y|_F^2 of every two sides, float64 (2, 2); that of the first with itself may be known."""
    found = np.zeros((2, 2))
    for i, j in ((0, 0), (0, 1), (1, 1)):
        if known is not None and i == j == 0:
            found[0, 0] = known
            continue
        x, y = sides[i], sides[j]
        c = np.zeros((x.shape[1], y.shape[1]))
        for start in range(0, len(x), _PRODUCT_ROWS):
            part = slice(start, start + _PRODUCT_ROWS)
            c += x[part].T @ y[part]
        found[i, j] = found[j, i] = np.vdot(c, c)
    return found


def _hsic_of_features(sides: Sequence[Rows], squares: Array, documents: Documents) -> tuple[Array, Array]:
    """The same as :func:`_hsic_of_grams` of centred rows, of which the pairs within documents are taken off.

    With C_d = X_d'Y_d and s_d, t_d the sums over the rows of a document, the rows of all summing to zero,

        P = |X'Y|_F^2 - sum_d |C_d|_F^2,   r_i = -x_i . s_d,   R_d = -|s_d|^2,   sum_{i in d} r_i q_i = s_d' C_d t_d.
    """
    own, weighted = np.zeros((2, 2)), np.zeros((2, 2))
    sums = np.zeros((2, len(documents.sizes)))
    if len(documents.sizes) == documents.n:
        sums = np.stack([np.einsum("ij,ij->i", rows, rows, dtype=np.float64) for rows in sides])
        own, weighted = sums @ sums.T, documents.weights[0] * (sums @ sums.T)
    else:
        ends = np.cumsum(documents.sizes).tolist()
        for d, (end, size) in enumerate(zip(ends, documents.sizes.tolist(), strict=True)):
            parts = [rows[end - size : end] for rows in sides]
            square, rows_of = _within(parts)
            own += square
            weighted += documents.weights[d] * (rows_of @ rows_of.T)
            sums[:, d] = rows_of.sum(axis=1)
    shared = documents.shared(weighted, -sums, -sums)
    return squares - own - 2 * shared, np.diag(squares + own + 2 * np.abs(shared))


def _within(parts: Sequence[Rows]) -> tuple[Array, Array]:
    """|X_d'Y_d|_F^2 of every two sides, (2, 2), and x_i . s_d of every row, (2, n_d); by the cheaper of two ways."""
    size, widths = len(parts[0]), [rows.shape[1] for rows in parts]
    sums = [rows.sum(axis=0, dtype=np.float64) for rows in parts]
    of_rows = np.stack([rows @ total for rows, total in zip(parts, sums, strict=True)])
    if size <= max(min(widths), 16):
        grams = np.stack([(rows @ rows.T).ravel() for rows in parts]).astype(np.float64)
        return grams @ grams.T, of_rows
    return _squares(parts), of_rows


def _cosine(hsic: Array, size: Array, rows: Sequence[Rows] | None, documents: Documents) -> tuple[float, str | None]:
    """CKA of the sums of products; with rows, its self terms over pairs of different features."""
    own = np.diag(hsic).copy()
    of = "self-HSIC"
    if rows is not None:
        of = "self-HSIC over pairs of different features"
        for side, z in enumerate(rows):
            width = z.shape[1]
            if width < 2:
                return math.nan, f"of the {_NAMES[side]} set of states {width} feature is known: too few to correct for"
            own[side] = (own[side] - hsic_of_features_alone(z, documents)) * width / (width - 1)
    return cka_of_sums(float(hsic[0, 1]), own, size, of)


def cka_of_sums(
    cross: float, own: Sequence[float] | Array, size: Sequence[float] | Array, of: str = "self-HSIC"
) -> tuple[float, str | None]:
    """CKA from what two kernels without row effects have in common with each other and with themselves.

    Args:
        cross: Sum of their products.
        own: The two sums of squares.
        size: The sizes of the terms that these are the difference of.
        of: What to call the sums of squares.

    Returns:
        ``(value, None)``, or ``(nan, reason)`` where a sum of squares is rounding alone.
    """
    for name, value, terms in zip(_NAMES, own, size, strict=True):
        # A self-HSIC is never negative in exact arithmetic; at this size only rounding is left.
        if not value > _ROUNDING * terms:
            return math.nan, f"{of} of the {name} set of states is not positive"
    return cross / math.sqrt(own[0] * own[1]), None


def hsic_of_features_alone(rows: Rows, documents: Documents) -> float:
    """The part of a linear kernel's self-HSIC in which a feature meets itself: ``sum_a <A_a, A_a>``.

    A_a is what is left without row effects of the kernel ``x_ia x_ja`` of feature a alone.

    Args:
        rows: (n, d) about their mean, in the order of their documents.
        documents: What these are.
    """
    starts = np.cumsum(documents.sizes) - documents.sizes
    total = 0.0
    for first in range(0, rows.shape[1], _FEATURES):
        z = rows[:, first : first + _FEATURES].astype(np.float64)
        sums = np.add.reduceat(z, starts, axis=0)
        squares = np.add.reduceat(np.square(z, out=z), starts, axis=0)
        r = -(sums**2).T
        shared = np.einsum("da,da,d->", sums**2, squares, documents.weights)
        shared -= np.einsum("ad,ad,d->", documents.others(r), r, documents.weights)
        total += float(np.sum(squares.sum(axis=0) ** 2) - np.sum(squares**2) - 2 * shared)
    return total


def biased_cka(x: Rows, y: Rows) -> tuple[float, str | None]:
    """:func:`biased_cka_from_moments` of rows in memory.

    Args:
        x: (n, dx).
        y: (n, dy), the i-th row paired with the i-th of ``x``.

    Raises:
        FitError: Shapes do not fit or a row is not finite.
    """
    if len(x) < 2:
        return math.nan, f"CKA needs at least 2 rows, not {len(x)}"
    return biased_cka_from_moments(_moments_near_mean(x, y))
