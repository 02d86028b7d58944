"""The way out: sends requests to upstreams, delivers their answers, and maps what goes wrong to our errors.

Every wait for an upstream is a wait under the call's Watch. A `Reply` owns its connection for as long as its `async with`
block lasts: at the end of its body the connection waits for the next request, anywhere else it is cut,
so that the upstream sees at once that nobody listens.
"""

from __future__ import annotations

import asyncio
import hashlib
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Literal
from urllib.parse import unquote, urlsplit

from proxy import __version__
from proxy.dialects.openai import error_from_response
from proxy.errors import Trouble, UpstreamError
from proxy.policy.retries import NO_CREDENTIAL
from proxy.settings import Settings, UpstreamSettings
from proxy.upstream.endpoint import Endpoint
from proxy.upstream.http1 import Consumer, Exchange
from proxy.upstream.pool import Origin, Pool
from proxy.upstream.tls import TlsContexts
from proxy.upstream.tunnel import OutgoingProxy, outgoing_proxy
from proxy.upstream.watch import Watch, Wheel

_MAX_ERROR_BYTES = 256 * 1024
_SNIFF_BYTES = 6
_MAX_BLANK_BYTES = 4096
_TRAILING_S = 1.0


@dataclass(frozen=True, slots=True)
class Upstream:
    """One upstream, ready to be asked. `credential` is a fingerprint of its key: it tells keys apart, and tells nothing."""

    name: str
    origin: Origin
    base_path: str
    stream: Literal["auto", "always", "never"]
    prefill: Literal["auto", "prefix", "continue_final_message", "never"]
    head: bytes = field(repr=False)
    """The headers that are the same for every request, credentials included."""
    secrets: tuple[str, ...] = field(repr=False)
    credential: str


def ready(
    settings: UpstreamSettings, secret: str | None, contexts: TlsContexts, proxy: OutgoingProxy | None
) -> Upstream:
    """The upstream that the settings describe, with its credentials put into its headers."""
    url = urlsplit(settings.base_url)
    endpoint = Endpoint(
        host=url.hostname or "",
        port=url.port or (443 if url.scheme == "https" else 80),
        tls=contexts.of(settings),
        unix_socket=str(settings.unix_socket) if settings.unix_socket is not None else None,
    )
    headers = {
        "Host": url.netloc.rpartition("@")[2],
        "User-Agent": f"headwater/{__version__}",
        "Accept-Encoding": "identity",
    }
    secrets = tuple(part for part in (secret, unquote(url.password or "")) if part)
    if secret:
        headers["Authorization"] = f"Bearer {secret}"
    elif url.username is not None:
        pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
        token = b64encode(pair.encode()).decode()
        headers["Authorization"] = f"Basic {token}"
        secrets = (*secrets, token)
    return Upstream(
        name=settings.name,
        origin=Origin(settings.name, endpoint, proxy),
        base_path=url.path.rstrip("/"),
        stream=settings.stream,
        prefill=settings.prefill,
        head="".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode(),
        secrets=(*secrets, *(proxy.secrets if proxy is not None else ())),
        credential=hashlib.sha256(repr(secrets).encode()).hexdigest()[:8] if secrets else NO_CREDENTIAL,
    )


Kind = Literal["events", "json", "other"]


@lru_cache(maxsize=256)
def _kind_of(content_type: str) -> Kind | None:
    content_type = content_type.partition(";")[0].strip().lower()
    if content_type == "text/event-stream":
        return "events"
    return "json" if content_type.endswith(("/json", "+json")) else None


