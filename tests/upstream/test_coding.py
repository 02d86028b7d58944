"""Content codings that nobody asked for: unpacked as they come, in bounded pieces, or refused in plain words."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
import zlib
from collections.abc import Callable

import brotli
import pytest
from backports import zstd

from proxy.upstream.coding import CodingError, Unpacker
from tests.conftest import Proxy, Start
from tests.fakes.upstream import COMPLETION, DONE, FakeUpstream, Received, Wire, answer, finish, role, text
from tests.upstream.conftest import InStep

TEXT = json.dumps(COMPLETION).encode()


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def unpacked(coding: str, *reads: bytes) -> bytes:
    unpacker = Unpacker(coding)
    whole = b"".join(piece for read in reads for piece in unpacker.unpack(read))
    unpacker.end()
    return whole


_PACKED = {
    "gzip": ("gzip", gzip.compress(TEXT)),
    "x-gzip, in two members": ("x-gzip", gzip.compress(TEXT[:50]) + gzip.compress(TEXT[50:])),
    "deflate": ("deflate", zlib.compress(TEXT)),
    "deflate without its wrapper": ("deflate", raw_deflate(TEXT)),
    "deflate that is gzip": ("Deflate", gzip.compress(TEXT)),
    "br": ("br", brotli.compress(TEXT)),
    "zstd": ("zstd", zstd.compress(TEXT)),
    "zstd in two frames and one to skip": (
        "zstd",
        zstd.compress(TEXT[:50]) + b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" + zstd.compress(TEXT[50:]),
    ),
    "gzip in br": ("gzip, br", brotli.compress(gzip.compress(TEXT))),
    "br in zstd, and nothing": (" br,identity ,\tzstd", zstd.compress(brotli.compress(TEXT))),
    "nothing": ("identity", TEXT),
}


@pytest.mark.parametrize(("coding", "packed"), _PACKED.values(), ids=_PACKED.keys())
def test_what_is_packed_comes_out_whole_however_it_is_cut(coding: str, packed: bytes) -> None:
    """RFC 9110 §8.4.1, RFC 1952 §2.2, RFC 8878 §3: and a body may be empty whatever its coding."""
    assert unpacked(coding) == b""
    assert unpacked(coding, *(bytes([byte]) for byte in packed)) == TEXT
    for place in range(len(packed)):
        assert unpacked(coding, packed[:place], packed[place:]) == TEXT


@pytest.mark.parametrize("name", ["gzip", "deflate", "deflate without its wrapper", "br", "zstd", "gzip in br"])
def test_what_ends_in_the_middle_or_goes_on_behind_its_end_is_no_answer(name: str) -> None:
    coding, packed = _PACKED[name]
    for place in range(1, len(packed)):
        with pytest.raises(CodingError, match="broke off"):
            unpacked(coding, packed[:place])
    with pytest.raises(CodingError):
        unpacked(coding, packed, b"and more")


def gzip_bomb() -> bytes:
    """A stretch of zeros, over and over."""
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    first, next_ = (packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + next_ * 256


_BOMBS: dict[str, Callable[[], bytes]] = {
    "gzip": gzip_bomb,
    "zstd": lambda: zstd.compress(bytes(2**20)) * 256,
    "br": lambda: brotli.compress(bytes(2**27), quality=1),
    "gzip, gzip": lambda: gzip.compress(gzip_bomb()),
}


@pytest.mark.parametrize("coding", _BOMBS)
def test_a_bomb_is_not_unpacked_at_one_go(coding: str) -> None:
    read = _BOMBS[coding]()[: 256 * 1024]
    total = largest = 0

    with pytest.raises(CodingError, match="packed too tightly"):
        for piece in Unpacker(coding).unpack(read):
            total += len(piece)
            largest = max(largest, len(piece))

    assert total <= 64 * 2**20
    assert largest <= 2 * 2**20


def test_a_window_larger_than_http_allows_is_refused() -> None:
    """RFC 9659 §3: it is memory that the sender makes us take."""
    # The frame is to say its window and not its size, which could be small: 24 stands for 16 MB.
    options = {int(zstd.CompressionParameter.window_log): 24, int(zstd.CompressionParameter.content_size_flag): 0}
    packer = zstd.ZstdCompressor(options=options)
    packed = packer.compress(bytes(2**10)) + packer.flush()

    with pytest.raises(CodingError, match="cannot be unpacked"):
        unpacked("zstd", packed)


@pytest.mark.parametrize(
    ("coding", "words"),
    [
        ("compress", "packed as 'compress', which was not asked for"),
        ("gzip, lzma", "packed as 'lzma'"),
        ("x" * 1000, f"packed as '{'x' * 20}'"),
        ("gzip, gzip, gzip, gzip", "packed 4 times over"),
    ],
)
def test_what_is_not_known_is_refused_by_name(coding: str, words: str) -> None:
    with pytest.raises(CodingError, match=words):
        Unpacker(coding)


@pytest.mark.parametrize("blocked", ["brotli brotlicffi", "backports.zstd"])
def test_a_coding_whose_library_is_missing_is_refused_by_name(blocked: str) -> None:
    script = f"""
