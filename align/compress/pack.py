"""Windows as padded arrays for the module: which token goes to which group, which group answers which position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.compress.layout import Layout, containing, group_ends, groups_of

#: Groups that a target position looks at: so many before the one it lies in, that one, and so many behind.
BEFORE, BEHIND = 2, 1
NEIGHBOURS = BEFORE + 1 + BEHIND


@dataclass(frozen=True, eq=False)
class Packed:
    """A batch of B windows. Padding is zero, and no masked element can change an unmasked output.

    Attributes:
        x: float32 ``(B, T, d_source)``.
        ends_x: float32 ``(B, T)``.
        tokens: bool ``(B, T)``, which source tokens there are.
        member: int64 ``(B, S, G)``, the tokens of each group.
        has: bool ``(B, S, G)``, which members there are.
        share: float32 ``(B, S, K)``, 1 where a group has this coordinate.
        ends: float32 ``(B, S)``, where groups end, as the receiver knows it.
        groups: bool ``(B, S)``, which groups there are.
        ends_y: float32 ``(B, U)``.
        before_y: float32 ``(B, U)``, byte end of the target token before; 0 for the first.
        near: int64 ``(B, U, NEIGHBOURS)``, the groups each position looks at.
        seen: bool ``(B, U, NEIGHBOURS)``, which of them there are.
    """

    x: NDArray[np.float32]
    ends_x: NDArray[np.float32]
    tokens: NDArray[np.bool_]
    member: NDArray[np.int64]
    has: NDArray[np.bool_]
    share: NDArray[np.float32]
    ends: NDArray[np.float32]
    groups: NDArray[np.bool_]
    ends_y: NDArray[np.float32]
    before_y: NDArray[np.float32]
    near: NDArray[np.int64]
    seen: NDArray[np.bool_]


def pack(
    layout: Layout,
    windows: Sequence[tuple[NDArray[np.float32], NDArray[np.integer[Any]], NDArray[np.integer[Any]]]],
) -> Packed:
    """Pad windows to a batch.

    Args:
        layout: How latents are used.
        windows: For each ``x`` (T_x, d_source), ``ends_x`` (T_x,) and ``ends_y`` (T_y,).

    Raises:
        FitError: A window has no source tokens.
    """
    cut = [groups_of(layout, len(x)) for x, _, _ in windows]
    b = len(windows)
    t = max(len(x) for x, _, _ in windows)
    s = max(len(groups) for groups in cut)
    g = max(int((groups.stop - groups.first).max()) for groups in cut)
    u = max(len(ends_y) for _, _, ends_y in windows)
    packed = Packed(
        x=np.zeros((b, t, windows[0][0].shape[1]), np.float32),
        ends_x=np.zeros((b, t), np.float32),
        tokens=np.zeros((b, t), bool),
        member=np.zeros((b, s, g), np.int64),
        has=np.zeros((b, s, g), bool),
        share=np.zeros((b, s, layout.most_coordinates), np.float32),
        ends=np.zeros((b, s), np.float32),
        groups=np.zeros((b, s), bool),
        ends_y=np.zeros((b, u), np.float32),
        before_y=np.zeros((b, u), np.float32),
        near=np.zeros((b, u, NEIGHBOURS), np.int64),
        seen=np.zeros((b, u, NEIGHBOURS), bool),
    )
    offsets = np.arange(-BEFORE, BEHIND + 1)
    for i, ((x, ends_x, ends_y), groups) in enumerate(zip(windows, cut, strict=True)):
        packed.x[i, : len(x)], packed.ends_x[i, : len(x)], packed.tokens[i, : len(x)] = x, ends_x, True
        n = len(groups)
        members = groups.first[:, None] + np.arange(g)
        packed.has[i, :n] = members < groups.stop[:, None]
        packed.member[i, :n] = np.where(packed.has[i, :n], members, 0)
        packed.share[i, :n] = np.arange(layout.most_coordinates) < groups.coordinates[:, None]
        known = group_ends(layout, groups, ends_x)
        packed.ends[i, :n], packed.groups[i, :n] = known, True
        m = len(ends_y)
        packed.ends_y[i, :m] = ends_y
        packed.before_y[i, 1:m] = ends_y[:-1]
        near = containing(known, ends_y)[:, None] + offsets
        packed.seen[i, :m] = (near >= 0) & (near < n)
        packed.near[i, :m] = np.clip(near, 0, n - 1)
    return packed
