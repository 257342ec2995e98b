"""The algebra of the calibration twin: the same function, in a basis that we chose.

A Llama block reads the residual stream only through an RMSNorm and a matrix, and writes to it only through a matrix.
With the norm's gain g folded into the matrix behind it, ``W diag(g)``, the norm that is left merely divides by a
length. A rotation keeps lengths, so for any orthogonal Q the model with

    embeddings E Q;    matrices that read  W Q;    matrices that write  Q' W;    head W Q

computes the same logits, while its residual stream is h Q at every layer (rows are states, ``nn.Linear`` weights are
(out, in)). The map between the two models is therefore known: it is Q.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from featstore.errors import UnsupportedArchitectureError

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

_BLOCK_TENSOR = re.compile(r"(model\.layers\.\d+)\.(.+)\.weight")

#: Matrices that read the stream, with the norm that stands before each.
_READS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
_WRITES = frozenset({"self_attn.o_proj", "mlp.down_proj"})
_NORMS = frozenset(_READS.values())


def random_orthogonal(width: int, seed: int) -> Tensor:
    """Draw a rotation (or reflection) uniformly.

    Args:
        width: Its size d.
        seed: Fixes the draw.

    Returns:
        (d, d) float64 with Q'Q = I.
    """
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    # QR alone is unique only up to the sign of each column; fixing R's diagonal makes the draw uniform (Haar).
    return q * torch.sign(torch.diagonal(r))


def fold_and_rotate(state: Mapping[str, Tensor], rotation: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fold every norm's gain into the matrices behind it and rotate the residual stream.

    Args:
        state: The tensors of a ``LlamaForCausalLM``; ``lm_head.weight`` may be missing, the embedding is then the head.
        rotation: Q, (d, d) float64 and orthogonal. The identity folds only.
        dtype: What the results are rounded to; the arithmetic is float64.

    Returns:
        Tensors of the same names and shapes, and always ``lm_head.weight``: with the final gain in it, the head can no
        longer be tied to the embedding.

    Raises:
        UnsupportedArchitectureError: There is a tensor this algebra does not cover (a bias, a norm within the
            attention), so that the result would be another function.
    """
    if missing := {EMBEDDING, FINAL_NORM} - state.keys():
        raise UnsupportedArchitectureError(
            f"no tensor named {min(missing)}: a calibration twin is made from a LlamaForCausalLM"
        )
    twin = {}
    for name, tensor in {HEAD: state[EMBEDDING], **state}.items():
        weight = tensor.to(torch.float64)
        if name == EMBEDDING:
            weight = weight @ rotation
        elif name == HEAD:
            weight = (weight * state[FINAL_NORM].to(torch.float64)) @ rotation
        elif name == FINAL_NORM:
            weight = torch.ones_like(weight)
        else:
            weight = _block_tensor(name, weight, state, rotation)
        twin[name] = weight.to(dtype).contiguous()
    return twin


def _block_tensor(name: str, weight: Tensor, state: Mapping[str, Tensor], rotation: Tensor) -> Tensor:
    match = _BLOCK_TENSOR.fullmatch(name)
    block, part = match.groups() if match else ("", name)
    if part in _READS:
        gain = state[f"{block}.{_READS[part]}.weight"].to(torch.float64)
        return (weight * gain) @ rotation
    if part in _WRITES:
        return rotation.T @ weight
    if part in _NORMS:
        return torch.ones_like(weight)
    raise UnsupportedArchitectureError(
        f"tensor {name} has no place in a plain Llama block; a calibration twin cannot be made from this model"
    )


def pool_rows(rows: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Average rows of an embedding or a head: one result for each group of token ids.

    Args:
        rows: (vocabulary, d), any floating dtype.
        groups: For each new piece the token ids its text has in the old vocabulary; a group of none gives zeros.

    Returns:
        (len(groups), d) in the dtype of ``rows``; the mean is taken in float64.
    """
    flat = torch.tensor([token for group in groups for token in group])
    starts = torch.tensor([0, *(len(group) for group in groups[:-1])]).cumsum(0)
    bag = torch.nn.functional.embedding_bag(flat, rows.to(torch.float64), starts, mode="mean")
    return bag.to(rows.dtype)
