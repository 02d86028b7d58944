"""A cached answer in words: what goes in, what comes out, and what is learned about it meanwhile. Times are Unix seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

ROW_BYTES = 512
"""What an entry takes on disk besides its answer, question and vector: measured 400 to 600 with the indexes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEntry:
    """An answer to keep.

    `key` (16 bytes) stands for all that was asked; `scope` is a digest of whose answer it is; `model` is as it was asked
    for; `answer` is the completion as JSON; `duration_s` is how long it was being said. An entry that may be found by
    meaning has a `partition` (16 bytes: all that must be equal), the `question` (the last user text) and, when it is
    there already, the `vector` (float16, little-endian) that `embedder` made of it.
    """

    key: bytes
    scope: str
    namespace: str
    model: str
    target: str
    answer: bytes
    prompt_tokens: int
    completion_tokens: int
    duration_s: float
    created_at: float
    expires_at: float | None = None
    partition: bytes | None = None
    question: str = ""
    vector: bytes | None = None
    embedder: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All about an entry but the answer itself. `size`: what it counts for against `max_bytes`.

    `rights` and `wrongs` count verdicts on near matches with it; `lowest_right` and `highest_wrong` are the scores
    at which it was still right, and wrong all the same.
    """

    id: int
    key: bytes
    scope: str
    namespace: str
    model: str
    target: str
    size: int
    prompt_tokens: int
    completion_tokens: int
    duration_s: float
    created_at: float
    expires_at: float | None
    used_at: float
    hits: int = 0
    rights: int = 0
    wrongs: int = 0
    lowest_right: float | None = None
    highest_wrong: float | None = None
    partition: bytes | None = None
    question: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Facts):
    """A cached answer with all that a replay needs. `answer`: the completion as JSON, which has been seen to be whole."""

    answer: bytes


def made(new: NewEntry, entry_id: int, body_bytes: int, used_at: float) -> Entry:
    """The entry made of a new one, whose compressed answer is so long. Only one with a partition has a question."""
    is_semantic = new.partition is not None
    question = storable(new.question) if is_semantic else ""
    vector = new.vector or b"" if is_semantic else b""
    return Entry(
        id=entry_id,
        key=new.key,
        scope=storable(new.scope),
        namespace=storable(new.namespace),
        model=storable(new.model),
        target=storable(new.target),
        size=ROW_BYTES + body_bytes + len(question.encode()) + len(vector),
        prompt_tokens=new.prompt_tokens,
        completion_tokens=new.completion_tokens,
        duration_s=new.duration_s,
        created_at=new.created_at,
        expires_at=new.expires_at,
        used_at=used_at,
        partition=new.partition,
        question=question,
        answer=new.answer,
    )


class Question(NamedTuple):
    """What a semantic index holds of an entry. `vector` is None where another embedder made it, or none did."""

    id: int
    partition: bytes
    question: str
    vector: bytes | None


@dataclass(frozen=True, slots=True)
class Note:
    """What became known of an entry since it was written: hits and verdicts to add, scores to compare."""

    used_at: float = 0.0
    hits: int = 0
    rights: int = 0
    wrongs: int = 0
    lowest_right: float | None = None
    highest_wrong: float | None = None

    def __add__(self, other: Note) -> Note:
        return Note(
            max(self.used_at, other.used_at),
            self.hits + other.hits,
            self.rights + other.rights,
            self.wrongs + other.wrongs,
            _extreme(min, self.lowest_right, other.lowest_right),
            _extreme(max, self.highest_wrong, other.highest_wrong),
        )


F = TypeVar("F", bound=Facts)


def noted(facts: F, note: Note) -> F:
    """The entry with the note added to it."""
    return dataclasses.replace(
        facts,
        used_at=max(facts.used_at, note.used_at),
        hits=facts.hits + note.hits,
        rights=facts.rights + note.rights,
        wrongs=facts.wrongs + note.wrongs,
        lowest_right=_extreme(min, facts.lowest_right, note.lowest_right),
        highest_wrong=_extreme(max, facts.highest_wrong, note.highest_wrong),
    )


def storable(text: str) -> str:
    """The text with `?` for what has no UTF-8 form (lone surrogates, which JSON can hold)."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _extreme(choose: Callable[[float, float], float], one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return one if other is None else other
    return choose(one, other)
