#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (CPU): RWKV read token by token from its state is right for one row alone.
#
# The same two texts are read in one pass, and token by token with `state` handed on: one row at a time, and both rows
# as a batch. One row at a time the logits agree to rounding. As a batch, a pass over one token of each row gives the
# logits of two, and the last of them, which is what `generate` goes on from, are not those of the whole text.
#
# Seen: single rows differ by less than 1e-5; for two rows the logits of one token have shape (2, 2, 64), and the last
# ones differ by more than 0.1.
# Whoever continues several texts with RWKV passes the whole text again, or one row at a time.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cat >"$place/rows.py" <<'PY'
import sys

import torch
from transformers import RwkvConfig, RwkvForCausalLM

torch.manual_seed(0)
model = RwkvForCausalLM(RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32))
model.eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
ids = torch.randint(64, (2, 8))


@torch.no_grad()
def token_by_token(rows):
    state, read = None, []
    for i in range(rows.shape[1]):
        output = model(input_ids=rows[:, i : i + 1], state=state, use_cache=True)
        state = output.state
        read.append(output.logits[:, -1])
    return torch.stack(read, dim=1), tuple(output.logits.shape)


with torch.no_grad():
    whole = model(input_ids=ids, use_cache=False).logits
single = max(float((token_by_token(ids[i : i + 1])[0] - whole[i : i + 1]).abs().max()) for i in range(2))
rows, shape = token_by_token(ids)
both = float((rows - whole).abs().max())
print(f"one row at a time: {single:.1e}; both rows: {both:.2f}, logits of one token {shape}")
sys.exit(0 if single < 1e-5 and both > 0.1 and shape == (2, 2, 64) else 1)
PY
"$place/venv/bin/python" "$place/rows.py" && echo "as stated" || { echo "no longer as stated" >&2; exit 1; }