import sys
sys.modules.update(dict.fromkeys({blocked.split()!r}))
from proxy.upstream.coding import CodingError, Unpacker
for coding in ("gzip", "deflate", "br", "zstd"):
    try:
        Unpacker(coding)
    except CodingError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)

    missing = "br" if "brotli" in blocked else "zstd"
    assert run.stdout == f"Its answer is packed as '{missing}', which was not asked for.\n"


def flushing_deflate() -> Callable[[bytes], bytes]:
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    return lambda data: packer.compress(data) + packer.flush(zlib.Z_FINISH if DONE in data else zlib.Z_SYNC_FLUSH)


def flushing_brotli() -> Callable[[bytes], bytes]:
    packer = brotli.Compressor()
    return lambda data: packer.process(data) + (packer.finish() if DONE in data else packer.flush())


def flushing_zstd() -> Callable[[bytes], bytes]:
    packer = zstd.ZstdCompressor()
    return lambda data: packer.compress(data, packer.FLUSH_FRAME if DONE in data else packer.FLUSH_BLOCK)


@pytest.mark.parametrize(
    ("coding", "flushing"), [("gzip", flushing_deflate), ("br", flushing_brotli), ("zstd", flushing_zstd)]
)
async def test_a_packed_stream_comes_event_by_event_and_the_connection_is_kept(
    upstream: FakeUpstream, proxy: Proxy, coding: str, flushing: Callable[[], Callable[[bytes], bytes]]
) -> None:
    async with proxy.get("/v1/models") as response:
        assert response.status == 200
    before = upstream.connections

    for _ in range(2):
        upstream.plays(played := InStep(flushing(), content_encoding=coding))
        await played.is_heard_by(proxy)
        assert (await proxy.ledger.next())["status"] == "ok"

    assert upstream.connections == before


async def test_codings_on_two_lines_are_one_list(upstream: FakeUpstream, proxy: Proxy) -> None:
    """RFC 9110 §5.3."""
    body = brotli.compress(gzip.compress(TEXT))

    async def play(request: Received, wire: Wire) -> None:
        codings = "gzip\r\nContent-Encoding: br"
        await wire.head(content_type="application/json", content_length=str(len(body)), content_encoding=codings)
        await wire.send(body)

    upstream.plays(play)

    assert await proxy.ask() == COMPLETION


async def test_a_packed_body_cut_short_is_a_broken_answer(upstream: FakeUpstream, start: Start) -> None:
    """Its length says that it is whole, and JSON may even end where it was cut."""
    proxy = await start(streaming={"max_retries": 0})
    upstream.plays(answer(gzip.compress(TEXT)[:-8], content_encoding="gzip"), answer())

    async with asyncio.timeout(10), proxy.chat() as response:
        assert response.status == 502
        error = (await response.json())["error"]
    assert (error["code"], error["message"]) == ("upstream_broke", "Its answer is packed, and broke off.")
    assert await proxy.ask() == COMPLETION


async def test_of_an_answer_that_cannot_be_unpacked_nothing_is_relayed(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(InStep(content_encoding="compress"))

    async with asyncio.timeout(10), proxy.chat(stream=True) as response:
        assert response.status == 502
        assert "packed as 'compress'" in (await response.json())["error"]["message"]


async def test_a_stream_cut_short_ends_in_an_error_behind_what_came(upstream: FakeUpstream, proxy: Proxy) -> None:
    pack = flushing_deflate()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream", content_encoding="gzip")
        await wire.chunk(pack(role() + text("Hello")))
        await wire.end()

    upstream.plays(play)

    body = await proxy.stream()

    assert body.startswith(role() + text("Hello"))
    assert b'"code":"upstream_broke"' in body
    assert not body.endswith(DONE)
    assert finish() not in body
