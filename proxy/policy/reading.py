"""A question, read: its words, numbers, names and literals, and what kind of question it is.

`read` takes a text apart once, in one pass over its pieces between white space; nothing here backtracks, so the time is
linear in the length. The guard compares two readings and never looks at the texts again.

A piece is a *word* (letters), a *number* (digits, written-out and Roman numbers, ordinals, with units beside them), or a
*literal* (anything with the look of code, a path, an address: compared character by character). Words that carry meaning
are kept in order as *content*: stems, with spellings and safe synonyms made one (see lexicon.py).
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from proxy.policy.kinds import opening
from proxy.policy.lexicon import (
    CONTRACTIONS,
    ENDINGS,
    ENGLISH_FUNCTION,
    FILLER,
    FOREIGN_FUNCTION,
    FUNCTION,
    NEGATIONS,
    NUMBER_WORDS,
    SYNONYMS,
    UNITS,
)
from proxy.policy.stems import stem

MAX_PIECE_CHARS = 64
"""A longer piece is no word: it is kept whole, as a literal."""


class Reading(NamedTuple):
    """What `read` found. Tuples keep the order of the text."""

    plain: tuple[str, ...]
    """The pieces in lower case, without the punctuation around them."""
    words: tuple[str, ...]
    """Words in lower case, contractions written out; numbers and literals are not among them."""
    content: tuple[str, ...]
    """Stems of the words that carry meaning, fillers included."""
    fillers: frozenset[str]
    """Those of `content` that a rewording may add or leave out, and those that belong to the opening."""
    shown: dict[str, str]
    """How each of `content` stood in the text, for an objection's words."""
    steps: tuple[tuple[str, ...], ...]
    """The words between one of `content` and the one before it; the last item is what follows the last one."""
    numbers: tuple[str, ...]
    units: frozenset[str]
    literals: frozenset[str]
    quotes: frozenset[str]
    names: frozenset[str]
    """Stems of capitalised words, but for those that begin a sentence."""
    negations: int
    kind: str
    """What is asked for: see kinds.py."""
    body: tuple[str, ...]
    """The words after the opening."""
    is_english: bool


_RUNS = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[\W_]")
_AROUND = "`\"'“”„‘’«»‹›()[]{}<>.,;:!?¿¡…*_~、。？！「」·–—"
_END = ".,;:!?…\"'”’»)]}。？！"
_CODE = frozenset("\\=<>{}[]()*^~|#@/:._`$&+%")
_ROMAN = re.compile(r"[IVX]{2,6}")
_ROMAN_VALUES = {"I": 1, "V": 5, "X": 10}
_ORDINAL_ENDINGS = frozenset(("st", "nd", "rd", "th"))
_SCALES = {"k": 1000, "m": 10**6, "bn": 10**9}
_CURRENCIES = {
    "$": "dollar",
    "€": "euro",
    "£": "pound_sterling",
    "¥": "yen",
    "₹": "rupee",
    "%": "percent",
    "°": "degree",
}
_QUOTED = {'"': '"', "“": "”", "„": "“", "«": "»", "`": "`", "「": "」"}
_MAX_QUOTE_CHARS = 200


def read(text: str) -> Reading:
    """Take a text apart. Never raises; any Unicode will do."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("‘", "'").replace("´", "'")
    reader = _Reader()
    for piece in text.split():
        reader.piece(piece)
    return reader.done(_quotes(text))


def plain(text: str) -> str:
    """The text without what cannot matter: case, white space, Unicode forms, punctuation at its end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .?!…")


def _quotes(text: str) -> frozenset[str]:
    """What stands in quotation marks or backticks."""
    if not any(mark in text for mark in _QUOTED):
        return frozenset()
    found = []
    start, closing = -1, ""
    for place, character in enumerate(text):
        if start < 0:
            closing = _QUOTED.get(character, "")
            if closing:
                start = place
        elif character == closing:
            if 1 < place - start <= _MAX_QUOTE_CHARS:
                inside = text[start + 1 : place]
                found.append(inside if closing == "`" else inside.lower().strip(" .,!?"))
            start = -1
    return frozenset(found)


