"""Whether a predicted state finds its own partner among states of the same source token.

Equal tokens have similar states, so retrieval among any rows is half won by knowing the token. Among rows of one token
a prediction from the token alone scores chance, and only what is known of the context tells one row from another.

Both sides are centred by their own mean over the token's rows. About the train mean, what the token says is common to
all its rows and larger than what the context says: every prediction is then nearest to the same row, and a map that
explains a fifth of what the token leaves looks like one that knows the token alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.metrics.ranking import Gallery, gallery_of, rank_of_partners
from align.metrics.rows import ROUNDING, Figures, checked_rows
from align.moments.scatter import Array, Rows
from featstore.errors import FitError

SAME_TOKEN_KEYS = (
    "retrieval_same_token_top1",
    "retrieval_same_token_chance",
    "retrieval_same_token_ceiling",
)
#: Rows of one token, at most: of a frequent one there are thousands.
GROUP_ROWS = 32
#: Rows of all tokens, at most.
SAME_TOKEN_ROWS = 2048
NO_TOKENS = "needs the source tokens of the rows"


def same_token_rows(
    tokens: ArrayLike, rng: np.random.Generator, *, rows: int = SAME_TOKEN_ROWS, group: int = GROUP_ROWS
) -> NDArray[np.int64]:
    """Choose rows of tokens that occur twice or more.

    Tokens are taken in the order in which a random order of the rows meets them, so that frequent ones are likely and
    none is certain; of each come its first ``group`` rows in that order.

    Args:
        tokens: Integers ``(n,)``, the source token of every row.
        rng: Gives the order.
        rows: Rows in all, at most.
        group: Rows of one token, at most.

    Returns:
        int64, ascending row numbers.
    """
    ids, place, counts = np.unique(np.asarray(tokens), return_inverse=True, return_counts=True)
    order = rng.permutation(len(place))
    order = order[counts[place[order]] > 1]
    met, first = np.unique(place[order], return_index=True)
    # Of each token in turn, in the order of first meeting.
    turn = np.full(len(ids), -1)
    turn[met[np.argsort(first, kind="stable")]] = np.arange(len(met))
    by_token = order[np.argsort(turn[place[order]], kind="stable")]
    owner = turn[place[by_token]]
    within = np.arange(len(owner)) - np.searchsorted(owner, owner)
    by_token = by_token[within < group][:rows]
    # The last token may have been cut down to a single row.
    kept, many = np.unique(place[by_token], return_counts=True)
    chosen: NDArray[np.int64] = np.sort(by_token[many[np.searchsorted(kept, place[by_token])] > 1]).astype(np.int64)
    return chosen


@dataclass(frozen=True, eq=False)
class TokenGalleries:
    """The true rows of every token that occurs twice, the same for every map; see :func:`galleries_of`.

    Attributes:
        rows: int64, of each token the numbers of its rows.
        galleries: Of each token.
        finite: Whether all true rows are finite.
    """

    rows: list[NDArray[np.int64]]
    galleries: list[Gallery]
    finite: bool


def galleries_of(y: Rows, tokens: ArrayLike) -> TokenGalleries:
    """Prepare true rows once for all maps.

    Args:
        y: ``(n, dy)`` true states.
        tokens: Integers ``(n,)``.
    """
    rows = checked_rows("y", y, np.shape(y)[-1])
    _, place, counts = np.unique(np.asarray(tokens), return_inverse=True, return_counts=True)
    groups = [np.flatnonzero(place == number) for number in np.flatnonzero(counts > 1)]
    finite = bool(np.isfinite(rows).all())
    zero = np.zeros(rows.shape[1])
    return TokenGalleries(groups, [gallery_of(_centred(rows[own]), zero) for own in groups] if finite else [], finite)


def retrieval_same_token(
    y: Rows, y_hat: Rows, tokens: ArrayLike, known: TokenGalleries | None = None
) -> tuple[Figures, str | None]:
    """Find each true row among the true rows of its own token by the cosine of its prediction, both centred.

    Args:
        y: ``(n, dy)`` true states.
        y_hat: ``(n, dy)`` predicted ones.
        tokens: Integers ``(n,)``, the source token of every row; rows whose token is alone are left out.
        known: :func:`galleries_of` of ``y`` and ``tokens`` if they are known already.

    Returns:
        ``retrieval_same_token_top1`` (mean over rows), ``_chance`` (mean of 1 / rows of the token) and ``_ceiling``
        (what the true states themselves score), ``_gallery`` (rows) and ``_tokens``; and why the first three are None.

    Raises:
        FitError: Shapes do not fit.
    """
    width, ids = np.shape(y)[-1], np.asarray(tokens)
    y, y_hat = checked_rows("y", y, width), checked_rows("y_hat", y_hat, width)
    if not len(y) == len(y_hat) == len(ids):
        raise FitError(
            f"y has {len(y)} rows, y_hat {len(y_hat)} and tokens {len(ids)}"
            "; give a prediction and a token for every true row"
        )
    known = galleries_of(y, ids) if known is None else known
    groups = known.rows
    size = sum(map(len, groups))
    figures: Figures = {
        **dict.fromkeys(SAME_TOKEN_KEYS),
        "retrieval_same_token_gallery": size,
        "retrieval_same_token_tokens": len(groups),
    }
    if not groups:
        return figures, "no source token occurs twice among the rows"
    if not (known.finite and np.isfinite(y_hat).all()):
        return figures, "a true or predicted state is not finite"
    top, ceiling, zero = 0.0, 0.0, np.zeros(width)
    for rows, gallery in zip(groups, known.galleries, strict=True):
        found, _ = rank_of_partners(gallery.unit, _centred(y_hat[rows]), zero, gallery)
        hits, most = found["retrieval_top1"], found["retrieval_ceiling"]
        # Where all states of a token are the same one, any row is as good as another.
        top += 1.0 if hits is None else hits * len(rows)
        ceiling += 1.0 if most is None else most * len(rows)
    figures["retrieval_same_token_top1"] = top / size
    figures["retrieval_same_token_chance"] = len(groups) / size
    figures["retrieval_same_token_ceiling"] = ceiling / size
    return figures, None


def _centred(rows: Rows) -> Array:
    """Rows about their own mean, zero where nothing but rounding is left."""
    wide: Array = rows.astype(np.float64)
    away: Array = wide - wide.mean(axis=0)
    rounding = np.linalg.norm(away, axis=1) <= ROUNDING * np.linalg.norm(wide, axis=1).max()
    away[rounding] = 0.0
    return away
