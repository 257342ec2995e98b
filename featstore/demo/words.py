"""The demo's figures as people read them: three blocks of a table, and what each says, decided by the figures alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from featstore.demo.blocks import (
    APART,
    PLANTED,
    UNTRAINED,
    Beyond,
    Block,
    CkaFigures,
    CkaFloor,
    DemoResult,
    MapFigures,
    Share,
    by_depth,
)
from featstore.runtime.console import human_seconds

F = TypeVar("F")

#: What each block is for.
PURPOSES = {
    PLANTED: "a pair whose answer is known: the twin's states are a rotation of smollm2's, read by another tokenizer",
    APART: "a pair whose answer nobody knows: the small model was trained on other text, with a tokenizer of its own",
    UNTRAINED: "the small model's architecture and tokenizer with random weights: nothing in it was learnt",
}
#: The map and the place that the sentences quote, fixed before any figure is known.
_QUOTED = "affine"
_ALPHA = 0.05
_NONE = "-"
_LOSSES = ("clean", "mapped", "token", "mean")


def describe(result: DemoResult) -> str:
    """The three blocks, each followed by what it says, and where the report is."""
    parts = [text for name, block in _in_order(result) for text in ("\n".join(_block(name, block)), "")]
    seconds = human_seconds(result.total_seconds or 0)
    return "\n".join([*parts, f"done in {seconds}; open {result.report}"])


def _in_order(result: DemoResult) -> Iterator[tuple[str, Block]]:
    for name in (PLANTED, APART, UNTRAINED):
        if name in result.blocks:
            yield name, result.blocks[name]


def _block(name: str, block: Block) -> Iterator[str]:
    yield f"{name.upper()}: {block.source} and {block.target}, {PURPOSES[name]}"
    yield f"{'':12} {'layers':24} {'CKA':>6}  {'documents exchanged':22}  {'same token elsewhere':22}"
    for key, figures in _by_depth(block.cka):
        floors = "  ".join(f"{_floor(figures.floors.get(name)):22}" for name in ("documents", "token"))
        yield f"{'cka':12} {key:24} {_number(figures.value):>6}  {floors}".rstrip()
    scores = "".join(f" {name:>6}" for name in ("R2", "token", "beyond", *_LOSSES))
    shares = f"{'recovered [95 %]':24}  {'beyond the token [95 %]':24}  nats beyond it [95 %]"
    yield f"{'map':12} {'layers':24}{scores}  {shares}"
    for type_, pairs in block.maps.items():
        for key, found in _by_depth(pairs):
            yield _map(type_, key, found)
    yield from sentences(block)


def _map(type_: str, key: str, figures: MapFigures) -> str:
    scores = (figures.r2, figures.token_r2, figures.partial_r2)
    row = f"{type_:12} {key:24}" + "".join(f" {_number(score):>6}" for score in scores)
    if figures.nats_per_token:
        row += "".join(f" {_number(figures.nats_per_token.get(name), 2):>6}" for name in _LOSSES)
        row += f"  {_share(figures.recovered):24}  {_share(figures.recovered_token):24}  {_nats(figures.beyond_token)}"
    return row.rstrip()


def sentences(block: Block) -> Iterator[str]:
    """What a block's figures say, in the middle of both models and for one map, chosen before they were known.

    Args:
        block: Its figures.
    """
    if block.cka:
        key, figures = _middle(block.cka)
        yield from _cka_says(key, figures)
    forward = {
        key: figures for key, figures in block.maps.get(_QUOTED, {}).items() if key.startswith(f"{block.source}:")
    }
    if forward:
        key, found = _middle(forward)
        yield from _map_says(key, found)


def _middle(figures: Mapping[str, F]) -> tuple[str, F]:
    """The layer pair in the middle of those that there are."""
    items = _by_depth(figures)
    return items[len(items) // 2]


def _by_depth(figures: Mapping[str, F]) -> list[tuple[str, F]]:
    return sorted(figures.items(), key=lambda item: by_depth(item[0]))


def _cka_says(key: str, figures: CkaFigures) -> Iterator[str]:
    if figures.value is None:
        return
    said = f"CKA of {key} is {figures.value:.3f}"
    floor = figures.floors.get("documents")
    if floor is None or floor.p is None or floor.value is None:
        yield f"{said}."
        return
    verdict = "more than" if floor.p <= _ALPHA else "not demonstrably more than"
    yield f"{said}: {verdict} the same documents exchanged give ({_floor(floor)})."
    token = figures.floors.get("token")
    if token is not None and token.p is not None and token.value is not None and token.mean is not None:
        verdict = "more than" if token.p <= _ALPHA else "not demonstrably more than"
        rows = f"Of rows with a partner of the same token elsewhere it is {token.value:.3f}"
        beyond = f"{token.value - token.mean:+.3f} beyond the token"
        yield f"{rows}: {verdict} those partners give ({_floor(token)}), {beyond}."


def _map_says(key: str, figures: MapFigures) -> Iterator[str]:
    if figures.partial_r2 is not None and figures.token_r2 is not None:
        yield (
            f"The {_QUOTED} map {key} has R2 {_number(figures.r2)}, the current token alone {figures.token_r2:.3f}: "
            f"{_beyond(figures.partial_r2, figures.partial_r2_ci95)}."
        )
    beyond = figures.beyond_token
    if beyond is not None and beyond.nats is not None:
        yield f"Put into the target it {_decided(beyond)}{_of_the_mean(figures.recovered)}."


def _beyond(partial: float, interval: Sequence[float | None] | None) -> str:
    low, high = interval or (None, None)
    shown = f"{partial:.1%} of what the token leaves{_between(interval)}"
    if low is None or high is None:
        return f"{shown}, without an interval that could decide"
    if low > 0:
        return f"the map predicts {shown}"
    if high < 0:
        return f"the map does worse than the token ({shown})"
    return f"the map cannot be told from the token ({shown})"


def _decided(beyond: Beyond) -> str:
    shown = f"{_nats(beyond)} nats/token less loss than the token alone"
    low, high = beyond.ci95 or (None, None)
    if low is None or high is None:
        return f"leaves {shown}, without an interval that could decide"
    if low > 0:
        return f"leaves {shown}"
    if high < 0:
        return f"does worse than the token alone ({_nats(beyond)} nats/token)"
    return f"cannot be told from the token alone ({_nats(beyond)} nats/token)"


def _between(interval: Sequence[float | None] | None) -> str:
    low, high = interval or (None, None)
    return "" if low is None or high is None else f" [{low:.1%}, {high:.1%}]"


def _of_the_mean(share: Share | None) -> str:
    known = share is not None and share.value is not None
    return f"; of what the mean state costs it recovers {_share(share)}" if known else ""


def _nats(beyond: Beyond | None) -> str:
    if beyond is None or beyond.nats is None:
        return _NONE
    low, high = beyond.ci95 or (None, None)
    return f"{beyond.nats:.2f}" + ("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]")


def _share(share: Share | None) -> str:
    return _NONE if share is None or share.value is None else f"{share.value:.1%}{_between(share.ci95)}"


def _floor(floor: CkaFloor | None) -> str:
    if floor is None or floor.mean is None:
        return _NONE
    return f"{floor.mean:.3f}" + ("" if floor.p is None else f", p {floor.p:.3f}")


def _number(value: float | None, digits: int = 3) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"
