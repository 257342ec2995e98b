"""Where the truth, which knows nothing of the probe, disagrees with the probe's verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import nn

from featstore.models.injection import Injection, inject
from featstore.models.passes import Passes
from featstore.models.probe.injecting import two_texts
from featstore.models.probe.prove import Proven
from featstore.models.residual import capture
from tests.support import truth
from tests.support.architectures.kinds import some_ids
from tests.support.table.hidden import prompts_apart

#: Far above rounding in float32, far below what any of these models does that is no rounding.
ROUNDING = 1e-4
#: The same of logits that nothing but hidden words could move.
_HIDDEN = 1e-5
_IDS, _OTHER, _THIRD = (some_ids(seed, 24, 2) for seed in (1, 2, 3))
Check = Callable[[str, nn.Module, Proven], Iterator[str]]


def checked(name: str, model: nn.Module, proven: Proven | None, refused: str) -> tuple[list[str], list[str]]:
    """Hold a verdict against the truth.

    Args:
        name: A causal type, or ``type@variant``.
        model: The tiny model.
        proven: With everything tested; None where the model was refused.
        refused: Why it was.

    Returns:
        What was checked, and what is another.
    """
    if proven is None:
        return ["refusal"], list(_refusal(name, model, refused))
    assert proven.verdict.reading is not None
    checks: dict[str, Check] = {"rows": _rows, "batches": _batches, "reading": _reading, "layer 0": _layer_0}
    if proven.verdict.reading.causal:
        checks |= {"injection": _injection, "leaks": _leaks, "going on": _going_on, "padding": _padding, "hide": _hide}
    try:
        return list(checks), [
            f"{what}: {wrong}" for what, check in checks.items() for wrong in check(name, model, proven)
        ]
    except truth.NoRowsError as error:
        return [], [f"rows: there are none for each token and layer: {error}"]


def _refusal(name: str, model: nn.Module, refused: str) -> Iterator[str]:
    """Whether there are really no rows, and what the reason names is what is seen."""
    seen = truth.refuted(model, name, some_ids(1, 13, 3))
    try:
        truth.expected_rows(model, name, _IDS)
    except truth.NoRowsError:
        pass
    else:
        yield f"there are rows, but the refusal says: {refused}"
    if not (
        _same_number(r"13 tokens became (\d+) positions", refused, r"its stream at layer 0 is \(3, (\d+), ", seen)
        or _runs_often(refused, seen)
        or _does_not_run(refused, seen)
        or (
            "hands each member something else than the one before gave back" in refused
            and "swapping its stream at layer 0 leaks" in seen
        )
    ):
        yield f"the refusal says {refused!r}, and it is seen that {seen}"


def _same_number(first: str, here: str, second: str, there: str) -> bool:
    one, other = re.search(first, here), re.search(second, there)
    return one is not None and other is not None and one[1] == other[1]


def _order(seen: str) -> list[int]:
    found = re.search(r"its blocks run in the order \[(.*)\]", seen)
    return [int(word) for word in found[1].split(",")] if found else []


def _runs_often(refused: str, seen: str) -> bool:
    says = re.search(r"runs its (\d+) blocks (\d+) times", refused)
    return says is not None and _order(seen).count(0) * int(says[1]) == int(says[2]) > int(says[1])


def _does_not_run(refused: str, seen: str) -> bool:
    says = re.search(r"does not run blocks? ([\d, ]+) on text", refused)
    return says is not None and bool(_order(seen)) and not {int(word) for word in says[1].split(",")} & {*_order(seen)}


def _rows(name: str, model: nn.Module, proven: Proven) -> Iterator[str]:
    """The rows of all layers, to the bit: both are of the same pass."""
    expected = truth.expected_rows(model, name, _IDS)
    stream = proven.stream
    if set(expected) != set(range(stream.depth + 1)):
        yield f"{stream.depth} blocks, and {len(expected) - 1} in truth"
        return
    for layer, states in capture(stream, _IDS, range(stream.depth + 1)).items():
        if not torch.equal(states, expected[layer]):
            yield f"another at layer {layer}"


def _batches(name: str, model: nn.Module, proven: Proven) -> Iterator[str]:
    """Windows of several lengths, batched as the verdict says, have the rows that each has alone."""
    stream, lengths = proven.stream, (24, 13, 9, 24)
    windows = [row[None, :length] for row, length in zip(torch.cat([_IDS, _OTHER]), lengths, strict=True)]
    for group in stream.batching.groups(lengths):
        longest = max(lengths[place] for place in group)
        ids = torch.cat([nn.functional.pad(windows[place], (0, longest - lengths[place])) for place in group])
        together = capture(stream, ids, range(stream.depth + 1))
        for row, place in enumerate(group):
            alone = truth.expected_rows(model, name, windows[place])
            for layer, states in alone.items():
                difference = _apart(states, together[layer][row : row + 1, : lengths[place]])
                if difference > ROUNDING:
                    yield f"window {place} at layer {layer} is another in its batch ({difference:.2g})"


def _reading(name: str, model: nn.Module, proven: Proven) -> Iterator[str]:
    reading = proven.verdict.reading
    assert reading is not None
    ahead = max(truth.looks_ahead(model, name, _IDS, 13).values())
    if (ahead <= ROUNDING) != reading.causal:
        yield f"causal is {reading.causal}, and what follows moves rows by {ahead:.2g}"
    length = max(truth.counts_length(model, name, _IDS, 13).values())
    turns = reading.switch is not None and 13 <= reading.switch < 24
    if (length <= ROUNDING) != (reading.batching == "padded" and not turns):
        yield f"batching is {reading.batching}, and padding at the right moves rows by {length:.2g}"
    neighbours = max(truth.counts_neighbours(model, name, _IDS).values())
    if (neighbours <= ROUNDING) != (reading.batching != "single"):
        yield f"batching is {reading.batching}, and neighbours move rows by {neighbours:.2g}"


def _layer_0(name: str, model: nn.Module, proven: Proven) -> Iterator[str]:
    """Whether layer 0 is a table of ids: by place, and in company."""
    reading = proven.verdict.reading
    assert reading is not None
    moved = truth.depends_on_position(model, name)
    if (moved == 0) != reading.layer_0_is_table:
        yield f"it is a table: {reading.layer_0_is_table}; from place to place it moves by {moved:.2g}"
    if reading.layer_0_is_table:
        table = torch.cat([truth.expected_rows(model, name, _IDS[:1, i : i + 1])[0] for i in range(6)], dim=1)
        difference = _apart(table, truth.expected_rows(model, name, _IDS[:1])[0][:, :6])
        if difference > ROUNDING:
            yield f"it is no table: beside other tokens it moves by {difference:.2g}"


def _injection(name: str, model: nn.Module, proven: Proven) -> Iterator[str]:
    """What a model says with another's stream put in by `inject`, the blocks below left out where they may be."""
    rows = truth.expected_rows(model, name, _THIRD)
    everywhere = torch.ones_like(_IDS, dtype=torch.bool)
    for layer, states in rows.items():
        wanted = truth.logits_of(model, name, _IDS, layer, states)
        with inject(proven.stream, Injection(layer, states, everywhere), whole=True), torch.inference_mode():
            said = model(input_ids=_IDS, use_cache=False).logits
        if not torch.equal(said, wanted):
            yield f"another answer at layer {layer} ({_apart(wanted, said):.2g})"
        if not proven.verdict.layers[str(layer)].self_identical:
            yield f"layer {layer} does not take its own stream"


