"""Text sources: files, JSON lines and hub datasets."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from featstore.errors import CorpusError, SpecError
from featstore.text.conversation import parse_conversation
from featstore.text.documents import documents
from featstore.text.sources import Source, iter_texts, join_wikitext, parse_source, shuffled


class TestSource:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (
                "wikitext-103-raw-v1",
                Source("wikitext", "Salesforce/wikitext", "wikitext-103-raw-v1"),
            ),
            (
                "wikitext-2-raw-v1",
                Source("wikitext", "Salesforce/wikitext", "wikitext-2-raw-v1"),
            ),
            ("text:a/*.txt", Source("text", "a/*.txt")),
            ("text:C:odd", Source("text", "C:odd")),
            ("jsonl:x.jsonl", Source("jsonl", "x.jsonl")),
            ("hf:stas/openwebtext-10k", Source("hf", "stas/openwebtext-10k")),
            ("hf:imdb:test", Source("hf", "imdb", split="test")),
            ("hf:o/r/cfg:validation", Source("hf", "o/r", "cfg", "validation")),
            ("hf:o/r:", Source("hf", "o/r")),
        ],
    )
    def test_forms(self, text, expected):
        assert parse_source(text) == expected

    @pytest.mark.parametrize(
        "text", ["", "text:", "jsonl:", "hf:", "hf:a/b/c/d", "hf:a//c", "csv:x", "wikipedia", ":x"]
    )
    def test_anything_else_is_quoted(self, text):
        with pytest.raises(SpecError, match=f"dataset {text!r}: write wikitext"):
            parse_source(text)

    def test_what_is_recorded_leaves_out_what_is_not_given(self):
        assert parse_source("jsonl:x", "body").to_dict() == {
            "kind": "jsonl",
            "location": "x",
            "split": "train",
            "field": "body",
        }

    @given(st.text())
    def test_any_text_is_parsed_or_refused_with_our_error(self, text):
        with contextlib.suppress(SpecError):
            assert parse_source(text).location


class TestTextFiles:
    def test_a_glob_reads_a_document_a_file_in_sorted_order(self, tmp_path):
        (tmp_path / "sub").mkdir()
        for name, text in {"b.txt": "B", "a.txt": "Ä", "sub/c.txt": "C", "d.md": "D"}.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / "z.txt").mkdir()
        assert list(iter_texts(parse_source(f"text:{tmp_path}/*.txt"))) == ["Ä", "B"]
        assert list(iter_texts(parse_source(f"text:{tmp_path}/**/*.txt"))) == ["Ä", "B", "C"]
        assert list(iter_texts(parse_source(f"text:{tmp_path}/d.md"))) == ["D"]

    def test_no_match_is_quoted(self, tmp_path):
        with pytest.raises(CorpusError, match=r"no file matches '.*nothing\*'"):
            list(iter_texts(parse_source(f"text:{tmp_path}/nothing*")))

    def test_a_file_that_is_not_utf8_is_named_with_the_byte(self, tmp_path):
        path = tmp_path / "latin.txt"
        path.write_bytes("caf\xe9".encode("latin-1"))
        with pytest.raises(CorpusError, match=r"latin\.txt is not UTF-8 .* at byte 3"):
            list(iter_texts(parse_source(f"text:{path}")))

    @given(raw=st.text(st.sampled_from("a\r\n\ufeffé東 ") | st.characters(codec="utf-8")).map(str.encode))
    @example(raw=b"one\r\ntwo\rthree\n\r\n")
    def test_a_file_is_read_as_its_bytes_are(self, tmp_path_factory, raw):
        path = tmp_path_factory.mktemp("bytes") / "x.txt"
        path.write_bytes(raw)
        assert next(iter_texts(parse_source(f"text:{path}"))).encode() == raw

    def test_files_and_lines_of_the_same_text_are_the_same_documents(self, tmp_path):
        texts = [f"Line one of {i}.\r\nLine two\rand three.\r\n" for i in range(3)]
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_bytes(text.encode())
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        files, lines = (
            list(documents(iter_texts(parse_source(f"{q}"))))
            for q in (f"text:{tmp_path}/*.txt", f"jsonl:{tmp_path}/x.jsonl")
        )
        assert files == lines
        assert [document.id for document in files] == [hashlib.sha256(text.encode()).digest() for text in texts]


class TestBrackets:
    @pytest.fixture
    def place(self, tmp_path, monkeypatch):
        for name in (
            "run[1]/a.txt",
            "run[1]/b[2].txt",
            "run[1]/sub/c.txt",
            "run1/d.txt",
            "b2.txt",
            "*.txt",
            "x[/e.txt",
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("location", "files"),
        [
            ("run[1]/a.txt", ["run[1]/a.txt"]),
            ("run[1]/b[2].txt", ["run[1]/b[2].txt"]),  # a file that exists is that file
            ("*.txt", ["*.txt"]),
            ("[*]*.txt", ["*.txt"]),
            ("b[2].txt", ["b2.txt"]),  # none of that name: a pattern
            ("run[1]/*.txt", ["run[1]/a.txt", "run[1]/b[2].txt"]),
            ("./run[1]/*.txt", ["run[1]/a.txt", "run[1]/b[2].txt"]),
            ("run[1]//*.txt", ["run[1]/a.txt", "run[1]/b[2].txt"]),
            ("run[1]/**/*.txt", ["run[1]/a.txt", "run[1]/b[2].txt", "run[1]/sub/c.txt"]),
            ("run[1]/s[tu]b/*.txt", ["run[1]/sub/c.txt"]),
            ("run[12]/*.txt", ["run1/d.txt"]),  # no directory of that name
            ("x[/*.txt", ["x[/e.txt"]),
        ],
    )
    def test_what_exists_under_the_name_comes_before_what_it_matches(self, place, location, files):
        assert list(iter_texts(parse_source(f"text:{location}"))) == files
        if not location.startswith("."):
            assert list(iter_texts(parse_source(f"text:{place}/{location}"))) == files

    @pytest.mark.parametrize("location", ["run[1]", "run[1]/"])
    def test_a_directory_is_said_to_be_one(self, place, location):
        with pytest.raises(CorpusError, match=r"'.*run\[1\]/?' is a directory; name its files"):
            list(iter_texts(parse_source(f"text:{location}")))

    @pytest.mark.parametrize("location", ["run[1]/*.md", "run[1]/c.txt/d", "q" * 300 + "[1]", "\0"])
    def test_what_is_no_file_is_said(self, place, location):
        with pytest.raises(CorpusError, match="no file matches"):
            list(iter_texts(parse_source(f"text:{location}")))


class TestJsonLines:
    LINES = ('{"text": "one", "body": "eins"}', "", "  ", '{"body": "zwei", "text": "two\\n東"}')

    def test_a_lone_surrogate_is_named_with_its_line(self, tmp_path):
        path = tmp_path / "x.jsonl"
        path.write_text('{"text": "one"}\n{"text": "tw\\ud800o"}\n')
        with pytest.raises(CorpusError, match=r"x\.jsonl, line 2: field 'text' holds a lone surrogate"):
            list(iter_texts(parse_source(f"jsonl:{path}")))

    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
    def test_a_line_a_document_blank_lines_skipped(self, tmp_path, suffix):
        path = tmp_path / f"x{suffix}"
        data = "\n".join(self.LINES).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
        assert list(iter_texts(parse_source(f"jsonl:{path}"))) == ["one", "two\n東"]
        assert list(iter_texts(parse_source(f"jsonl:{path}", "body"))) == ["eins", "zwei"]

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (b'{"text": "cut', "line 2: not a JSON object"),
            (b'{"text": "\xff"}', "line 2: not a JSON object"),
            (b"9" * 5000, "line 2: not a JSON object"),
            (b"[" * 100_000, "line 2: not a JSON object"),
            (b'{"txt": "x"}', "line 2: no field 'text'; name the right one with --text-field"),
            (b'["x"]', "line 2: no field 'text'"),
            (b'"x"', "line 2: no field 'text'"),
            (b"null", "line 2: no field 'text'"),
            (b'{"text": 3}', "line 2: field 'text' is int, not text"),
            (b'{"text": null}', "line 2: field 'text' is NoneType, not text"),
        ],
    )
    def test_a_bad_line_is_named_with_its_number(self, tmp_path, bad, message):
        path = tmp_path / "x.jsonl"
        path.write_bytes(b'{"text": "fine"}\n' + bad + b"\n")
        texts = iter_texts(parse_source(f"jsonl:{path}"))
        assert next(texts) == "fine"
        with pytest.raises(CorpusError, match=message):
            next(texts)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(CorpusError, match=r"no file '.*none\.jsonl'"):
            list(iter_texts(parse_source(f"jsonl:{tmp_path}/none.jsonl")))

    def test_a_damaged_gzip_file_is_named(self, tmp_path):
        whole = gzip.compress("".join(json.dumps({"text": str(i) * 50}) + "\n" for i in range(500)).encode())
        middle = len(whole) // 2
        broken = {
            "cut": whole[:middle],
            "no-gzip": b"plain text",
            "flipped": whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :],
        }
        for name, data in broken.items():
            path = tmp_path / f"{name}.jsonl.gz"
            path.write_bytes(data)
            with pytest.raises(CorpusError, match=f"{name}.jsonl.gz"):
                list(iter_texts(parse_source(f"jsonl:{path}")))


WIKITEXT = [
    "",
    " = Robert Boulter = \n",
    "",
    " Robert Boulter is an English actor . \n",
    "",
    " = = Career = = \n",
    "",
    " = = = 2000 – 2005 = = = \n",
    "",
    " Here E = m c stands = alone = \n",
    " = x = \n",
    "",
    " = 2 + 2 = 4 = \n",
    "",
    " The second article . \n",
]


class TestWikitext:
    def test_lines_are_joined_at_level_1_headings_only(self):
        first, second = join_wikitext(WIKITEXT)
        assert first.startswith("\n = Robert Boulter = \n\n Robert Boulter is")
        assert " = = Career = = \n" in first
        assert " = = = 2000 – 2005 = = = \n" in first
        assert second == " = 2 + 2 = 4 = \n\n The second article . \n"

    def test_a_heading_inside_a_paragraph_does_not_split(self):
        assert " alone = \n = x = \n" in next(join_wikitext(WIKITEXT))

    def test_text_before_the_first_heading_is_an_article(self):
        assert len(list(join_wikitext([" Loose text . \n", "", *WIKITEXT]))) == 3

    def test_nothing_gives_nothing(self):
        assert list(join_wikitext(["", "\n", " \n"])) == []

    @given(st.lists(st.sampled_from([*WIKITEXT, " = = Sub = = \n", "text\n"]), max_size=40))
    def test_no_line_is_lost(self, lines):
        joined = "".join(join_wikitext(lines))
        assert joined.split() == " ".join(lines).split()


class TestHub:
    """`datasets` itself is third-party and its data is remote: a local stand-in answers for it, except offline."""

    @pytest.fixture
    def asked(self, monkeypatch):
        import datasets

        calls: list[tuple[object, ...]] = []
        rows: list[dict[str, object]] = [{"text": line, "n": 1} for line in WIKITEXT]

        def load_dataset(path, name=None, *, split, streaming):
            calls.append((path, name, split, streaming))
            return iter(rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls, rows

    def test_wikitext_is_streamed_and_joined(self, asked):
        texts = list(iter_texts(parse_source("wikitext-103-raw-v1")))
        assert asked[0] == [("Salesforce/wikitext", "wikitext-103-raw-v1", "train", True)]
        assert texts == list(join_wikitext(WIKITEXT))

    def test_other_datasets_give_a_document_a_row(self, asked):
        texts = list(iter_texts(parse_source("hf:o/r/c:test")))
        assert asked[0] == [("o/r", "c", "test", True)]
        assert texts == WIKITEXT

    @pytest.mark.parametrize("row", [{"body": "x"}, {"text": None}, {"text": 5}])
    def test_a_row_without_text_is_explained(self, asked, row):
        asked[1][3] = row
        with pytest.raises(CorpusError, match=r"'o/r' has no text in field 'text'.*its fields are .*--text-field"):
            list(iter_texts(parse_source("hf:o/r")))

    def test_rows_with_messages_are_conversations(self, asked):
        del asked[1][:]
        # As tables give them: every member is there, without a value where a message has none.
        asked[1].append({"messages": [{"role": "user", "content": "a", "tool_calls": None}], "tools": None})
        [said] = iter_texts(parse_source("hf:o/r"))
        assert said == parse_conversation({"messages": [{"role": "user", "content": "a"}]}, "")
        assert said.where == "dataset 'o/r', row 1"
        asked[1].append({"messages": [{"role": "x", "content": "a"}]})
        with pytest.raises(CorpusError, match=r"^dataset 'o/r', row 2, message 1: unknown role 'x'"):
            list(iter_texts(parse_source("hf:o/r")))
        asked[1][1] = {"text": "plain"}
        with pytest.raises(CorpusError, match=r"^dataset 'o/r', row 2: text, where dataset 'o/r', row 1 holds mes"):
            list(iter_texts(parse_source("hf:o/r")))

    def test_reading_is_lazy(self, monkeypatch):
        import datasets

        def endless(*_, **__):
            return ({"text": str(i)} for i in iter(int, 1))

        monkeypatch.setattr(datasets, "load_dataset", endless)
        assert len(list(documents(iter_texts(parse_source("hf:o/r")), max_documents=5))) == 5

    def test_offline_the_error_says_what_to_do(self):
        code = (
            "from featstore.text.sources import iter_texts, parse_source\n"
            "from featstore.errors import CorpusError\n"
            "try:\n    next(iter_texts(parse_source('hf:nobody/nothing:train')))\n"
            "except CorpusError as error:\n    print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("dataset 'nobody/nothing' (config None, split 'train') cannot be read: ")
        assert "--dataset text:PATH" in done.stdout


class TestShuffled:
    def test_seed_0_keeps_the_order(self):
        assert list(shuffled("abc", 0)) == ["a", "b", "c"]

    @given(st.lists(st.text(max_size=3), max_size=50), st.integers(1, 5), st.integers(1, 60))
    def test_it_is_a_permutation_fixed_by_the_seed(self, texts, seed, buffer):
        once = list(shuffled(texts, seed, buffer))
        assert sorted(once) == sorted(texts)
        assert once == list(shuffled(iter(texts), seed, buffer))

    def test_seeds_differ_and_mix(self):
        texts = [str(i) for i in range(200)]
        orders = [list(shuffled(texts, seed)) for seed in (0, 1, 2)]
        assert orders[0] != orders[1] != orders[2]
        assert len(set(orders[1][:20]) & set(texts[:20])) < 12

    def test_memory_is_bounded_by_the_buffer(self):
        taken = 0

        def texts():
            nonlocal taken
            for i in range(1000):
                taken += 1
                yield str(i)

        next(shuffled(texts(), 1, buffer=10))
        assert taken <= 12
