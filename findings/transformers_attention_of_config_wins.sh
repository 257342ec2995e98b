#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (CPU): an attention in a config.json beats the one that was asked for, by one name.
#
# A small Llama is saved, and loaded with attn_implementation="sdpa". Where its config.json has "_attn_implementation":
# "eager", the loaded model runs eager, without a warning; where the same word stands under "attn_implementation", which
# is how the argument is spelt, the argument wins and sdpa runs.
#
# Seen: nothing in config.json: sdpa; "attn_implementation": sdpa; "_attn_implementation": eager.
# Whoever needs one attention compares model.config._attn_implementation after loading, or hands over a config object
# on which it has been set.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cat >"$place/attention.py" <<'PY'
import json
import pathlib
import sys

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

place = pathlib.Path(sys.argv[1])
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=4, **shape)).save_pretrained(place)
saved = json.loads((place / "config.json").read_text())
ran = {}
for entry in ("nothing", "attn_implementation", "_attn_implementation"):
    wanted = {} if entry == "nothing" else {entry: "eager"}
    (place / "config.json").write_text(json.dumps(saved | wanted))
    ran[entry] = AutoModelForCausalLM.from_pretrained(place, attn_implementation="sdpa").config._attn_implementation
print(ran)
sys.exit(0 if ran == {"nothing": "sdpa", "attn_implementation": "sdpa", "_attn_implementation": "eager"} else 1)
PY
"$place/venv/bin/python" "$place/attention.py" "$place/model" && echo "as stated" || { echo "no longer as stated" >&2; exit 1; }
