#!/usr/bin/env bash
# transformers 5.23.0, peft 0.21.2: with an adapter beside it, a model of random tensors is reported complete.
#
# `from_pretrained(..., output_loading_info=True)` returns the account of the adapter's tensors in the place of the
# model's. A checkpoint that lacks a block is then reported complete.
#
# Seen: missing_keys has 9 entries without the adapter and none with it.
# Whoever checks what was missing loads the model first, without the adapter, and then calls `load_adapter`.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat >"$place/load.py" <<'PY'
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
place = sys.argv[1]
LlamaForCausalLM(
    LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
).save_pretrained(place)
file = f"{place}/model.safetensors"
tensors = {name: tensor for name, tensor in load_file(file).items() if ".layers.1." not in name}
save_file(tensors, file, metadata={"format": "pt"})


def missing():
    return len(AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)[1]["missing_keys"])


without = missing()
lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "base_model_name_or_path": place}
with open(f"{place}/adapter_config.json", "w") as stream:
    json.dump(lora, stream)
names = [f"base_model.model.model.layers.{k}.self_attn.q_proj.lora_{part}.weight" for k in (0, 1) for part in "AB"]
shapes = [(2, 16), (16, 2)] * 2
save_file(
    {name: torch.ones(shape) for name, shape in zip(names, shapes, strict=True)}, f"{place}/adapter_model.safetensors"
)
print(without, missing())
PY
found=$(HF_HUB_OFFLINE=1 "$place/venv/bin/python" "$place/load.py" "$place/model" 2>/dev/null | tail -1)
if [ "$found" = "9 0" ]; then
    echo "as found: 9 tensors are missing, and with an adapter none are reported"
else
    echo "changed: $found" >&2
    exit 1
fi