class Reply:
    """An upstream's answer: its head is here, its body still comes. Raises only UpstreamError."""

    __slots__ = ("_exchange", "_first", "_upstream", "_watch")

    def __init__(self, exchange: Exchange, upstream: Upstream, watch: Watch) -> None:
        self._exchange = exchange
        self._upstream = upstream
        self._watch = watch
        self._first: bytes | None = None

    @property
    def status(self) -> int:
        return self._exchange.status

    @property
    def headers(self) -> Mapping[str, str]:
        return self._exchange.headers

    async def kind(self) -> Kind:
        """What the body is: by its content type or, where that says nothing, by its first bytes."""
        return _kind_of(self.headers.get("Content-Type", "")) or await self._sniff()

    async def _sniff(self) -> Kind:
        read = start = b""
        while len(start) < _SNIFF_BYTES and len(read) < _MAX_BLANK_BYTES and (data := await self.read()):
            read += data
            start = read.lstrip(b"\xef\xbb\xbf \r\n\t")[:_SNIFF_BYTES]
        self._first = read
        if start.startswith((b"data:", b"event:", b"id:", b"retry:", b":")):
            return "events"
        return "json" if start.startswith(b"{") else "other"

    async def read(self) -> bytes:
        """The next bytes, whatever has come; empty at the end of the body."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            return await self._exchange.read()
        except asyncio.CancelledError:
            self._watch.raise_if_expired()
            raise

    @contextmanager
    def awaiting_client(self) -> Iterator[None]:
        """While the block lasts it is the client that is waited for: no limit of the upstream runs."""
        self._watch.is_paused = True
        yield
        self._watch.touch()
        self._watch.is_paused = False

    @property
    def is_complete(self) -> bool:
        """Whether all of the body is here, and nothing more is to be waited for."""
        return self._exchange.is_complete

    async def read_all(self, max_bytes: int) -> bytes:
        """The rest of the body. UpstreamError past `max_bytes`."""
        if self._first is None and (body := self._exchange.whole_body()) is not None:
            if len(body) > max_bytes:
                raise _too_long(max_bytes)
            return body
        parts: list[bytes] = []
        size = 0
        while part := await self.read():
            size += len(part)
            if size > max_bytes:
                raise _too_long(max_bytes)
            parts.append(part)
        return b"".join(parts)

    async def deliver(self, consumer: Consumer) -> None:
        """Feed every read to `consumer` as it comes, until the body ends or `feed` returns False."""
        if self._first is not None:
            first, self._first = self._first, None
            if first and not consumer.feed(first):
                return
        try:
            await self._exchange.deliver(consumer)
        except asyncio.CancelledError:
            self._watch.raise_if_expired()
            raise

    def pause_reading(self) -> None:
        """The client is to be waited for: take no more from the upstream, and let no limit of its run."""
        self._watch.is_paused = True
        self._exchange.pause_reading()

    def resume_reading(self) -> None:
        self._watch.touch()
        self._watch.is_paused = False
        self._exchange.resume_reading()

    async def error(self) -> UpstreamError:
        """What an answer with an error status says."""
        try:
            body = await self.read_all(_MAX_ERROR_BYTES)
        except UpstreamError:
            body = b""
        return error_from_response(self.status, self.headers, body, self._upstream.secrets)

    async def read_to_end(self) -> None:
        """Read the little that may stand behind `[DONE]`, so that the connection can be used again; not for long."""
        if self._exchange.whole_body() is not None:
            return
        try:
            async with asyncio.timeout(_TRAILING_S):
                for _ in range(16):
                    if not await self.read():
                        return
        except (TimeoutError, UpstreamError):
            return

    async def __aenter__(self) -> Reply:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exchange.close()


class UpstreamSession:
    """All upstreams of one configuration, each with its pool of connections. Made and closed on the event loop.

    ConfigError when a file with certificates or keys cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        contexts = TlsContexts(settings.upstream)
        proxies = {name: outgoing_proxy(url, contexts) for name, url in settings.proxies.items()}
        self.upstreams = {
            upstream.name: ready(upstream, settings.secrets.get(upstream.name), contexts, proxies.get(upstream.name))
            for upstream in settings.upstream
        }
        self.wheel = Wheel()
        self._pools = {
            name: Pool(upstream.origin, settings.streaming.connect_timeout_s)
            for name, upstream in self.upstreams.items()
        }

    def request_start(self, upstream: Upstream, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        """The part of a request's head that many requests have in common. `path` is below the base URL."""
        first = f"{method} {upstream.base_path}{path} HTTP/1.1\r\n".encode()
        return first + upstream.head + _lines(headers.items())

    async def ask(
        self,
        upstream: Upstream,
        start: bytes,
        headers: Iterable[tuple[str, str]],
        body: bytes | None,
        watch: Watch,
        *,
        has_no_body: bool = False,
    ) -> Reply:
        """Send a request and wait for the head of its answer, whatever its status.

        `start` comes from `request_start`; `has_no_body` says that the answer has none, as to HEAD. A request that died
        on a kept-alive connection before anything was received is sent once more: the upstream had closed that
        connection and could not have seen it. Never after anything else, for it might be done twice.
        """
        head = start + _lines(headers)
        head += b"\r\n" if body is None else b"Content-Length: %d\r\n\r\n" % len(body)
        pool = self._pools[upstream.name]
        is_repeat = False
        exchange: Exchange | None = None
        try:
            while True:
                connection = None if is_repeat else pool.take()
                if connection is None:
                    connection = await pool.connect()
                exchange = connection.start(head, body or b"", has_no_body=has_no_body)
                try:
                    await exchange.head()
                except UpstreamError as error:
                    is_repeat = exchange.is_untouched and not connection.is_fresh
                    exchange.close()
                    if is_repeat:
                        continue
                    error.message = f"The upstream '{upstream.name}' broke: {error.message}"
                    raise
                return Reply(exchange, upstream, watch)
        except asyncio.CancelledError:
            if exchange is not None:
                exchange.close()
            watch.raise_if_expired()
            raise

    def connections(self) -> Iterator[tuple[str, int, int]]:
        """For each upstream, its name and how many connections to it carry an exchange, and how many wait for one."""
        for name, pool in self._pools.items():
            yield name, pool.active, pool.idle

    async def close(self) -> None:
        self.wheel.close()
        for pool in self._pools.values():
            pool.close()


def _too_long(max_bytes: int) -> UpstreamError:
    words = f"The answer is longer than {max_bytes} bytes."
    return UpstreamError(502, "answer_too_large", words, trouble=Trouble.FINAL)


def _lines(headers: Iterable[tuple[str, str]]) -> bytes:
    """Header lines. The values come from a parsed request or from us, and hold no line end."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers]).encode("utf-8", "surrogateescape")
