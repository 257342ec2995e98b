#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3: some classes take only the vocabulary of a tokenizer.json.
#
# A tokenizer.json whose normalizer puts "▁" before every text, as those of Llama 2 do, and one whose pre-tokenizer cuts
# off single digits, as those of many byte-level models do; tokenizer_config.json names LlamaTokenizer, and
# GPT2Tokenizer. The class builds normalizer and pre-tokenizer of its own and passes over those of the file.
#
# Seen: " a" is ▁ ▁a by the file and ▁a by LlamaTokenizer; "12" is 1 2 by the file and 12 by GPT2Tokenizer.
# Whoever needs the ids that the file means sets its normalizer and pre-tokenizer on the loaded tokenizer.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
cat >"$place/ids.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer

place = Path(sys.argv[1])
llama = Tokenizer(models.BPE(vocab={"<unk>": 0, "▁": 1, "a": 2, "▁a": 3}, merges=[("▁", "a")], unk_token="<unk>"))
llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
gpt2 = Tokenizer(models.BPE(vocab={"1": 0, "2": 1, "12": 2}, merges=[("1", "2")]))
gpt2.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
found = []
for kind, named, tokenizer, text in (("llama", "LlamaTokenizer", llama, " a"), ("gpt2", "GPT2Tokenizer", gpt2, "12")):
    folder = place / kind
    AutoConfig.for_model(kind).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    loaded = AutoTokenizer.from_pretrained(folder)
    found += [tokenizer.encode(text).tokens, loaded.tokenize(text)]
    print(f"{named:15} {text!r}: file {found[-2]}, loaded {found[-1]}")
sys.exit(0 if found == [["▁", "▁a"], ["▁a"], ["1", "2"], ["12"]] else 1)
PY
HF_HUB_OFFLINE=1 "$place/venv/bin/python" "$place/ids.py" "$place" && echo "as stated" ||
    { echo "no longer as stated" >&2; exit 1; }
