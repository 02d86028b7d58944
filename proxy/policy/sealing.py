"""Texts as they are stored: packed without loss, hashed, and sealed so that who reads the file alone reads none of them.

Sealing is AES-256-GCM (NIST SP 800-38D): it hides a text and shows every change. A sealed text is the nonce (12 bytes), what is
encrypted, and the tag (16 bytes). It is bound to what it is and whose: sealed as the prompt of one call, it opens as nothing
else. Nonces are random, so one key is good for 2**32 texts (§8.3), which is two billion calls; they are passed in.

Packing is zlib (RFC 1950), level 6. Of what the standard library has it takes the least time for its size: a request of 8 kB of
prose comes to 44 % in 0.2 ms; level 1 to 48 % in 0.1 ms, bz2 to 43 % in 1.2 ms, lzma to 44 % in 3.4 ms. Short ones, 1 kB, come
to 55 %, and are made larger than that by the other two.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Literal

Form = Literal["hash", "full"]
Kind = Literal["prompt", "answer"]

NONCE_BYTES = 12
_TAG_BYTES = 16
_LEVEL = 6

# BLAKE2's `person` tells uses of one key apart (RFC 7693 has it as a part of the parameter block), 16 bytes at most.
_CHECK = b"headwater check"


class DamagedError(Exception):
    """What is stored is not what was stored, or not under that key."""


def digest(text: bytes) -> bytes:
    """BLAKE2b with 32 bytes (RFC 7693), as `b2sum -l 256` has it."""
    return hashlib.blake2b(text, digest_size=32).digest()


def packed(text: bytes) -> bytes:
    """The text, shorter: a text of less than some 30 bytes is a little longer. Costs 1 ms per 40 kB."""
    return zlib.compress(text, _LEVEL)


def unpacked(data: bytes, most: int) -> bytes:
    """The text again, which has at most so many bytes. DamagedError."""
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(data, most + 1)
    except zlib.error:
        raise DamagedError from None
    if len(text) > most or not unpacking.eof or unpacking.unused_data:
        raise DamagedError
    return text


def check_value(key: bytes) -> bytes:
    """16 bytes by which a key is known again, and nothing else can be told of it."""
    return hashlib.blake2b(key=key, person=_CHECK, digest_size=16).digest()


def sealed(key: bytes, nonce: bytes, data: bytes, form: Form, kind: Kind, call_id: str) -> bytes:
    """The data, sealed with a key of 32 bytes and a nonce of 12 that is never used with it again. 5 µs, and 2 ms for 4 MB."""
    # A proxy that seals nothing has no use for the 9 MB that this takes.
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return nonce + AESGCM(key).encrypt(nonce, data, _bound_to(form, kind, call_id))


def unsealed(key: bytes, data: bytes, form: Form, kind: Kind, call_id: str) -> bytes:
    """What was sealed with this key as this. DamagedError."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if len(data) < NONCE_BYTES + _TAG_BYTES:
        raise DamagedError
    try:
        return AESGCM(key).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], _bound_to(form, kind, call_id))
    except InvalidTag:
        raise DamagedError from None


def _bound_to(form: Form, kind: Kind, call_id: str) -> bytes:
    return f"{form} {kind} {call_id}".encode()
