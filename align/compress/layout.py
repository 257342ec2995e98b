"""What each number of a window's latents is for: a function of the number of source tokens, known to both sides.

A window's source tokens are cut, in order, into as many equal *segments* as there are latents; latent m sees segment m.
A segment is cut into *groups* of at most ``stride`` tokens, and the R numbers of its latent are shared out evenly among
the groups: so many *coordinates* each, the leading ones of a fixed order. Stride 1 gives every token a few coordinates,
a large stride gives a few pooled tokens many; which is better depends on the rate and is chosen on validation windows.

Where ``positions`` is set, one number of each group says how many bytes further it ends than the group before. A
receiver that has the latents and the number of source tokens then knows where each group ends, exactly up to 256 bytes,
which bfloat16 holds; beyond that the sender takes the receiver's rounding into account, so that errors do not add up.
Without, the receiver takes all source tokens for equally long.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import FitError

#: Bytes of a number of a latent: bfloat16.
NUMBER_BYTES = 2


@dataclass(frozen=True)
class Layout:
    """How latents are used.

    Attributes:
        latents: M, latents of a window.
        latent_dim: R, numbers of a latent.
        stride: Most source tokens of a group, as far as a latent has room for its groups.
        positions: Whether each group's end is sent.

    Raises:
        FitError: A number below 1, or no room for a coordinate beside a position.
    """

    latents: int
    latent_dim: int
    stride: int
    positions: bool

    def __post_init__(self) -> None:
        for name in ("latents", "latent_dim", "stride"):
            if getattr(self, name) < 1:
                raise FitError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.latent_dim < 1 + self.positions:
            raise FitError(f"latent_dim {self.latent_dim} leaves no room beside a position: use 2 or more")

    @property
    def most_coordinates(self) -> int:
        """Coordinates of a group that has a latent for itself."""
        return self.latent_dim - self.positions

    def options(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Groups:
    """The groups of one window, in order.

    Attributes:
        first: int64 ``(S,)``, first source token of each group.
        stop: int64 ``(S,)``, one past its last.
        coordinates: int64 ``(S,)``, how many coordinates it has.
    """

    first: NDArray[np.int64]
    stop: NDArray[np.int64]
    coordinates: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first)


def groups_of(layout: Layout, tokens: int) -> Groups:
    """Cut a window's source tokens into groups.

    Args:
        layout: How.
        tokens: Source tokens of the window.

    Returns:
        The groups; never more numbers in all than ``latents * latent_dim``. With fewer tokens than latents some latents
        are unused.

    Raises:
        FitError: There are no source tokens.
    """
    if tokens < 1:
        raise FitError("a window without source tokens has no latents; leave it out")
    edges = np.arange(layout.latents + 1, dtype=np.int64) * tokens // layout.latents
    first: list[int] = []
    stop: list[int] = []
    coordinates: list[int] = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if start == end:
            continue
        count = min(-(-(end - start) // layout.stride), layout.latent_dim // (1 + layout.positions))
        inner = [start + (end - start) * j // count for j in range(count + 1)]
        first += inner[:-1]
        stop += inner[1:]
        coordinates += [layout.latent_dim // count - layout.positions] * count
    return Groups(*(np.array(part, dtype=np.int64) for part in (first, stop, coordinates)))


def group_ends(layout: Layout, groups: Groups, ends: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """Where each group ends, as the receiver knows it.

    Args:
        layout: How latents are used.
        groups: Of the window.
        ends: int ``(T_x,)``, byte end of every source token within the window.

    Returns:
        float32 ``(S,)`` bytes, non-decreasing if ``ends`` is.
    """
    if not layout.positions:
        nominal: NDArray[np.float32] = (groups.stop / len(ends) * float(ends[-1])).astype(np.float32)
        return nominal
    known = np.empty(len(groups), dtype=np.float32)
    place = 0.0
    for i, end in enumerate(ends[groups.stop - 1].tolist()):
        place += float(to_bfloat16(np.float32(end - place)))
        known[i] = place
    return known


def to_bfloat16(values: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    """Round to the nearest bfloat16, ties to even.

    Args:
        values: float32, finite.

    Returns:
        float32 of the same shape.
    """
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def containing(known: NDArray[np.float32], ends: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The group in which each target position lies: the first that ends there or later, else the last.

    Args:
        known: float32 ``(S,)``, from :func:`group_ends`.
        ends: int ``(T_y,)``, byte ends of the target's tokens.

    Returns:
        int64 ``(T_y,)``.
    """
    return np.minimum(np.searchsorted(known, ends, side="left"), len(known) - 1).astype(np.int64)


def candidates(latents: int, latent_dim: int, tokens: float) -> list[Layout]:
    """Layouts worth trying, from every token for itself to one group for a latent.

    Args:
        latents: M.
        latent_dim: R.
        tokens: Source tokens of a usual window.

    Raises:
        FitError: A number below 1.
    """
    Layout(latents, latent_dim, 1, positions=False)
    whole = max(1, int(np.ceil(tokens / latents)))
    strides = [1]
    while strides[-1] < whole:
        strides.append(min(strides[-1] * 2, whole))
    return [
        Layout(latents, latent_dim, stride, positions)
        for stride in strides
        for positions in ((True, False) if latent_dim > 1 else (False,))
    ]
