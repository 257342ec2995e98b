"""Every figure of a ``metrics.json`` block over a stream of blocks of rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.metrics.ranking import RETRIEVAL_KEYS, Gallery, gallery_of, rank_of_partners
from align.metrics.rows import ROW_KEYS, Figures, Reasons, ScoreAccumulator, TrueRows
from align.metrics.same_token import (
    NO_TOKENS,
    SAME_TOKEN_KEYS,
    TokenGalleries,
    galleries_of,
    retrieval_same_token,
    same_token_rows,
)
from align.metrics.similarity import FirstSide, debiased_ckas
from align.moments.scatter import Array, Rows
from featstore.errors import FitError

#: CKA over pairs of rows of different documents, and over all pairs of different rows.
CKA_KEYS = ("cka_debiased", "cka_debiased_rows")
#: Every key of a block, as align.results.Scores declares them.
KEYS = (
    *ROW_KEYS,
    *CKA_KEYS,
    *RETRIEVAL_KEYS,
    "retrieval_gallery",
    *SAME_TOKEN_KEYS,
    "retrieval_same_token_gallery",
    "retrieval_same_token_tokens",
    "n",
)


class _Kept:
    """Some rows of one side of a stream.

    Args:
        wanted: int64, their numbers, ascending.
    """

    def __init__(self, wanted: NDArray[np.int64]) -> None:
        self._wanted, self._seen, self._held = wanted, 0, 0
        self._rows: Rows | None = None

    def update(self, start: int, rows: Rows) -> None:
        """Keep what is wanted of the next rows; several scorers may bring the same true rows, and one is enough."""
        known = self._seen - start
        if known >= len(rows):
            return
        rows = rows[known:]
        low, high = np.searchsorted(self._wanted, [self._seen, self._seen + len(rows)])
        take, end = self._wanted[low:high] - self._seen, self._held + int(high - low)
        if self._rows is None:
            # As long as it will be: pieces would have to be copied together at the end.
            self._rows = np.empty((len(self._wanted), rows.shape[1]), rows.dtype)
        out = self._rows[self._held : end]
        if rows.dtype == out.dtype:
            # mode="clip" because "raise" gathers into a buffer of its own first.
            np.take(rows, take, axis=0, out=out, mode="clip")
        else:
            out[:] = rows[take]
        self._seen, self._held = self._seen + len(rows), end

    def rows(self, count: int | None = None) -> Rows:
        """Those that came so far, or the first of them."""
        return np.empty((0, 0)) if self._rows is None else self._rows[: self._held if count is None else count]


class _Sample:
    """Keeps some rows of a stream of true and predicted ones.

    Args:
        wanted: int64, their numbers, ascending.
        true: Keeps the true ones, perhaps for others as well.
    """

    def __init__(self, wanted: NDArray[np.int64], true: _Kept) -> None:
        self._wanted, self._true, self._guess = wanted, true, _Kept(wanted)
        self._documents: list[NDArray[Any]] = []

    def update(self, start: int, y: Rows, y_hat: Rows, documents: NDArray[Any] | None = None) -> None:
        self._true.update(start, y)
        self._guess.update(start, y_hat)
        if documents is not None:
            low, high = np.searchsorted(self._wanted, [start, start + len(y)])
            self._documents.append(documents[self._wanted[low:high] - start])

    def rows(self) -> tuple[Rows, Rows]:
        """True and predicted rows so far."""
        guess = self._guess.rows()
        # Another scorer may have brought more true rows.
        return self._true.rows(len(guess)), guess

    def documents(self) -> NDArray[Any] | None:
        return np.concatenate(self._documents) if self._documents else None


def _some(total: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A subset of the rows of a stream of known length."""
    chosen: NDArray[np.int64] = np.sort(rng.choice(total, size=min(size, total), replace=False))
    return chosen


class Truth:
    """What true rows alone give, computed for the first of several maps that are scored on the same rows.

    Attributes:
        mean: float64 ``(dy,)`` about which the maps are scored, or None before.
        gallery: Of retrieval, or None before.
        tokens: Of retrieval among rows of one token.
        cka: Their side of CKA.
    """

    def __init__(self) -> None:
        self.mean: Array | None = None
        self.gallery: Gallery | None = None
        self.tokens: TokenGalleries | None = None
        self.cka = FirstSide()
        self._kept: dict[str, _Kept] = {}

    def sample(self, name: str, wanted: NDArray[np.int64]) -> _Sample:
        """A sample whose true rows are kept once, whoever scores predictions of them.

        Args:
            name: Of the sample.
            wanted: int64, numbers of rows, ascending; of one name always the same.
        """
        return _Sample(wanted, self._kept.setdefault(name, _Kept(wanted)))

    def about(self, mean: Array) -> bool:
        """Whether it is that of rows scored about a mean; the first mean that is asked for is its own.

        Args:
            mean: float64 ``(dy,)``.
        """
        self.mean = mean if self.mean is None else self.mean
        return bool(np.array_equal(self.mean, mean))


