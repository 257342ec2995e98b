"""The last part of a model by itself gives the logits of the whole pass, or is not taken for one."""

from __future__ import annotations

import pytest
import torch

from featstore.models.stack import residual_stream
from featstore.models.tail import Tail, Whole, tail_of
from tests.support.tiny_models import small


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mamba"])
def test_some_rows_have_the_logits_of_the_whole_pass(name: str) -> None:
    model = small(name).eval()
    stream = residual_stream(model)
    ids = torch.randint(5, 60, (2, 11), generator=torch.Generator().manual_seed(0))
    tail = tail_of(stream, ids[:1])
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits
        states = tail.states(ids)
        rows = torch.tensor([3, 9, 0])
        found = tail.logits(states[1, rows])
    assert isinstance(tail, Tail)
    torch.testing.assert_close(found, whole[1, rows], rtol=0, atol=1e-5 * float(whole.abs().max()))
    # Nothing of it stays in the model.
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)


def test_a_model_whose_logits_depend_on_other_rows_is_taken_whole() -> None:
    model = small("llama").eval()
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden - hidden.mean(dim=1, keepdim=True))
    ids = torch.randint(5, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    whole = tail_of(residual_stream(model), ids)
    assert isinstance(whole, Whole)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(whole.logits(whole.states(ids)[0]), logits[0])
