"""Tunnels through an outgoing proxy (RFC 9110 §9.3.6): CONNECT, for http:// and https:// upstreams alike.

An upstream of http:// could also be asked for with the whole URL as target, but then the proxy would read and might
change, cache or hold back what it relays; of a tunnel it knows the two ends.
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from proxy import __version__
from proxy.upstream.endpoint import Endpoint
from proxy.upstream.tls import TlsContexts

_MAX_HEAD_BYTES = 64 * 1024

# RFC 9112 §4 and §5, strictly: CR LF at the end of each line, no line folded.
_HEAD = re.compile(
    rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [^\r\n\0]*)?\r\n(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n)*\r\n"
)


class ProxyRefused(Exception):
    """The proxy answered with a status that opens no tunnel."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class ProxyBroke(Exception):
    """The proxy gave no answer that could be understood. The message says what it did."""


@dataclass(frozen=True, slots=True)
class OutgoingProxy:
    """A proxy, and what is sent to it for permission."""

    endpoint: Endpoint
    authorization: str | None = field(default=None, repr=False)
    """The value of `Proxy-Authorization`."""
    secrets: tuple[str, ...] = field(default=(), repr=False)

    async def tunnel_to(self, authority: str) -> asyncio.Transport:
        """A connection whose other end is the one at `authority`; it still needs a protocol.

        Raises ProxyRefused or ProxyBroke, and what `Endpoint.connect` raises.
        """
        asking = _Asking()
        transport = await self.endpoint.connect(asking)
        try:
            lines = [
                f"CONNECT {authority} HTTP/1.1",
                f"Host: {authority}",
                f"User-Agent: headwater/{__version__}",
                *([f"Proxy-Authorization: {self.authorization}"] if self.authorization else []),
            ]
            transport.write("\r\n".join([*lines, "", ""]).encode())
            await asking.answered
            status = asking.status()
            if not 200 <= status < 300:
                raise ProxyRefused(status)
            if transport.is_closing():
                raise ProxyBroke("closed the tunnel at once")
        except BaseException:
            transport.abort()
            raise
        return transport


def outgoing_proxy(url: str, contexts: TlsContexts) -> OutgoingProxy:
    """The proxy at a URL, with the credentials in it. An https:// one is trusted as the system trusts: `ca_file` and the
    like are about the upstream."""
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    # curl takes 1080 where no port is named, as for SOCKS; Go and all others the scheme's own.
    port = parts.port or (443 if is_tls else 80)
    endpoint = Endpoint(parts.hostname or "", port, contexts.without_files() if is_tls else None)
    if parts.username is None:
        return OutgoingProxy(endpoint)
    password = unquote(parts.password or "")
    token = b64encode(f"{unquote(parts.username)}:{password}".encode()).decode()  # RFC 7617 §2
    return OutgoingProxy(endpoint, f"Basic {token}", tuple(part for part in (password, token) if part))


class _Asking(asyncio.Protocol):
    """Waits for the proxy's answer. `answered` is done when its head is there, or cannot come any more."""

    def __init__(self) -> None:
        self._received = b""
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def status(self) -> int:
        """The status in the answer. ProxyBroke when it is malformed, or has anything behind its head: until we have spoken
        nobody at the other end has anything to say."""
        match = _HEAD.fullmatch(self._received)
        if match is None:
            if not self._received:
                raise ProxyBroke("closed the connection without an answer")
            # A status that refuses has a body, for people to read.
            match = _HEAD.match(self._received)
            if match is None or match[1].startswith(b"2"):
                raise ProxyBroke("gave an answer that is malformed or too long")
        return int(match[1])

    def data_received(self, data: bytes) -> None:
        self._received += data
        if b"\r\n\r\n" in self._received or len(self._received) > _MAX_HEAD_BYTES:
            self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._wake()

    def _wake(self) -> None:
        if not self.answered.done():
            self.answered.set_result(None)
