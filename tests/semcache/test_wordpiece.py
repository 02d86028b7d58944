from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.semcache.wordpiece import VOCABULARY, WordPiece
from tests.conftest import examples

CLS, SEP, UNK = 101, 102, 100
BERT = WordPiece(VOCABULARY)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # What the package tokenizers 0.23.3 gives for them.
        ("", []),
        ("How do I reset my password?", [2129, 2079, 1045, 25141, 2026, 20786, 1029]),
        ("Crème BRÛLÉE, naïve ÅNGSTRÖM", [13675, 21382, 7987, 9307, 2063, 1010, 15743, 17076, 15687]),
        ("don't: $5 <3 `x^2`|~", [2123, 1005, 1056, 1024, 1002, 1019, 1026, 1017, 1036, 1060, 1034, 1016, 1036, 1064, 1066]),
        ("東京 tower へ行く", [1879, 1755, 3578, 1675, 1945, 1653]),
        ("İstanbul ΣΊΣΥΦΟΣ Straße", [9960, 1173, 18199, 29733, 29735, 29736, 29730, 29733, 2358, 27807]),
        ("zero\u200bwidth\xadhyphen\0nul", [5717, 9148, 11927, 23644, 22571, 10222, 11231, 2140]),
        ("a\xa0b\u2003c\u2028d\te\r\nf", [1037, 1038, 1039, 1040, 1041, 1042]),
        ("[CLS] is [SEP] text", [1031, 18856, 2015, 1033, 2003, 1031, 19802, 1033, 3793]),
        ("🙂 smile 👩\u200d👧 family", [UNK, 2868, UNK, 2155]),
        ("Ё ѐ é e\u0301 각", [1185, 1185, 1041, 1041, 1455, 30006, 30020]),
        ("½ ① ™ ﬁ", [1092, UNK, 1580, 1984]),
        ("x" * 101, [UNK]),
    ],
)  # fmt: skip
def test_a_text_becomes_the_numbers_that_the_model_was_trained_on(text: str, ids: list[int]) -> None:
    assert BERT.encode(text) == [CLS, *ids, SEP]


@examples(50)
@given(st.text() | st.text("aé中 .\u0301\0[]", max_size=400), st.integers(2, 300))
def test_any_text_is_encoded_and_a_long_one_gives_its_beginning(text: str, most: int) -> None:
    ids, whole = BERT.encode(text, most), BERT.encode(text, 10_000)
    assert ids == [*whole[: min(most, len(whole)) - 1], SEP]
    assert whole[0] == CLS


@pytest.mark.parametrize(
    "text", ["word " * 250_000, "a" * 1_000_000, "中" * 1_000_000, " " * 1_000_000 + "word " * 300]
)
def test_a_megabyte_is_not_read_to_its_end(text: str) -> None:
    assert BERT.encode(text) == BERT.encode(text.lstrip()[:9000])


def test_a_vocabulary_without_the_special_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[CLS]\nword\n")
    with pytest.raises(ValueError, match=r"it has no \[SEP\] or \[UNK\]"):
        WordPiece(tmp_path / "vocab.txt")