def _leaks(name: str, model: nn.Module, proven: Proven) -> Iterator[str]:
    """The same leaks for the probe's texts, and none in other texts where the probe says that there is none."""
    stated = {int(layer): entry.leak for layer, entry in proven.verdict.layers.items()}
    same = truth.swap_leaks(model, name, *two_texts(proven.stream).ids)
    others = truth.swap_leaks(model, name, _IDS, _OTHER)
    for layer, leak in stated.items():
        if leak is None or not math.isclose(leak, same[layer], rel_tol=0.02):
            yield f"the probe says {leak}, the truth {same[layer]:.2g} at layer {layer}"
        if leak == 0 and others[layer] != 0:
            yield f"the probe says none at layer {layer}, and other texts leak {others[layer]:.2g}"


@torch.inference_mode()
def _going_on(name: str, model: nn.Module, proven: Proven) -> Iterator[str]:
    """What follows from a prompt, and from a branch with other rows, has the logits of plain passes."""
    if proven.stream.continuing.kind == "none":
        yield "there is no way at all"
        return
    plain = [model(input_ids=_IDS[:, :end], use_cache=False).logits[:, -1] for end in range(17, 23)]
    passes = Passes(proven.stream)
    read = [passes.read(_IDS[:, :17])[:, -1]]
    turned = torch.tensor([1, 0, 0])
    branch = passes.branch(turned)
    other = passes.branch()
    other.read(_OTHER[:, 17:19])
    read += passes.read(_IDS[:, 17:20], keep=3).unbind(1)
    read += [passes.read(_IDS[:, end : end + 1])[:, -1] for end in (20, 21)]
    branched = branch.read(_IDS[turned, 17:20], keep=3).unbind(1)
    for step, (wanted, said) in enumerate(zip(plain, read, strict=True)):
        if (difference := _apart(wanted, said)) > ROUNDING:
            yield f"{difference:.2g} from the plain pass in step {step}"
    for wanted, said in zip(plain[1:4], branched, strict=True):
        if (difference := _apart(wanted[turned], said)) > ROUNDING:
            yield f"{difference:.2g} from the plain pass in a branch"


