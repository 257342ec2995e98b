"""Documents to windows, and where a text may be cut."""

from __future__ import annotations

import re
import unicodedata
from itertools import accumulate, pairwise

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from featstore.errors import SpecError
from featstore.text.windows import space_cut, windows

#: What makes or breaks grapheme clusters: marks, joiners, flags, jamo, conjuncts, what joins to the next character.
PIECES = [
    "a", "Z", "b c", " ", "\n", "\r", "\r\n", "\n\n", "\t", "\u00a0", "\u3000", "\u2028", "\u2029", "\u200b", ".", "! ",
    '." ', "。", "」", "।", "é", "e\u0301", "\u0301", "\u0301\u0323", "東京", "한", "\u1112\u1161\u11ab", "\u1112",
    "🙂", "👩\u200d👧", "\u200d", "👍🏽", "🇩🇪", "🇩", "क्षि", "\u094d", "ကမ္ဘာ", "กำ", "\u0600",
    "\u0d4e", "\ufe0f", "\u0085",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=60).map("".join) | st.text(st.characters(codec="utf-8"), max_size=60)


def cut(text: str, size: int) -> list[str]:
    raw = text.encode()
    return [raw[start:end].decode() for start, end in windows(raw, size)]


class TestAnyText:
    @given(TEXTS, st.integers(4, 40))
    def test_windows_tile_the_document_in_whole_characters(self, text, size):
        raw = text.encode()
        ranges = windows(raw, size)
        assert [start for start, _ in ranges] == [0, *(end for _, end in ranges)][: len(ranges)]
        assert b"".join(raw[start:end] for start, end in ranges) == raw
        for start, end in ranges:
            assert 0 < end - start <= size
            raw[start:end].decode()

    @given(TEXTS, st.integers(4, 40))
    @example("\u0600🇩🇪🇩🇪🇩🇪", 8)  # a cluster longer than a window before flags: which halves belong together?
    @example("e" + "\u0301" * 40 + "👩\u200d👧", 16)
    @example("\u0600" + "\u3000" * 9, 4)
    def test_no_cluster_is_cut_unless_it_is_longer_than_a_window(self, text, size):
        """Against the clusters of the whole text."""
        clusters = [len(cluster.encode()) for cluster in regex.findall(r"\X", text)]
        ends = [0, *accumulate(clusters)]
        for _, end in windows(text.encode(), size):
            inside = [length for length, after in zip(clusters, ends[1:], strict=True) if after - length < end < after]
            assert all(length > size for length in inside), (inside, end)

    @given(TEXTS, st.integers(4, 40))
    def test_a_line_end_is_never_cut(self, text, size):
        pieces = cut(text, size)
        assert not any(a.endswith("\r") and b.startswith("\n") for a, b in pairwise(pieces))

    @given(
        st.lists(st.sampled_from(["ab", "A", " ", "\n", ".", ". ", "x" * 9]), max_size=60).map("".join),
        st.integers(4, 40),
    )
    def test_a_cut_is_the_best_one_of_a_plain_search(self, text, size):
        """Every place of a short alphabet judged on its own, without a pattern that runs backwards."""
        pieces = cut(text, size)
        for at, piece in zip(accumulate(map(len, pieces)), pieces[:-1], strict=False):
            start = at - len(piece)
            limit = start + size
            near = max(limit - size // 4, start + 1)
            places = range(start + 1, limit + 1)
            blank = {m for m in self.blank_lines(text, start, limit) if m in places}
            sentence = {p for p in places if text[p - 1] == "." and re.match(r"\s(?!\s*[a-z])", text[p:])}
            space = {p for p in places if text[p].isspace()}
            wanted = next((max(k) for k in (blank, sentence, space) if k and max(k) >= near), None)
            assert at == (wanted or max(blank | sentence | space, default=limit))

    @staticmethod
    def blank_lines(text: str, start: int, limit: int) -> set[int]:
        found = [(m.start() + start, m.end() + start) for m in re.finditer(r"\n(?: *\n)+", text[start:])]
        return {end if end <= limit else before for before, end in found}

    def test_no_document_no_window(self):
        assert windows(b"", 8) == []

    def test_too_small_a_window_is_refused(self):
        with pytest.raises(SpecError, match="window of 3 bytes: at least 4"):
            windows(b"text", 3)


class TestBlankLines:
    @pytest.mark.parametrize("blank", ["\n\n", "\r\n\r\n", "\n\n\n", "\n \t\n", "\r\r", "\u2029", "\n\u3000\n"])
    def test_one_near_the_end_closes_its_window(self, blank):
        text = f"A paragraph of words.{blank}  Next. One two three"
        size = len(f"A paragraph of words.{blank}  Next.".encode())
        assert cut(text, size) == [f"A paragraph of words.{blank}", "  Next. One two three"]

    @pytest.mark.parametrize(("run", "fits"), [("\n\n\n", 1), ("\n\n\n", 2), ("\r\n\r\n", 3), ("\r\n\r\n", 1)])
    def test_one_that_does_not_fit_opens_the_next_window(self, run, fits):
        text = f"Some words stand here{run}and then there are others."
        size = len("Some words stand here") + fits
        assert cut(text, size)[0] == "Some words stand here"

    def test_a_single_line_end_is_no_blank_line(self):
        assert cut("A sentence ends. One line\r\nand two more", 28)[0] == "A sentence ends. One line"

    @pytest.mark.parametrize(("place", "taken"), [(15, True), (16, True), (14, False), (13, False)])
    def test_the_last_quarter_is_what_counts_as_near(self, place, taken):
        first = cut("x" * (place - 2) + "\n\n" + "a b c d e f g h", 20)[0]
        assert first.endswith("\n\n") == taken
        assert len(first) == place if taken else len(first) > 18

    def test_one_far_from_the_end_does_not_shorten_the_window(self):
        assert cut("One\n\ntwo three four five six seven", 24)[0] == "One\n\ntwo three four five"


class TestSentences:
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("He came home at last.", " Then he"),
            ("He asked, “Did you?”", " Then he"),
            ('She said "stop!!"', " Then he"),
            ("(That was all.)", "\nThen it"),
            ("Und so weiter…", " Danach"),
            ("Er fragte: „Warum?“", " Danach"),
            ("Он пришёл домой.", " Потом он"),
            ("世界人权宣言在这里。", "人人生而自由"),
            ("他说:「你好吗?真的！」", "然后走了"),
            ("他走了。", "“人人生而自由”"),
            ("世界人权宣言。", "\u3000人人生而自由"),
            ("すべての人間は自由である。", "かつ平等"),
            ("सभी मनुष्य स्वतन्त्र हैं।", " उन्हें बुद्धि"),
            ("सभी मनुष्य स्वतन्त्र हैं॥", "उन्हेंबुद्धि"),
            ("هل جاء أحمد إلى البيت؟", " نعم جاء"),
            ("تمام انسان آزاد ہیں۔", " انہیں ضمیر"),
            ("လူတိုင်းသည် လွတ်လပ်သည်။", "ထိုသူတို့"),
            ("མི་རེ་རེར་རང་དབང་ཡོད།", "འདྲ་མཉམ"),
            ("មនុស្សទាំងអស់មានសេរីភាព។", "មនុស្ស"),
            ("የሰው ልጅ ሁሉ ነጻ ነው።", " ክብርና"),
            ("Բոլոր մարդիկ ազատ են։", " Նրանք"),
        ],
    )
    def test_a_window_ends_after_one_in_any_script(self, first, second):
        text = unicodedata.normalize("NFC", first + second)
        size = len((unicodedata.normalize("NFC", first) + second[:3]).encode())
        assert cut(text, size)[0] == unicodedata.normalize("NFC", first)

    @pytest.mark.parametrize(
        "text",
        ["It costs 3.14159 in all", "see www.example.org now", "some e.g. three of it", "値は３．１４１５９で、す"],
    )
    def test_a_point_that_ends_none_is_no_better_than_a_space(self, text):
        first = cut(text, len(text.encode()) - 1)[0]
        assert not first.endswith((".", "．"))

    def test_a_mark_upon_the_sentence_end_stays_with_it(self):
        text = "सभी हैं।\u0301उन्हें"
        assert cut(text, len("सभी हैं।\u0301".encode()))[0] == "सभी"
        assert cut("aaaa ‼\ufe0faaaa", 12)[0] == "aaaa"

    def test_what_follows_the_window_decides(self):
        """The window ends right after the mark, and the next character lies beyond it."""
        assert cut("One two. Three four", 8) == ["One two.", " Three", " four"]
        assert cut("One two.Three four", 8)[0] == "One"
        assert cut("他走了。」然后他又回来了", 15)[0] == "他走了。」"
        assert cut("人 他走了。」然后他又回来了", 16)[0] == "人"


