"""What a verdict forbids, in one line that names the model, the test, the layer and the figure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from featstore.errors import ProbeError
from featstore.models.probe.prove import Needs, prove
from featstore.models.probe.refusals import refuse_continuing, refuse_hiding, refuse_injecting, refuse_storing
from featstore.models.verdict import Verdict
from tests.support.tiny_models import small


def verdict(name: str, needs: Needs | None = None) -> Verdict:
    return prove(small(name), needs or Needs()).verdict


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ProbeError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(caught.value, RuntimeError)
    return message


def planted(**entry: Any) -> Verdict:
    """A verdict on layer 2, and nothing else."""
    return Verdict.parse({"layers": {"2": {"self_identical": True, "leak": 0.0, **entry}}})


def test_a_table_of_layer_0_is_refused_where_it_is_none() -> None:
    message = refusal(lambda: refuse_storing("a", verdict("gpt2"), table=True))
    assert re.fullmatch(
        r"--layer-0 table: layer 0 of model 'a' depends on the position, not on the token alone \(one id at two "
        r"positions differs by 0\.\d+\); leave --layer-0 out, which stores its rows",
        message,
    )
    refuse_storing("a", verdict("gpt2"), table=False)
    refuse_storing("a", verdict("llama"), table=True)
    refuse_storing("a", Verdict(), table=True)


def test_states_that_know_what_comes_are_stored_and_not_injected() -> None:
    found = verdict("llama@bidirectional", Needs(layers=(1,)))
    refuse_storing("a", found, table=True)
    message = refusal(lambda: refuse_injecting("a", found, (1,), allow_side_channel=True))
    assert re.match(r"model 'a' reads ahead \(causality test: states change by 1\.\d of their norm when only", message)


def test_a_leak_is_refused_with_its_layer_and_figure_unless_it_is_wanted() -> None:
    found = verdict("gemma3n_text", Needs(layers=(0, 3, 6)))
    message = refusal(lambda: refuse_injecting("a", found, (6, 3, 0)))
    assert re.match(r"model 'a', layer 3: the swap test leaks 0\.\d\d \(later blocks learn of the text past", message)
    assert f"{found.layers['3'].leak:.2g}" in message
    assert message.endswith("or type --allow-side-channel to have the leak beside every figure")
    refuse_injecting("a", found, (0, 3, 6), allow_side_channel=True)
    refuse_injecting("a", found, (6,))
    refuse_injecting("a", verdict("llama", Needs(layers=(0, 4))), (0, 4))
    # However small, and where it is no number.
    assert "layer 2: the swap test leaks 1e-09 " in refusal(lambda: refuse_injecting("a", planted(leak=1e-9), (2,)))
    assert "layer 2: the swap test leaks NaN " in refusal(lambda: refuse_injecting("a", planted(leak=None), (2,)))
    own = refusal(lambda: refuse_injecting("a", planted(leak=0.5), (2,), remedy="call it otherwise"))
    assert own.endswith("would not be about the injected states; call it otherwise")


@pytest.mark.parametrize("identical", [False, None])
def test_states_that_do_not_come_back_identical_are_refused_whatever_is_allowed(identical: bool | None) -> None:
    found = planted(self_identical=identical)
    for allowed in (True, False):
        message = refusal(lambda allowed=allowed: refuse_injecting("a", found, (2,), allow_side_channel=allowed))
        assert message.startswith("model 'a', layer 2: self-injection changes the logits; states cannot be put in")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek_v4@scored", r"two prompts with the same injected states differ by \d"),
        ("lfm2", "blocks 0, 1, 3 keep a recurrent or convolution state, which no attention mask can hide"),
        ("rwkv", "RwkvBlock gets no attention_mask"),
    ],
)
def test_hiding_is_refused_for_its_reason_where_it_does_not_hide(name: str, reason: str) -> None:
    found = verdict(name, Needs(layers=(1, 2), hide=True))
    message = refusal(lambda: refuse_hiding("a", found, (2,)))
    assert re.match(rf"model 'a', layer 2: --keep hide fails the two-prompt test: {reason}", message)
    assert message.endswith("; use --keep own")
    # Putting states in is another question.
    refuse_injecting("a", found, (1, 2))


def test_hiding_where_it_hides_is_not_refused() -> None:
    refuse_hiding("a", verdict("gpt_neox", Needs(layers=(0, 4), hide=True)), (0, 4))


def test_a_text_that_goes_on_in_no_way_is_refused() -> None:
    found = verdict("llama@bidirectional", Needs(continuing=True))
    assert refusal(lambda: refuse_continuing("a", found)).startswith(
        "model 'a': neither from a cache nor without one does a continued text get the logits of one pass;"
    )
    for name in ("llama", "mamba", "rwkv"):
        refuse_continuing("a", verdict(name, Needs(continuing=True)))
    refuse_continuing("a", Verdict())
