"""The secret by which virtual keys are hashed: from the environment, or from a file beside the database.

Whoever reads the database alone can then neither make a key nor try guesses against the hashes.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from proxy.errors import ConfigError

_BYTES = 32
_OWNER_ONLY = 0o600
_OTHERS = 0o077


def read_secret(given: str | None, path: Path) -> bytes | None:
    """The secret, or None where there is none yet. Blocks. ConfigError when the file cannot be used."""
    if given is not None:
        return given.encode()
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & _OTHERS:
                raise ConfigError([f"{path}: others than its owner may read it: chmod 600 {path}"])
            secret = file.read().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    if len(secret) < _BYTES:
        raise ConfigError([f"{path}: holds fewer than {_BYTES} characters: put it back from a backup"])
    return secret


def read_or_make_secret(given: str | None, path: Path) -> bytes:
    """The secret, made where there is none yet. Blocks. ConfigError when the file cannot be used.

    Of two processes that make one at the same time, both get the first one's: the file appears whole, and only once.
    """
    if (secret := read_secret(given, path)) is not None:
        return secret
    draft = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY), "wb") as file:
                file.write(secrets.token_hex(_BYTES).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(draft, path)
        finally:
            # A disk that is full takes the name, and not what is in the file.
            draft.unlink(missing_ok=True)
        _sync_directory(path.parent)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be written: {error.strerror}"]) from None
    made = read_secret(given, path)
    assert made is not None
    return made


def _sync_directory(path: Path) -> None:
    """Put a new name on the disk: fsync(2) of the file alone does not."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