class Scorer:
    """Every figure of a ``metrics.json`` block over a stream of blocks.

    Row figures use all rows; CKA and retrieval use two fixed random subsets, the same however the
    rows are cut into blocks and the same for every map scored with this seed.

    Args:
        mean_train_y: (dy,) mean target state over the train rows.
        total: How many rows will come.
        gallery: Rows of the retrieval gallery, at most.
        cka_rows: Rows for CKA, at most.
        seed: Chooses the subsets.
        tokens: Integers ``(total,)``, the source token of every row to come; None where nobody knows, and then there
            is no retrieval among rows of the same token.
        truth: Shared by scorers of the same rows about the same mean, with the same seed and counts.

    Raises:
        FitError: The mean is not a finite vector, a count is negative, or there are more or fewer tokens than rows.
    """

    def __init__(
        self,
        mean_train_y: ArrayLike,
        total: int,
        *,
        gallery: int = 512,
        cka_rows: int = 16_384,
        seed: int = 0,
        tokens: ArrayLike | None = None,
        truth: Truth | None = None,
    ) -> None:
        self._truth = Truth() if truth is None else truth
        if min(total, gallery, cka_rows) < 0:
            raise FitError(f"counts cannot be negative: {total}, {gallery}, {cka_rows}")
        self._rows = ScoreAccumulator(mean_train_y)
        self._total = total
        rng_gallery, rng_cka, rng_tokens = np.random.default_rng(seed).spawn(3)
        self._gallery = self._truth.sample("gallery", _some(total, gallery, rng_gallery))
        self._cka = self._truth.sample("cka", _some(total, cka_rows, rng_cka))
        self._samples = [self._gallery, self._cka]
        self._same: tuple[_Sample, NDArray[np.int64]] | None = None
        if tokens is not None:
            ids = np.asarray(tokens, dtype=np.int64)
            if len(ids) != total:
                raise FitError(f"{total} rows were announced with {len(ids)} tokens; give one a row")
            chosen = same_token_rows(ids, rng_tokens)
            self._same = self._truth.sample("same token", chosen), ids[chosen]
            self._samples.append(self._same[0])

    def update(self, y: Rows, y_hat: Rows, documents: ArrayLike | None = None, known: TrueRows | None = None) -> None:
        """Add the next rows, in order.

        Args:
            y: (m, dy) true target states.
            y_hat: (m, dy) predicted ones.
            documents: (m,) labels, which document each row is of: pairs of rows of one document are left out of
                ``cka_debiased``. None, always or never, for every row its own.
            known: :func:`align.metrics.rows.true_rows` of ``y`` if they are known already.

        Raises:
            FitError: Shapes do not fit, or more rows come than announced.
        """
        start = self._rows.n
        if start + len(y) > self._total:
            raise FitError(f"{start + len(y)} rows came, {self._total} were announced; announce as many as come")
        self._rows.update(y, y_hat, known)
        labels = None if documents is None else np.asarray(documents)
        if labels is not None and labels.shape != (len(y),):
            raise FitError(f"document labels of shape {labels.shape} for {len(y)} rows: give one for each row")
        for sample in self._samples:
            sample.update(start, np.asarray(y), np.asarray(y_hat), labels)

    def result(self) -> tuple[Figures, Reasons]:
        """The block with all of :data:`KEYS`, and a reason for each None."""
        found, reasons = self._rows.result(), self._rows.reasons()
        if self._rows.n == 0:
            found["retrieval_gallery"] = 0
            found |= {"retrieval_same_token_gallery": 0, "retrieval_same_token_tokens": 0}
            missing = (*CKA_KEYS, *RETRIEVAL_KEYS, *SAME_TOKEN_KEYS)
            reasons.update(dict.fromkeys(missing, "no rows"))
        else:
            true, guess = self._gallery.rows()
            if self._truth.gallery is None:
                self._truth.gallery = gallery_of(true, self._rows.mean)
            gallery, reason = rank_of_partners(true, guess, self._rows.mean, self._truth.gallery)
            found.update(gallery)
            if reason:
                reasons.update(dict.fromkeys(RETRIEVAL_KEYS, reason))
            same, reason = self._among_same_token()
            found.update(same)
            if reason:
                reasons.update(dict.fromkeys(SAME_TOKEN_KEYS, reason))
            try:
                values = debiased_ckas(
                    *self._cka.rows(), [self._cka.documents(), None], first=self._truth.cka, overwrite=True
                )
            except FitError as error:
                values = [(math.nan, str(error))] * len(CKA_KEYS)
            for key, (value, reason) in zip(CKA_KEYS, values, strict=True):
                if reason:
                    reasons[key] = reason
                else:
                    found[key] = value
        return {key: found.get(key) for key in KEYS}, reasons

    def _among_same_token(self) -> tuple[Figures, str | None]:
        if self._same is None:
            return {"retrieval_same_token_gallery": 0, "retrieval_same_token_tokens": 0}, NO_TOKENS
        sample, tokens = self._same
        true, guess = sample.rows()
        if self._truth.tokens is None:
            self._truth.tokens = galleries_of(true, tokens)
        return retrieval_same_token(true, guess, tokens, self._truth.tokens)


def score(
    y: Rows,
    y_hat: Rows,
    mean_train_y: ArrayLike,
    *,
    gallery: int = 512,
    cka_rows: int = 16_384,
    seed: int = 0,
    documents: ArrayLike | None = None,
    tokens: ArrayLike | None = None,
) -> tuple[Figures, Reasons]:
    """Every figure of a ``metrics.json`` block from rows in memory; see :class:`Scorer`.

    Args:
        y: (n, dy) true target states.
        y_hat: (n, dy) predicted ones.
        mean_train_y: (dy,) mean target state over the train rows.
        gallery: Rows of the retrieval gallery, at most.
        cka_rows: Rows for CKA, at most.
        seed: Chooses the subsets.
        documents: (n,) labels, as :meth:`Scorer.update` takes them.
        tokens: Integers (n,), the source token of every row; None where nobody knows.

    Returns:
        The figures by key, and a reason for each that is None.

    Raises:
        FitError: Shapes do not fit.
    """
    scorer = Scorer(mean_train_y, len(y), gallery=gallery, cka_rows=cka_rows, seed=seed, tokens=tokens)
    labels = None if documents is None else np.asarray(documents)
    for start in range(0, len(y), 8192):
        part = slice(start, start + 8192)
        scorer.update(y[part], y_hat[part], None if labels is None else labels[part])
    return scorer.result()