class TestSpaces:
    def test_whitespace_opens_the_next_window(self):
        assert cut("one two three", 8) == ["one two", " three"]
        assert cut("one two three", 7) == ["one two", " three"]
        assert cut("one two three", 6) == ["one", " two", " three"]

    @pytest.mark.parametrize(
        "space", [" ", "\t", "\u3000", "\u2028", "\u2003", "\u1680", "\u200b", "\u0085", "\n", "\r\n"]
    )
    def test_any_unicode_space_will_do(self, space):
        assert cut(f"人人生而{space}自由在尊嚴", 24)[0] == "人人生而"

    def test_a_space_that_forbids_a_break_comes_after_those_that_do_not(self):
        assert cut("wide 5\u00a0km", 9)[0] == "wide"
        assert cut("unbroken5\u00a0km", 12)[0] == "unbroken5"
        assert cut("aaa bbbbbbbb\u202fc", 13)[0] == "aaa"

    def test_a_space_far_from_the_end_is_better_than_the_middle_of_a_word(self):
        assert cut("a pneumonoultramicroscopic", 20)[0] == "a"

    def test_a_space_that_a_mark_before_it_holds_is_no_place(self):
        """U+0600 is drawn over what follows it: they are one cluster."""
        assert cut("ab cd\u0600 efgh", 9)[0] == "ab"


