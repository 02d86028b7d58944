"""The way out: sends requests to upstreams, delivers their answers, and maps what goes wrong to our errors.

Every wait for an upstream is a wait under the call's Watch. A `Reply` owns its connection for as long as its `async with`
block lasts: at the end of its body the connection waits for the next request, anywhere else it is cut,
so that the upstream sees at once that nobody listens.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal
from urllib.parse import unquote, urlsplit

from proxy import __version__
from proxy.dialects.openai import error_from_response
from proxy.errors import UpstreamError
from proxy.settings import Settings, UpstreamSettings
from proxy.upstream.http1 import Exchange, Origin, Pool
from proxy.upstream.watch import Watch

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
    head: bytes = field(repr=False)
    """The headers that are the same for every request, credentials included."""
    secrets: tuple[str, ...] = field(repr=False)
    credential: str


def ready(settings: UpstreamSettings, secret: str | None) -> Upstream:
    """The upstream that the settings describe, with its credentials put into its headers."""
    url = urlsplit(settings.base_url)
    host = url.hostname or ""
    is_tls = url.scheme == "https"
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
        origin=Origin(host, url.port or (443 if is_tls else 80), is_tls),
        base_path=url.path.rstrip("/"),
        stream=settings.stream,
        head="".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode(),
        secrets=secrets,
        credential=hashlib.sha256(repr(secrets).encode()).hexdigest()[:8] if secrets else "none",
    )


Kind = Literal["events", "json", "other"]


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
        content_type = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if content_type == "text/event-stream":
            return "events"
        if content_type.endswith(("/json", "+json")):
            return "json"
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

    async def read_all(self, max_bytes: int) -> bytes:
        """The rest of the body. UpstreamError past `max_bytes`."""
        parts: list[bytes] = []
        size = 0
        while part := await self.read():
            size += len(part)
            if size > max_bytes:
                words = f"The answer is longer than {max_bytes} bytes."
                raise UpstreamError(502, "answer_too_large", words, may_retry=False)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def deliver(self, consume: Callable[[bytes], bool]) -> None:
        """Hand every read to `consume` as it comes, until the body ends or `consume` returns False."""
        if self._first is not None:
            first, self._first = self._first, None
            if first and not consume(first):
                return
        try:
            await self._exchange.deliver(consume)
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
    """All upstreams of one configuration, over one pool of connections. Made and closed on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self.upstreams = {
            upstream.name: ready(upstream, settings.secrets.get(upstream.name)) for upstream in settings.upstream
        }
        self._pool = Pool(settings.streaming.connect_timeout_s, ssl.create_default_context())

    async def ask(
        self, upstream: Upstream, method: str, path: str, body: bytes | None, headers: Mapping[str, str], watch: Watch
    ) -> Reply:
        """Send a request and wait for the head of its answer, whatever its status. `path` is below the base URL.

        A request that died on a kept-alive connection before anything was received is sent once more: the upstream
        had closed that connection and could not have seen it. Never after anything else, for it might be done twice.
        """
        head = _head(upstream, method, path, body, headers)
        try:
            return await self._exchange(upstream, head, body or b"", method == "HEAD", watch)
        except asyncio.CancelledError:
            watch.raise_if_expired()
            raise

    async def _exchange(self, upstream: Upstream, head: bytes, body: bytes, has_no_body: bool, watch: Watch) -> Reply:
        is_repeat = False
        while True:
            try:
                connection = await self._pool.get(upstream.origin, is_fresh=is_repeat)
            except (OSError, TimeoutError) as error:
                raise _not_reached(upstream, error) from error
            is_stale = not connection.is_fresh
            exchange = connection.start(head, body, has_no_body=has_no_body)
            try:
                await exchange.head()
            except UpstreamError as error:
                exchange.close()
                if is_stale and exchange.is_untouched:
                    is_repeat = True
                    continue
                error.message = f"The upstream '{upstream.name}' broke: {error.message}"
                raise
            except asyncio.CancelledError:
                exchange.close()
                raise
            return Reply(exchange, upstream, watch)

    async def close(self) -> None:
        self._pool.close()


def _head(upstream: Upstream, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
    """A request's head. The values come from a parsed request or from us, and hold no line end."""
    has_length = body is not None or method in ("POST", "PUT", "PATCH")
    length = f"Content-Length: {len(body or b'')}\r\n" if has_length else ""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    first = f"{method} {upstream.base_path}{path} HTTP/1.1\r\n"
    return first.encode() + upstream.head + f"{lines}{length}\r\n".encode("utf-8", "surrogateescape")


def _not_reached(upstream: Upstream, error: BaseException) -> UpstreamError:
    """What kept us from a connection, without the address: it may hold credentials, and the client need not know it."""
    match error:
        case TimeoutError():
            words = f"The upstream '{upstream.name}' did not accept a connection in time."
            return UpstreamError(504, "connect_timeout", words)
        case ssl.SSLError():
            return UpstreamError(502, "upstream_tls_error", f"No trusted connection to the upstream '{upstream.name}'.")
    return UpstreamError(502, "upstream_unreachable", f"The upstream '{upstream.name}' cannot be reached.")
