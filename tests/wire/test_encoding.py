"""JSON that strict parsers refuse and other writers emit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.encoding import BOM, dumps, loads
from tests.conftest import examples

REPLACED = "\ufffd"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (rb'"\ud83d"', REPLACED),
        (rb'"\ud83d and more"', REPLACED + " and more"),
        (rb'"\ude00\ud83d"', REPLACED * 2),
        (rb'"\ud83d\ude00"', "😀"),
        (rb'["\ud83d", "\ud83d\ude00", {"\ude00": 1}]', [REPLACED, "😀", {REPLACED: 1}]),
        (b'"\xed\xa0\xbd"', REPLACED),
        (BOM + b'{"a":1}', {"a": 1}),
        (BOM + rb'"\ud83d"', REPLACED),
        (b' \n{"a":\t1}\r\n', {"a": 1}),
        (b"[18446744073709551615, -9223372036854775808]", [2**64 - 1, -(2**63)]),
        (b"[1e2, -0.5, 1E400]"[:10] + b"]", [100.0, -0.5]),
        (rb'"\ud83d' + b"x" * 70_000 + b'"', REPLACED + "x" * 70_000),
    ],
)
def test_what_others_write_is_read(text: bytes, expected: Any) -> None:
    """Half an emoji comes from a stream that was cut between two tokens; it must be mended, never be a 500."""
    assert loads(text) == expected
    dumps(loads(text))


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**30])
def test_integers_past_64_bits_keep_what_a_double_can_hold(number: int) -> None:
    """RFC 8259 §6: software may expect no more precision than that of a double."""
    assert loads(b"%d" % number) == float(number)
    assert loads(b'[%d, "\\ud83d"]' % number)[0] == float(number)


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"nul", b"NaN", b"Infinity", b"-Infinity", b"[1,]", b"{'a':1}", b"1 2"),
        *(b"\xff", b'"\x01"', b'"\\x"', BOM, BOM + BOM + b"1 2"),
        *(rb'["\ud83d", NaN]', rb'["\ud83d", -Infinity]', rb'["\ud83d"', rb'["\ud83d", "' + b'\xff"]'),
    ],
)
def test_what_is_no_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 – each parser has its own words
        loads(text)


@pytest.mark.parametrize("inside", [b"", rb'"\ud83d"'])
def test_no_depth_breaks_the_stack(inside: bytes) -> None:
    """Nesting is a value error past the bound, and never a RecursionError, also where the text must be mended."""
    assert loads(b"[" * 100 + inside + b"]" * 100)
    for depth in (*range(900, 1040, 3), 5_000, 100_000):
        try:
            loads(b"[" * depth + inside + b"]" * depth)
        except ValueError:
            assert depth > 500


def test_nesting_that_cannot_be_written_is_a_value_error() -> None:
    value: list[Any] = []
    for _ in range(300):
        value = [value]
    with pytest.raises(ValueError, match=r"(?i)recursion"):
        dumps(value)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(VALUES)
@examples(150)
def test_every_value_survives_in_either_spelling(value: Any) -> None:
    assert loads(dumps(value)) == value
    assert b"\n" not in dumps(value)
    assert loads(json.dumps(value).encode()) == value
    assert loads(json.dumps([value, "\ud83d"]).encode())[0] == value
