"""Texts as they are stored: what is packed or sealed is there again, and nothing else opens as it."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.sealing import DamagedError, check_value, digest, packed, sealed, unpacked, unsealed
from tests.conftest import examples

KEYS = st.binary(min_size=32, max_size=32)
NONCES = st.binary(min_size=12, max_size=12)
TEXTS = st.binary(max_size=300) | st.text().map(str.encode) | st.just(b'{"role": "user"}' * 1000)
KEY, NONCE = bytes(range(32)), bytes(12)


@given(KEYS, NONCES, TEXTS, st.sampled_from(["hash", "full"]), st.sampled_from(["prompt", "answer"]), st.text("aé:-"))
@examples(50)
def test_what_is_sealed_opens_as_it_was(key, nonce, text, form, kind, call_id) -> None:  # type: ignore[no-untyped-def]
    data = sealed(key, nonce, text, form, kind, call_id)
    assert data[:12] == nonce
    assert len(data) == len(text) + 28
    assert unsealed(key, data, form, kind, call_id) == text


@given(st.data(), TEXTS)
@examples(50)
def test_every_change_of_it_is_noticed(data: st.DataObject, text: bytes) -> None:
    good = sealed(KEY, NONCE, text, "full", "prompt", "call-1")
    place = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[place] ^= data.draw(st.integers(1, 255))
    for other in (bytes(bad), good[:place], good + b"x"):
        with pytest.raises(DamagedError):
            unsealed(KEY, other, "full", "prompt", "call-1")


def test_it_opens_with_its_key_only_and_as_nothing_else() -> None:
    good = sealed(KEY, NONCE, b"Hello", "full", "prompt", "call-1")
    assert unsealed(KEY, good, "full", "prompt", "call-1") == b"Hello"
    with pytest.raises(DamagedError):
        unsealed(bytes(32), good, "full", "prompt", "call-1")
    for form, kind, call_id in (
        ("hash", "prompt", "call-1"),
        ("full", "answer", "call-1"),
        ("full", "prompt", "call-2"),
    ):
        with pytest.raises(DamagedError):
            unsealed(KEY, good, form, kind, call_id)  # type: ignore[arg-type]


@given(TEXTS)
@examples(50)
def test_what_is_packed_is_there_again(text: bytes) -> None:
    data = packed(text)
    assert unpacked(data, len(text)) == text
    for bad in (data[:-1], data + b"x", b""):
        with pytest.raises(DamagedError):
            unpacked(bad, len(text))
    if text:
        with pytest.raises(DamagedError):
            unpacked(data, len(text) - 1)


@given(KEYS, KEYS)
@examples(20)
def test_a_key_is_known_again(key: bytes, other: bytes) -> None:
    assert (check_value(key) == check_value(other)) == (key == other)
    assert check_value(key) not in (key, key[:16], digest(key)[:16])


def test_a_hash_is_what_b2sum_says() -> None:
    # printf abc | b2sum -l 256
    assert digest(b"abc").hex() == "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319"
    assert digest(b"") == hashlib.blake2b(digest_size=32).digest()
