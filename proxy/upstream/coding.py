"""Content codings: what an upstream packs although `identity` was asked for (RFC 9110 §8.4).

gzip and deflate are always understood; br and zstd where a library for them is installed (`pip install headwater[codings]`).
Everything is unpacked as it comes and in pieces of bounded size, and what one read can be blown up to is bounded as well:
a few bytes may stand for gigabytes. To add a coding, write a `_Layer` and put it into `_LAYERS`.
"""

from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, Protocol

_PIECE_BYTES = 1024 * 1024

# What one read from the socket (256 KiB at most) may become: 256 times itself. Streams of events, which repeat themselves
# most, were measured to shrink to a fiftieth with gzip and an eightieth with zstd; a bomb shrinks to a thousandth or less.
_MAX_BYTES_FROM_ONE_READ = 64 * 1024 * 1024

# RFC 9110 §8.4 sets no limit to the codings of one answer, but each may multiply what the one before it made.
_MAX_CODINGS = 3

_ZSTD_WINDOW_LOG = 23  # RFC 9659 §3: 8 MB at the most


class CodingError(Exception):
    """The answer cannot be unpacked. The message says why, to the client."""


class _Layer(Protocol):
    """One coding, being taken off."""

    def unpack(self, data: bytes) -> Iterator[bytes]:
        """What `data` becomes, in pieces of one or two `_PIECE_BYTES` at the most. Raises what its library raises."""

    def is_whole(self) -> bool:
        """Whether what came so far may be all: nothing, or as many complete streams as there were."""


class _Inflate:
    """gzip (RFC 1952) and zlib (RFC 1950), whichever is there: the two are mistaken for each other."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
        self._is_amid = False

    def unpack(self, data: bytes) -> Iterator[bytes]:
        while data:
            self._is_amid = True
            yield self._inflate.decompress(data, _PIECE_BYTES)
            data = self._inflate.unconsumed_tail
            if self._inflate.eof:
                # Another member may follow (RFC 1952 §2.2).
                self._is_amid = False
                data = self._inflate.unused_data
                self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)

    def is_whole(self) -> bool:
        return not self._is_amid


class _Deflate:
    """ "deflate", which is zlib's format, and which some servers send without its wrapper (RFC 9110 §8.4.1.2)."""

    def __init__(self) -> None:
        self._start = b""
        self._layer: _Inflate | _RawDeflate | None = None

    def unpack(self, data: bytes) -> Iterator[bytes]:
        if self._layer is None:
            self._start += data
            if len(self._start) < 2:
                return
            data, self._start = self._start, b""
            self._layer = _Inflate() if _has_wrapper(data) else _RawDeflate()
        yield from self._layer.unpack(data)

    def is_whole(self) -> bool:
        return self._layer.is_whole() if self._layer is not None else not self._start


def _has_wrapper(data: bytes) -> bool:
    """Whether a gzip member or a zlib stream begins here. RFC 1950 §2.2: method 8, and the two bytes divisible by 31. A
    raw stream never begins so: it would be a stored block with padding that is not zero."""
    return data[:2] == b"\x1f\x8b" or (data[0] & 0x0F == 8 and int.from_bytes(data[:2]) % 31 == 0)


class _RawDeflate:
    """RFC 1951, with nothing around it."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)

    def unpack(self, data: bytes) -> Iterator[bytes]:
        while data and not self._inflate.eof:
            yield self._inflate.decompress(data, _PIECE_BYTES)
            data = self._inflate.unconsumed_tail
        if data or self._inflate.unused_data:
            raise zlib.error("bytes behind the end")

    def is_whole(self) -> bool:
        return self._inflate.eof


class _Brotli:
    """RFC 7932. One stream, and nothing behind it."""

    def __init__(self, library: ModuleType) -> None:
        self._decompressor: Any = library.Decompressor()
        self._has_begun = False

    def unpack(self, data: bytes) -> Iterator[bytes]:
        self._has_begun = True
        yield self._decompressor.process(data, output_buffer_limit=_PIECE_BYTES)
        while not self._decompressor.can_accept_more_data():
            yield self._decompressor.process(b"", output_buffer_limit=_PIECE_BYTES)

    def is_whole(self) -> bool:
        return not self._has_begun or bool(self._decompressor.is_finished())


class _Zstd:
    """RFC 8878: frame after frame."""

    def __init__(self, library: ModuleType) -> None:
        self._library = library
        self._is_amid = False
        self._begin()

    def _begin(self) -> None:
        window = {self._library.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
        self._decompressor = self._library.ZstdDecompressor(options=window)

    def unpack(self, data: bytes) -> Iterator[bytes]:
        while data or not self._decompressor.needs_input:
            self._is_amid = True
            yield self._decompressor.decompress(data, _PIECE_BYTES)
            data = b""
            if self._decompressor.eof:
                self._is_amid = False
                data = self._decompressor.unused_data
                self._begin()

    def is_whole(self) -> bool:
        return not self._is_amid


def _library(*names: str) -> ModuleType | None:
    """The first of the modules that is installed."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


_brotli = _library("brotli", "brotlicffi")
_zstd = _library("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

_LAYERS: dict[str, Callable[[], _Layer]] = {"gzip": _Inflate, "x-gzip": _Inflate, "deflate": _Deflate}
_ERRORS: tuple[type[Exception], ...] = (zlib.error,)
# Before 1.2 there was no way to bound what comes out of it (https://github.com/google/brotli/releases/tag/v1.2.0).
if _brotli is not None and hasattr(_brotli.Decompressor, "can_accept_more_data"):
    _LAYERS["br"] = partial(_Brotli, _brotli)
    _ERRORS = (*_ERRORS, _brotli.error)
if _zstd is not None:
    _LAYERS["zstd"] = partial(_Zstd, _zstd)
    _ERRORS = (*_ERRORS, _zstd.ZstdError)


class Unpacker:
    """Takes off the codings that a `Content-Encoding` names. CodingError when one of them is not known here."""

    __slots__ = ("_layers",)

    def __init__(self, content_encoding: str) -> None:
        names = [name for part in content_encoding.lower().split(",") if (name := part.strip())]
        names = [name for name in names if name != "identity"]
        for name in names:
            if name not in _LAYERS:
                raise CodingError(f"Its answer is packed as '{name[:20]}', which was not asked for.")
        if len(names) > _MAX_CODINGS:
            raise CodingError(f"Its answer is packed {len(names)} times over, which was not asked for.")
        # They stand in the order in which they were put on (RFC 9110 §8.4).
        self._layers = [_LAYERS[name]() for name in reversed(names)]

    def unpack(self, data: bytes) -> Iterator[bytes]:
        """What `data`, one read, becomes: as it is asked for, in pieces of 1 or 2 MiB at the most. CodingError when it
        cannot be unpacked, or becomes more than 64 MiB."""
        try:
            yield from self._through(0, data, [0])
        except _ERRORS:
            raise CodingError("Its answer is packed, and cannot be unpacked.") from None

    def end(self) -> None:
        """The body has ended. CodingError when that was in the middle of what is packed."""
        if not all(layer.is_whole() for layer in self._layers):
            raise CodingError("Its answer is packed, and broke off.")

    def _through(self, depth: int, data: bytes, total: list[int]) -> Iterator[bytes]:
        if depth == len(self._layers):
            yield data
            return
        for piece in self._layers[depth].unpack(data):
            total[0] += len(piece)
            if total[0] > _MAX_BYTES_FROM_ONE_READ:
                raise CodingError("Its answer is packed too tightly: a few bytes of it become far too many.")
            if piece:
                yield from self._through(depth + 1, piece, total)
