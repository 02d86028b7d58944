"""Text to the numbers that a BERT model reads: the uncased WordPiece tokenizer.

Steps and order are those of `BertNormalizer` and `BertPreTokenizer` of https://github.com/huggingface/tokenizers with
lower-casing, which sentence-transformers models of this vocabulary were trained behind: clean, set ideographs apart,
decompose and drop accents, lower-case each character by itself, split at white space and punctuation, then the longest
pieces that the vocabulary has, from the left. The names of special tokens in a text (`[SEP]`) are text.

vocab.txt is the vocabulary of bert-base-uncased (https://huggingface.co/google-bert/bert-base-uncased), 30,522 tokens,
one a line, SHA-256 07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3. Copyright The Google AI Language
Team Authors and The HuggingFace Inc. team; licensed under the Apache License 2.0
(https://www.apache.org/licenses/LICENSE-2.0), shipped unchanged.

Nothing here blocks or has state beyond small memories of characters; any thread may use it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

VOCABULARY = Path(__file__).with_name("vocab.txt")

# An English token has about four characters: a text this long fills 256 tokens eight times over.
_MAX_CHARACTERS = 8192
_MAX_WORD_CHARACTERS = 100

_MAX_REMEMBERED = 4096

# What is set apart, character by character: CJK ideographs, but not kana or Hangul, which have words.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def _cleaned(code: int) -> str:
    """What becomes of a character before its accents are looked at."""
    character = chr(code)
    if character in "\t\n\r":
        return " "
    category = unicodedata.category(character)
    if category in ("Cc", "Cf", "Co", "Cs") or code == 0xFFFD:
        return ""
    if character.isspace():
        return " "
    return f" {character} " if any(first <= code <= last for first, last in _IDEOGRAPHS) else character


def _folded(code: int) -> str:
    """What becomes of a character of a decomposed text."""
    character = chr(code)
    category = unicodedata.category(character)
    if category == "Mn":
        return ""
    # Of ASCII, BERT takes all for punctuation that is neither letter nor digit: "$+<=>^`|~" too.
    if category.startswith("P") or (0x21 <= code < 0x7F and not character.isalnum()):
        return f" {character} "
    return character.lower()


class _Table(dict[int, str]):
    """For `str.translate`: what becomes of a character, found out when it is met and remembered for a while."""

    def __init__(self, find: Callable[[int], str]) -> None:
        self._find = find

    def __missing__(self, code: int) -> str:
        if len(self) >= _MAX_REMEMBERED:
            self.clear()
        found = self[code] = self._find(code)
        return found


_CLEANED = _Table(_cleaned)
_FOLDED = _Table(_folded)


class WordPiece:
    """A vocabulary, ready to encode texts. ValueError when the file has not the special tokens of BERT.

    The file holds one token a line; its number is the line's, from 0. OSError when it cannot be read. Takes about 20 ms.
    """

    def __init__(self, path: Path) -> None:
        tokens = path.read_text("utf-8").split("\n")
        self._ids = {token: number for number, token in enumerate(tokens) if token}
        missing = {"[CLS]", "[SEP]", "[UNK]"} - self._ids.keys()
        if missing:
            raise ValueError(
                f"{path} is not the vocabulary of an uncased BERT: it has no {' or '.join(sorted(missing))}"
            )
        self._first, self._last, self._unknown = (self._ids[name] for name in ("[CLS]", "[SEP]", "[UNK]"))

    def encode(self, text: str, max_tokens: int = 256) -> list[int]:
        """The tokens' numbers, from `[CLS]` to `[SEP]`: at most `max_tokens`, the beginning of a text that has more.

        Of a longer text only the first 8,192 characters are looked at, which bounds the time to some 3 ms.
        """
        ids = [self._first]
        for word in _words(text.lstrip()[:_MAX_CHARACTERS]):
            if len(ids) >= max_tokens - 1:
                break
            ids += self._pieces(word)
        return [*ids[: max_tokens - 1], self._last]

    def _pieces(self, word: str) -> list[int]:
        whole = self._ids.get(word)
        if whole is not None:
            return [whole]
        if len(word) > _MAX_WORD_CHARACTERS:
            return [self._unknown]
        pieces = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = self._ids.get(f"##{word[start:end]}" if start else word[:end])
                if piece is not None:
                    pieces.append(piece)
                    start = end
                    break
            else:
                return [self._unknown]
        return pieces


def _words(text: str) -> list[str]:
    """Words and single signs of punctuation, in lower case and without accents."""
    return unicodedata.normalize("NFD", text.translate(_CLEANED)).translate(_FOLDED).split()
