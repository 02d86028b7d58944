"""Somebody who listens, and how a connection to them is made: TCP or a Unix socket, with TLS on it or without."""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import dataclass

import aiohappyeyeballs

from proxy.upstream.tls import TlsFailure

_HAPPY_EYEBALLS_S = 0.25  # RFC 8305 §5


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where somebody listens. `host` is also the name their certificate must have; with a `unix_socket` it and `port`
    say nothing of the way. No `tls`, no encryption."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    unix_socket: str | None = None

    @property
    def authority(self) -> str:
        """`host:port`, an IPv6 address in brackets (RFC 9110 §7.2)."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def connect(self, protocol: asyncio.Protocol) -> asyncio.Transport:
        """A connection that `protocol` gets. OSError when nobody is reached; TlsFailure when somebody is, but TLS does not
        come about."""
        loop = asyncio.get_running_loop()
        sock = await self._reach()
        make = loop.create_connection if self.unix_socket is None else loop.create_unix_connection
        server_hostname = self.host if self.tls is not None else None
        try:
            transport, _ = await make(lambda: protocol, sock=sock, ssl=self.tls, server_hostname=server_hostname)
        except OSError as error:
            if self.tls is None:
                raise
            raise TlsFailure(error) from error
        return transport

    async def connect_through(self, tunnel: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        """The same through a tunnel, which becomes `protocol`'s. TlsFailure when TLS does not come about."""
        if self.tls is None:
            tunnel.set_protocol(protocol)
            protocol.connection_made(tunnel)
            return
        try:
            transport = await asyncio.get_running_loop().start_tls(
                tunnel, protocol, self.tls, server_hostname=self.host
            )
        except OSError as error:
            raise TlsFailure(error) from error
        if transport is None or transport.is_closing():
            raise TlsFailure(ConnectionResetError())
        protocol.connection_made(transport)

    async def _reach(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        if self.unix_socket is None:
            addresses = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            return await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=_HAPPY_EYEBALLS_S, loop=loop)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, self.unix_socket)
        except BaseException:
            sock.close()
            raise
        return sock