@torch.inference_mode()
def _padding(name: str, model: nn.Module, proven: Proven) -> Iterator[str]:
    """Prompts that share a batch say what each says alone; those that may not, are really changed by padding."""
    way = proven.verdict.continuing
    assert way is not None
    if way.padded:
        # All of them on one side of 16 tokens, where one of the models changes its position encoding.
        rows, padding = _IDS[:, :21].clone(), torch.zeros((2, 21), dtype=torch.bool)
        rows[1, :4], rows[1, 4:], padding[1, :4] = 3, _IDS[1, :17], True
        beside, alone = Passes(proven.stream), Passes(proven.stream)
        together = torch.cat([beside.read(rows, padding), beside.read(_IDS[:, 21:], keep=3)], dim=1)[1:]
        apart = torch.cat([alone.read(_IDS[1:, :17]), alone.read(_IDS[1:, 21:], keep=3)], dim=1)
        if (difference := _apart(apart, together)) > ROUNDING:
            yield f"a padded prompt says something else ({difference:.2g})"
        return
    try:
        moved = truth.padded_decoding_error(model, _IDS[:, :12], 5)
    except Exception:  # noqa: BLE001 - what cannot be padded at all raises all kinds of things
        return
    rows_moved = max(truth.counts_left_padding(model, name, _IDS, 5).values())
    if max(moved, rows_moved) <= ROUNDING:
        yield f"prompts may not share a batch, but padding moves what is generated by {moved:.2g} only"


def _hide(name: str, model: nn.Module, proven: Proven) -> Iterator[str]:
    """Two prompts say the same where hiding holds, something else where it is refused, and without hiding anyway."""
    depth = proven.stream.depth
    hidden = prompts_apart(model, name, proven.stream, "hide", range(depth + 1))
    # Without hiding, where there are blocks below and above.
    if (shown := prompts_apart(model, name, proven.stream, "own", [depth // 2])[depth // 2]) <= _HIDDEN:
        yield f"nothing is to be hidden at layer {depth // 2}: two prompts are {shown:.2g} apart without hiding"
    for layer, apart in hidden.items():
        refused = proven.verdict.layers[str(layer)].hide_refused
        if refused is None and apart > _HIDDEN:
            yield f"the probe says that it holds at layer {layer}, and two prompts are {apart:.2g} apart"
        if refused is not None and apart <= _HIDDEN:
            yield f"the probe says at layer {layer}: {refused}; and two prompts are {apart:.2g} apart"


def _apart(reference: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of the reference."""
    return float((other - reference).abs().max() / reference.abs().max())
