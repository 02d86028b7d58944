"""A note of a call is there for others, whole, from before it begins until its row is written; or there is none at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.store.notes import Notes, read_notes
from tests.conftest import examples
from tests.store.ledgers import new

_SLOTS = 16_384


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "notes"


@pytest.fixture
def file(path: Path) -> Iterator[int]:
    number = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    yield number
    os.close(number)


def notes_in(file: int | None) -> Notes:
    """On a disk that is always in time."""
    return Notes(file, lambda: 0.0)


def take(notes: Notes, number: int) -> int:
    slot = notes.take(number, new(f"call-{number}"))
    assert slot is not None
    return slot


def test_a_note_is_there_until_it_is_cleared(file: int, path: Path) -> None:
    notes = notes_in(file)
    asked = new("ü" * 99, key="key", user="", job=None, purpose="test", opened_at=1_800_000_000.123456)
    slot = notes.take(7, asked)
    assert slot is not None
    assert read_notes(path) == {7: asked}
    assert not notes.is_empty
    notes.clear(7, slot)
    assert read_notes(path) == {}
    assert notes.is_empty


@given(st.lists(st.integers(0, 99), max_size=150))
@examples(30)
def test_slots_are_used_again(tmp_path_factory: pytest.TempPathFactory, ended: list[int]) -> None:
    """Of those under way, the one that is named ends, and another one begins."""
    path = tmp_path_factory.mktemp("notes") / "notes"
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    notes = notes_in(file)
    under_way = {number: take(notes, number) for number in range(100)}
    for number in ended:
        if (slot := under_way.pop(number, None)) is not None:
            notes.clear(number, slot)
            under_way[number + 100] = take(notes, number + 100)
    assert read_notes(path).keys() == under_way.keys()
    assert path.stat().st_size == 128 * 1024
    os.close(file)


def test_what_does_not_fit_is_not_noted(file: int, path: Path) -> None:
    notes = notes_in(file)
    assert notes.take(1, new("x" * 1024)) is None
    for number in range(_SLOTS):
        take(notes, number)
    assert notes.take(_SLOTS, new()) is None
    assert len(read_notes(path)) == _SLOTS
    notes.clear(5, 5)
    assert take(notes, _SLOTS) == 5


def test_without_a_file_nothing_is_noted(path: Path) -> None:
    notes = notes_in(None)
    assert notes.take(1, new()) is None
    assert notes.is_empty
    assert read_notes(path) == {}


def test_a_disk_without_room_takes_no_note() -> None:
    with open("/dev/full", "r+b", buffering=0) as full:
        notes = notes_in(full.fileno())
        assert notes.take(1, new()) is None
        assert notes.is_empty


def test_a_note_that_came_to_the_disk_in_part_is_none(file: int, path: Path) -> None:
    notes = notes_in(file)
    for number in range(3):
        take(notes, number)
    content = bytearray(path.read_bytes())
    content[1024 + 50] ^= 1
    content[2048:2052] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert read_notes(path).keys() == {0}
    path.write_bytes(content[:1030])
    assert read_notes(path).keys() == {0}


def test_a_disk_that_lets_one_wait_is_left_alone_for_a_minute(file: int) -> None:
    times = [0.0, 0.2, 50.0, 60.3, 60.31, 60.4, 60.41]
    notes = Notes(file, lambda: times.pop(0))
    assert notes.take(1, new()) is not None
    assert notes.take(2, new()) is None
    assert [notes.take(number, new()) is None for number in (3, 4)] == [False, False]


def test_a_note_that_cannot_be_cleared_is_remembered(file: int, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes = notes_in(file)
    slots = [take(notes, number) for number in range(2)]
    reading = os.open(path, os.O_RDONLY)
    os.dup2(reading, file)
    os.close(reading)
    for number, slot in enumerate(slots):
        notes.clear(number, slot)
    assert notes.stuck == dict(enumerate(slots))
    assert read_notes(path).keys() == {0, 1}
    [told] = caplog.messages
    assert told.startswith("notes of calls under way cannot be cleared: ")
    assert notes.take(2, new()) is None
    assert not notes.is_empty