class TestClusters:
    def test_thai_is_cut_before_a_consonant_and_never_before_a_mark(self):
        text = "ทุกคนเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์"
        for size in range(9, 60):
            assert not any(unicodedata.combining(piece[0]) or piece[0] == "\u0e33" for piece in cut(text, size))

    def test_a_longer_cluster_than_a_window_is_cut_between_characters(self):
        assert cut("e" + "\u0301" * 6, 4) == ["e\u0301", "\u0301\u0301", "\u0301\u0301", "\u0301"]

    def test_what_follows_such_a_cluster_is_whole(self):
        assert cut("\u0600🇩🇪🇫🇷🇬🇧", 8) == ["\u0600🇩", "🇪", "🇫🇷", "🇬🇧"]


class TestShortened:
    @pytest.mark.parametrize(
        ("text", "limit", "kept"),
        [
            ("one two three", 8, "one two"),
            ("one two. Three four five", 20, "one two. Three four"),  # the last whitespace, whatever else there is
            ("one\n\ntwo three", 5, "one\n"),
            ("one\r\ntwo", 4, "one"),
            ("人人生而\u3000自由", 20, "人人生而"),
            ("人人生而自由", 10, "人人生"),
            ("cafe\u0301e", 5, "caf"),
            ("e\u0301\u0301\u0301", 4, "e\u0301"),
        ],
    )
    def test_a_text_is_cut_before_its_last_whitespace(self, text, limit, kept):
        raw = text.encode()
        assert raw[: space_cut(raw, limit)].decode() == kept
