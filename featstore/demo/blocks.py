"""What the demo finds, as typed data: three blocks of figures, read from the files that its commands wrote.

The names are those of ``metrics.json``, ``stitch.json`` and ``cka.json``; docs/results.md explains them. A figure that
a file does not hold is null here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from featstore.runtime.provenance import read_json
from featstore.runtime.records import EMPTY, Flag, Interval, Number, Record, Table

#: What the demo answers, in its order: what is planted, what is learnt, what is there without learning.
PLANTED, APART, UNTRAINED = "planted answer", "trained apart", "untrained"


class Share(Record):
    """A share of the stitched loss.

    Attributes:
        value: Null where it is undefined.
        ci95: Its 95 % interval over documents.
    """

    value: Number | None = None
    ci95: Interval | None = None


class Beyond(Record):
    """How much lower the stitched loss is with the map than with the prediction from the token alone.

    Attributes:
        nats: Nats per token.
        ci95: Its 95 % interval over documents.
        beaten: Whether the whole interval is above 0; null without one.
    """

    nats: Number | None = None
    ci95: Interval | None = None
    beaten: Flag | None = None


class MapFigures(Record):
    """One map of one layer pair on the test documents.

    Attributes:
        r2: 1 - SSE / SST.
        r2_ci95: Its 95 % interval over documents.
        token_r2: The same of the best prediction from the source's current token alone.
        partial_r2: 1 - SSE / SSE of that prediction: what is left beyond the token.
        partial_r2_ci95: Its interval.
        nats_per_token: The target's stitched loss by condition; empty where nothing was put in.
        recovered: Share of the stitched loss between the mean state and the target's own.
        recovered_token: The same counted from the prediction from the token alone.
        beyond_token: The difference to that prediction, on which decisions rest.
        beats_every_control: Whether the loss is lower than under every control; null where that is undecided.
    """

    r2: Number | None = None
    r2_ci95: Interval | None = None
    token_r2: Number | None = None
    partial_r2: Number | None = None
    partial_r2_ci95: Interval | None = None
    nats_per_token: Table[Number | None] = EMPTY
    recovered: Share | None = None
    recovered_token: Share | None = None
    beyond_token: Beyond | None = None
    beats_every_control: Flag | None = None


class CkaFloor(Record):
    """CKA with partners exchanged.

    Attributes:
        value: CKA over the rows of this floor, with their true partners.
        mean: Mean over exchanges.
        p95: 95th percentile over exchanges.
        p: (1 + exchanges at least as high) / (1 + exchanges).
    """

    value: Number | None = None
    mean: Number | None = None
    p95: Number | None = None
    p: Number | None = None


class CkaFigures(Record):
    """CKA of one layer pair, over all rows.

    Attributes:
        value: Debiased linear CKA.
        floors: ``documents`` (documents in each other's place) and ``token`` (partners of the same source token in
            another document).
    """

    value: Number | None = None
    floors: Table[CkaFloor] = EMPTY


class Block(Record):
    """Everything about two models.

    Attributes:
        source: Name of the first.
        target: Name of the second.
        cka: By layer pair, layers of equal depth.
        maps: By type of map and layer pair.
    """

    source: str = ""
    target: str = ""
    cka: Table[CkaFigures] = EMPTY
    maps: Table[Table[MapFigures]] = EMPTY


class DemoResult(Record):
    """Contents of ``demo.json``.

    Attributes:
        blocks: ``planted answer``, ``trained apart`` and ``untrained``.
        report: Path of the HTML report.
        seconds: By stage; a stage that was done already has none.
        store: What `featstore extract` said.
        total_seconds: Of all of it.
    """

    file: ClassVar[str] = "demo.json"
    made_by: ClassVar[str] = "featstore demo"
    always: ClassVar[tuple[str, ...]] = ("blocks",)

    blocks: Table[Block] = EMPTY
    report: str = ""
    seconds: Table[Number] = EMPTY
    store: Table[Any] = EMPTY
    total_seconds: Number | None = None


def read_block(source: str, target: str, cka: Path, runs: Mapping[str, Path]) -> Block:
    """Read what the commands wrote about two models.

    Args:
        source: Name of the first.
        target: Name of the second.
        cka: Directory with ``cka.json``.
        runs: By type of map, directories with ``metrics.json`` and perhaps ``stitch.json``.

    Raises:
        CorruptDataError: A file is no JSON, or holds another type of value.
    """
    maps = {type_: dict(_maps(directory)) for type_, directory in runs.items()}
    content = {"source": source, "target": target, "cka": dict(_cka(read_json(cka / "cka.json"))), "maps": maps}
    return Block.parse(content, where=f"the demo's figures of {source} and {target}")


def _maps(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    metrics = read_json(directory / "metrics.json")["pairs"]
    path = directory / "stitch.json"
    stitched = read_json(path)["pairs"] if path.exists() else {}
    for key in metrics:
        test, token = metrics[key]["test"], metrics[key]["baselines"].get("token") or {}
        figures = {name: test.get(name) for name in ("r2", "r2_ci95", "partial_r2", "partial_r2_ci95")}
        yield key, {**figures, "token_r2": token.get("r2"), **_stitched(stitched.get(key))}


def by_depth(key: str) -> tuple[str, int]:
    """Sorts layer pairs by their source: ``small:2->twin:15`` is ``("small", 2)``."""
    model, _, layer = key.partition("->")[0].rpartition(":")
    return model, int(layer)


def _stitched(entry: dict[str, Any] | None) -> dict[str, Any]:
    if entry is None:
        return {}
    losses = {name: figures and figures["nats_per_token"] for name, figures in entry["conditions"].items()}
    figures: dict[str, Any] = {"nats_per_token": losses, "beats_every_control": entry.get("beats_every_control")}
    for name, kind in (("recovered", Share), ("recovered_token", Share), ("beyond_token", Beyond)):
        figures[name] = {member: entry.get(name, {}).get(member) for member in kind.model_fields}
    return figures


def _cka(similarity: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    first, second = similarity["models"]
    layers = zip(similarity["layers"][first], similarity["layers"][second], strict=True)
    for place, (above, below) in enumerate(layers):
        floors = {
            name: {figure: _cell(floor.get(figure), place) for figure in CkaFloor.model_fields}
            for name, floor in similarity.get("permutations", {}).items()
        }
        yield f"{first}:{above}->{second}:{below}", {"value": _cell(similarity["cross"], place), "floors": floors}


def _cell(matrix: list[list[Any]] | None, place: int) -> Any:
    return matrix[place][place] if matrix else None
