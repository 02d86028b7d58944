"""Virtual keys: what one looks like, what is kept of it, and what it may be used for.

    sk-hw-4fGh2K9xQb…          33 letters and digits, which are 24 random bytes, and 6 more, their checksum
    └─────┬──────┘
        prefix                 stored and shown as it is, to find the key by and to tell keys apart

Of the 192 random bits the prefix tells 47, and the other 145 are more than anybody can try. The checksum tells a key that was
mistyped or cut short from one that is unknown, without a look into the database, and finds keys that leaked into files; it
keeps nothing secret (GitHub's tokens are made so too:
https://github.blog/engineering/platform-security/behind-githubs-new-authentication-token-formats/).

A key is kept as a keyed hash, so that who reads the database alone can neither use a key nor make one that fits. A slow hash
would add nothing: it guards what people think up, and these keys are random.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import string
from collections.abc import Collection
from functools import lru_cache

from proxy.settings import matches

ENTROPY_BYTES = 24
MIN_SECRET_BYTES = 16

_MARK = "sk-hw-"
_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_VALUES = frozenset(_DIGITS)
_BODY_DIGITS = 33  # 62**33 is just over 2**196
_CHECKSUM_DIGITS = 6  # 62**6 is over 2**32
_PREFIX_LENGTH = len(_MARK) + 8
_KEY_LENGTH = len(_MARK) + _BODY_DIGITS + _CHECKSUM_DIGITS
_HASH_BYTES = 32


def make_key(entropy: bytes) -> str:
    """The key for 24 random bytes (from a source fit for secrets): 45 characters. ValueError for another number of bytes."""
    if len(entropy) != ENTROPY_BYTES:
        raise ValueError(f"a key is made of {ENTROPY_BYTES} random bytes, not {len(entropy)}")
    key = _MARK + _base62(int.from_bytes(entropy), _BODY_DIGITS)
    return key + _checksum(key)


def is_well_formed(text: str) -> bool:
    """Whether a text can be one of our keys: it begins as they do, is as long, and its checksum fits. Takes 5 µs.

    It tells what is wrong with a key that was not found; one that was found need not be asked.
    """
    if len(text) != _KEY_LENGTH or not text.startswith(_MARK) or not _VALUES.issuperset(text[len(_MARK) :]):
        return False
    return _checksum(text[:-_CHECKSUM_DIGITS]) == text[-_CHECKSUM_DIGITS:]


def prefix_of(key: str) -> str:
    """The beginning of a key (14 characters), which may be stored and shown. Two keys rarely have the same, but they may."""
    return key[:_PREFIX_LENGTH]


def hash_of(key: str, secret: bytes) -> bytes:
    """What is stored of a key: BLAKE2b with the secret as its key (RFC 7693 §2.5), 32 bytes.

    The secret is 16 bytes or more, ValueError otherwise. It is kept elsewhere than the hashes: with another one no key fits.
    """
    hasher = _hasher(secret).copy()
    hasher.update(_as_bytes(key))
    return hasher.digest()


@lru_cache(maxsize=1)
def _hasher(secret: bytes) -> hashlib.blake2b:
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"the secret for keys must have {MIN_SECRET_BYTES} bytes or more, not {len(secret)}")
    # BLAKE2b takes 64 bytes of key, and any number of bytes is to do.
    secret_key = hashlib.blake2b(secret, person=b"hw-key-secret").digest()
    return hashlib.blake2b(digest_size=_HASH_BYTES, key=secret_key, person=b"hw-virtual-key")


def is_same(one: bytes | str, other: bytes | str) -> bool:
    """Whether two hashes, or two secrets such as the admin key, are equal; how long it takes does not tell where they differ."""
    return hmac.compare_digest(_as_bytes(one), _as_bytes(other))


def allows(patterns: Collection[str], model: str) -> bool:
    """Whether a key for these models may ask for one, by the very name its client asks for.

    An alias needs a pattern that fits the alias, and gets what stands behind it; `upstream/model` needs one with the upstream
    or `*` in it. No pattern, no model.
    """
    return "*" in patterns or any(matches(pattern, model) for pattern in patterns)


def is_expired(expires_at: float | None, now: float) -> bool:
    """Whether a key's time (Unix seconds; None: for ever) is over. It is at that very second."""
    return expires_at is not None and now >= expires_at


def _checksum(text: str) -> str:
    return _base62(binascii.crc32(text.encode()), _CHECKSUM_DIGITS)


def _base62(number: int, digits: int) -> str:
    # The lowest digit is the first: what the highest one can be is few, and would make prefixes alike.
    found = []
    for _ in range(digits):
        number, digit = divmod(number, len(_DIGITS))
        found.append(_DIGITS[digit])
    return "".join(found)


def _as_bytes(text: bytes | str) -> bytes:
    # Bytes that are no UTF-8 come out of HTTP headers as surrogates: they fit nothing, but are no reason to fail.
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