class _Reader:
    def __init__(self) -> None:
        self.plain: list[str] = []
        self.words: list[str] = []
        self.content: list[str] = []
        self.fillers: set[str] = set()
        self.shown: dict[str, str] = {}
        self.steps: list[tuple[str, ...]] = []
        self.step: list[str] = []
        self.numbers: list[str] = []
        self.units: set[str] = set()
        self.places: list[int] = []
        self.named: list[tuple[str, int]] = []
        self.literals: list[str] = []
        self.names: set[str] = set()
        self.begins = True
        self.small = 0
        self.large = 0
        self.others = 0

    def piece(self, piece: str) -> None:
        """Read what stands between two white spaces."""
        if piece.isalpha() and len(piece) <= MAX_PIECE_CHARS:
            self.plain.append(piece.lower())
            self.word(piece)
            self.begins = False
            return
        bare = piece.strip(_AROUND)
        if bare and bare.isalpha() and len(bare) <= MAX_PIECE_CHARS and not self._has_call(piece):
            self.plain.append(bare.lower())
            self.word(bare)
        elif bare or len(piece) <= MAX_PIECE_CHARS:
            self.odd(piece, bare)
        else:
            self.literals.append(piece)
            self.plain.append(piece)
        self.begins = piece[-1] in ".!?:" or (len(piece) > 1 and piece[-1] in "\"')”" and piece[-2] in ".!?")

    @staticmethod
    def _has_call(piece: str) -> bool:
        """Whether brackets or the like belong to the word: `main()`, `a[]`, `.NET`, `--force`, `x*`."""
        first = piece[0]
        if first in ".-_#@/\\" and len(piece) > 1 and (piece[1].isalpha() or piece[1] == first) and piece[1] != ".":
            return True
        return "()" in piece or "[]" in piece or "{}" in piece or piece.rstrip(_END)[-1:] in ("*", "_")

    def odd(self, piece: str, bare: str) -> None:
        """Read a piece that is not letters alone."""
        if not bare:
            marks = piece.strip(_END)
            if piece in ("-", "–", "—", "...", "…") or not (marks.strip("\"'“”„‘’«»¿¡–—、·") and piece.strip(".,;:!?")):
                return
            self.literals.append(piece)
            self.plain.append(piece)
            return
        self.plain.append(bare.lower())
        low = bare.lower()
        known = CONTRACTIONS.get(low) or CONTRACTIONS.get(low.rstrip("."))
        if known is not None:
            for word in known.split():
                self.word(word)
            return
        if "'" in bare and self.contraction(bare):
            return
        if "-" in bare and bare[0] != "-" and bare.replace("-", "").isalpha():
            for part in bare.split("-"):
                if part:
                    self.word(part)
            return
        if len(piece) > MAX_PIECE_CHARS or "://" in piece or "@" in piece or self._has_call(piece):
            self.literals.append(_literal(piece))
            return
        if any(character.isdigit() for character in bare):
            self.figures(bare)
            return
        parts = bare.split("/")
        if len(parts) > 1 and all(part.isalpha() for part in parts) and piece[0] != "/":
            for part in parts:
                self.word(part)
            return
        if bare == "&":
            return
        if not any(character in _CODE for character in bare):
            runs = _RUNS.findall(bare)
            for run in runs:
                if run.isalpha():
                    self.word(run)
            return
        self.literals.append(_literal(piece))

    def contraction(self, bare: str) -> bool:
        """Read a word with an apostrophe; False if it is not one."""
        low = bare.lower()
        for ending, meaning in ENDINGS.items():
            if low.endswith(ending) and low[: -len(ending)].isalpha():
                self.word(bare[: -len(ending)])
                for word in meaning.split():
                    self.word(word)
                return True
        if low.replace("'", "").isalpha():
            self.word(bare.replace("'", ""))
            return True
        return False

    def figures(self, bare: str) -> None:
        """Read a piece that has digits: amounts, ordinals, versions, dates, a name with a number."""
        runs = _RUNS.findall(bare)
        digits = sum(run[0].isdigit() for run in runs)
        marks = [run for run in runs if not run.isalnum() and not run[0].isdigit()]
        if any(mark in _CODE and mark not in _CURRENCIES and mark not in "/:+." for mark in marks):
            self.literals.append(bare)
            return
        if digits > 1 and any(mark in "/:-" for mark in marks) and not any(run.isalpha() for run in runs):
            self.number(bare)
            return
        sign = ""
        previous = ""
        for run in runs:
            if run[0].isdigit():
                self.number(sign + run.replace(",", "") if _is_grouped(run) else sign + run)
            elif run.isalpha():
                self.beside_number(run, previous)
            elif run in _CURRENCIES:
                self.units.add(_CURRENCIES[run])
            elif run == "+":
                self.literals.append(run)
            sign = "-" if run == "-" and not previous else ""
            previous = run

    def beside_number(self, run: str, previous: str) -> None:
        """Read letters in a piece with digits."""
        low = run.lower()
        if not previous[:1].isdigit():
            if low != "v":
                self.word(run)
        elif low in _ORDINAL_ENDINGS:
            pass
        elif low in UNITS:
            self.units.add(UNITS[low])
        elif low in _SCALES and run != "M":
            self.numbers[-1] = _times(self.numbers[-1], _SCALES[low])
        elif len(low) > 3:
            self.word(run)
        else:
            self.numbers[-1] += low

    def number(self, number: str) -> None:
        """Take down a number. It stands in no word's place, but for the order of things it is a step."""
        self.numbers.append(number)
        self.step.append("#")

    def word(self, word: str) -> None:
        """Take down a word of letters."""
        low = word.lower()
        if low in CONTRACTIONS:
            for part in CONTRACTIONS[low].split():
                if part != low:
                    self.word(part)
            return
        value = NUMBER_WORDS.get(low)
        if value is not None:
            self.step.append("#")
            if value >= 100 and self.numbers and self.step[-2:-1] == ["#"]:
                self.numbers[-1] = _times(self.numbers[-1], value)
            else:
                self.numbers.append("one" if low == "one" else f"{value:g}")
            return
        if _ROMAN.fullmatch(word) or low in ("ii", "iii"):
            self.number(str(_roman(word.upper())))
            return
        self.words.append(low)
        if low in FUNCTION:
            self.small += low in ENGLISH_FUNCTION
            if len(word) == 1 and word.isupper() and word not in "AI":
                self.name(low, word)
            else:
                self.step.append(low)
                if low in FOREIGN_FUNCTION:
                    self.others += 1
                return
        elif low in FOREIGN_FUNCTION:
            self.others += 1
        self.large += 1
        if low in UNITS and (self.step[-1:] == ["#"] or len(low) > 2):
            base = UNITS[low]
            is_amount = self.step[-1:] == ["#"]
            if is_amount:
                self.named.append((base, len(self.words)))
            self.take(base, word, is_filler=is_amount)
            return
        is_name = not word.islower() and (not self.begins or not word[1:].islower())
        base = stem(low)
        is_filler = low in FILLER or base in FILLER
        base = SYNONYMS.get(base, base)
        if is_name and not is_filler:
            self.name(base, word)
        self.take(base, word, is_filler=is_filler)

    def take(self, base: str, word: str, *, is_filler: bool) -> None:
        """Take down a word of content."""
        if is_filler:
            self.fillers.add(base)
        self.content.append(base)
        self.places.append(len(self.words))
        self.shown[base] = word
        self.steps.append(tuple(self.step))
        self.step = []

    def name(self, base: str, word: str) -> None:
        """Take down a name."""
        self.names.add(base)
        self.shown[base] = word

    def done(self, quotes: frozenset[str]) -> Reading:
        """The reading of all pieces so far."""
        words = tuple(self.words)
        letters = self.small + self.large
        kind, length = opening(words)
        for base, place in zip(self.content, self.places, strict=True):
            if place <= length:
                self.fillers.add(base)
        self.units.update(unit for unit, place in self.named if place > length)
        is_english = all(word.isascii() for word in words) and (
            self.small > self.others if self.small else not self.others
        )
        if len(self.names) * 2 > letters:
            self.names.clear()  # a title, or somebody who writes In Capitals: case tells nothing
        return Reading(
            plain=tuple(self.plain),
            words=words,
            content=tuple(self.content),
            fillers=frozenset(self.fillers),
            shown=self.shown,
            steps=(*self.steps, tuple(self.step)),
            numbers=tuple(self.numbers),
            units=frozenset(self.units),
            literals=frozenset(self.literals),
            quotes=quotes,
            names=frozenset(self.names),
            negations=sum(word in NEGATIONS for word in words),
            kind=kind,
            body=words[length:],
            is_english=is_english,
        )


def _literal(piece: str) -> str:
    """A piece of code or the like, without the punctuation of the sentence around it."""
    piece = piece.rstrip(".,;:!?…\"'”’»`") or piece
    piece = piece.lstrip("\"'“‘«`") or piece
    if piece[0] == "(" and piece.count("(") > piece.count(")"):
        piece = piece[1:] or piece
    if piece[-1] == ")" and piece.count(")") > piece.count("("):
        piece = piece[:-1] or piece
    return piece if any(character.isupper() for character in piece[1:]) else piece.lower()


def _is_grouped(run: str) -> bool:
    """Whether commas only group thousands: 1,000 and not 1,5."""
    first, *rest = run.split(",")
    return bool(rest) and len(first) <= 3 and all(len(group.split(".")[0]) == 3 for group in rest)


def _times(number: str, scale: float) -> str:
    """A number in figures times a scale: 5 thousand, 10k."""
    try:
        return f"{float(number) * scale:.15g}"
    except ValueError:
        return f"{number} x {scale:g}"


def _roman(numeral: str) -> int:
    values = [_ROMAN_VALUES[letter] for letter in numeral]
    pairs = zip(values, [*values[1:], 0], strict=True)
    return sum(-value if value < following else value for value, following in pairs)
