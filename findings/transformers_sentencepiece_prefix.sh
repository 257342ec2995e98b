#!/usr/bin/env bash
# transformers 5.23.0, sentencepiece 0.2.3: a folder with tokenizer.model alone is not read as SentencePiece reads it.
#
# Mistral's tokenizer v3 beside the configurations of three types of model. Its normalizer_spec says add_dummy_prefix:
# SentencePiece puts a space before every text, also before one that begins with a space. Beside `mistral` and `gemma`
# the automatic loader puts none; beside `llama`, with LlamaTokenizer named, it puts one unless the text has its own.
#
# Seen: "The" is ▁The for SentencePiece and The for transformers beside mistral and gemma; " The" is ▁ ▁The for
# SentencePiece and ▁The everywhere in transformers.
# Whoever has a tokenizer.model alone compares ids with SentencePiece before they believe a state.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 \
    sentencepiece==0.2.3 protobuf==7.36.2
"$place/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$place" mistral-common==1.13.1
cat >"$place/ids.py" <<'PY'
import json
import sys
import zipfile
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoTokenizer

place = Path(sys.argv[1])
[wheel] = place.glob("mistral_common*.whl")
pieces = zipfile.ZipFile(wheel).read("mistral_common/data/mistral_instruct_tokenizer_240323.model.v3")
truth = SentencePieceProcessor(model_proto=pieces)
found = {"sentencepiece": [truth.encode(text, out_type=str) for text in ("The", " The")]}
for kind, named in (("mistral", None), ("gemma", None), ("llama", "LlamaTokenizer")):
    folder = place / kind
    AutoConfig.for_model(kind).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(pieces)
    if named:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found[kind] = [tokenizer.tokenize(text) for text in ("The", " The")]
for kind, read in found.items():
    print(f"{kind:14} {read}")
bare = [["The"], ["▁The"]]
wanted = {
    "sentencepiece": [["▁The"], ["▁", "▁The"]],
    "mistral": bare,
    "gemma": bare,
    "llama": [["▁The"], ["▁The"]],
}
sys.exit(0 if found == wanted else 1)
PY
HF_HUB_OFFLINE=1 "$place/venv/bin/python" "$place/ids.py" "$place" && echo "as stated" ||
    { echo "no longer as stated" >&2; exit 1; }
