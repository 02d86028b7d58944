"""What a virtual key looks like, which typing errors show, and what its hash tells."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.keys import allows, hash_of, is_expired, is_same, is_well_formed, make_key, prefix_of
from tests.conftest import examples

_KEYS = st.binary(min_size=24, max_size=24).map(make_key)
_SECRETS = st.binary(min_size=16, max_size=100)
KEY = make_key(bytes(range(24)))
SECRET = b"0123456789abcdef"


def test_a_key_is_letters_and_digits_with_its_mark_before() -> None:
    assert KEY == "sk-hw-RAKQvOgGnHaKu9UFpCZz76WEP5ld7A000X9RkV4"
    assert prefix_of(KEY) == "sk-hw-RAKQvOgG"


@examples(50)
@given(_KEYS)
def test_every_key_is_well_formed_and_can_stand_in_a_header_or_a_url(key: str) -> None:
    assert is_well_formed(key)
    assert len(key) == 45
    assert set(key.removeprefix("sk-hw-")) <= set(string.ascii_letters + string.digits)


@examples(50)
@given(_KEYS, st.data())
def test_a_slip_of_the_hand_shows_without_a_look_into_the_database(key: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(key) - 2))
    other = data.draw(st.characters(exclude_characters=key[place]))
    slips = [
        key[:place] + other + key[place + 1 :],
        key[:place] + key[place + 1 :],
        key[:place] + other + key[place:],
        key[:place],
        f"{key} ",
        key.upper(),
    ]
    if key[place] != key[place + 1]:
        slips.append(key[:place] + key[place + 1] + key[place] + key[place + 2 :])
    assert not any(map(is_well_formed, slips))


@pytest.mark.parametrize(
    "text",
    [
        "sk-hw-Th0VA4",
        "sk-hw-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaIV6iO3",
        "sk-hx-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaPbcPx0",
        "sk-hw-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-ar0qN2",
    ],
)
def test_a_checksum_alone_makes_no_key(text: str) -> None:
    assert not is_well_formed(text)


@given(st.text() | st.text().map("sk-hw-".__add__))
def test_any_text_may_be_asked_about(text: str) -> None:
    assert not is_well_formed(text)
    assert is_same(hash_of(text, SECRET), hash_of(text, SECRET))


@examples(50)
@given(_KEYS, _KEYS, _SECRETS, _SECRETS)
def test_a_hash_is_of_its_key_and_its_secret(key: str, other: str, secret: bytes, another: bytes) -> None:
    kept = hash_of(key, secret)
    assert len(kept) == 32
    assert is_same(kept, hash_of(key, secret))
    assert is_same(kept, hash_of(other, secret)) is (key == other)
    assert is_same(kept, hash_of(key, another)) is (secret == another)


def test_hashes_stay_as_they_are_stored() -> None:
    assert hash_of(KEY, SECRET).hex() == "24820bcef66cc0df75eadeda62d138d1fc795f87b7565de86f226bc2c623af90"


def test_different_bytes_make_different_keys_from_the_first_letters_on() -> None:
    keys = [make_key(number.to_bytes(24)) for number in range(500)]
    assert len(set(map(prefix_of, keys))) == 500


@pytest.mark.parametrize("size", [0, 23, 25, 32])
def test_a_key_needs_all_its_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="24 random bytes"):
        make_key(bytes(size))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes or more"):
        hash_of(KEY, b"short")


@pytest.mark.parametrize(
    ("one", "other", "is_equal"),
    [
        ("admin", "admin", True),
        ("admin", b"admin", True),
        ("admin", "admin ", False),
        ("", "admin", False),
        ("ä", "ä", True),
        ("\udce4", "ä", False),
        ("\ud800", "\ud800", True),
    ],
)
def test_secrets_are_compared_whatever_was_sent(one: str, other: str | bytes, is_equal: bool) -> None:
    assert is_same(one, other) is is_same(other, one) is is_equal


@pytest.mark.parametrize(
    ("patterns", "model", "may"),
    [
        ((), "gpt-4o", False),
        (("*",), "openai/gpt-4o", True),
        (("gpt-4o",), "gpt-4o", True),
        (("gpt-4o",), "gpt-4o-mini", False),
        (("gpt-4o",), "openai/gpt-4o", False),
        (("openai/*",), "openai/gpt-4o", True),
        (("openai/*",), "gpt-4o", False),
        (("chat-*", "gpt-*"), "gpt-4o", True),
        (("gpt-*",), "GPT-4o", False),
    ],
)
def test_a_key_is_for_the_models_that_its_patterns_name(patterns: tuple[str, ...], model: str, may: bool) -> None:
    assert allows(patterns, model) is may


@pytest.mark.parametrize(
    ("expires_at", "is_over"), [(None, False), (100.5, False), (100, True), (99.9, True), (0, True)]
)
def test_a_key_ends_with_its_time(expires_at: float | None, is_over: bool) -> None:
    assert is_expired(expires_at, 100) is is_over
