"""Connections to the upstreams: which way one is made, and the pool in which it waits for its next exchange."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from errno import EMFILE, ENFILE

from proxy.errors import OverloadedError, Trouble, UpstreamError
from proxy.upstream.endpoint import Endpoint
from proxy.upstream.http1 import Connection
from proxy.upstream.tls import TlsFailure
from proxy.upstream.tunnel import OutgoingProxy, ProxyBroke, ProxyRefused

# A connection that was idle longer than this may just be being closed by the other side, and is not used again.
MAX_IDLE_S = 30.0

# An older connection is not used again, so that a name that leads to new addresses is followed.
MAX_AGE_S = 300.0


@dataclass(frozen=True, slots=True)
class Origin:
    """An upstream's place, and the way there."""

    name: str
    """The upstream's, for the words of errors: addresses may be secret, and the client need not know them."""
    endpoint: Endpoint
    proxy: OutgoingProxy | None = None

    async def connect(self, protocol: asyncio.Protocol, timeout_s: float) -> None:
        """Give `protocol` a connection, within `timeout_s` for all of it: names, TCP, tunnel, TLS.

        UpstreamError when none comes about; it tells the upstream from the proxy before it. OverloadedError when this process
        may open no more: no upstream is to be avoided for that.
        """
        who, code = f"The upstream '{self.name}'", "upstream"
        if self.proxy is not None:
            who, code = f"The outgoing proxy before the upstream '{self.name}'", "proxy"
        try:
            async with asyncio.timeout(timeout_s):
                if self.proxy is None:
                    await self.endpoint.connect(protocol)
                else:
                    tunnel = await self.proxy.tunnel_to(self.endpoint.authority)
                    who, code = f"The upstream '{self.name}'", "upstream"
                    await self.endpoint.connect_through(tunnel, protocol)
        except TimeoutError as error:
            code = "proxy_timeout" if code == "proxy" else "connect_timeout"
            words = f"{who} did not accept a connection in time."
            raise UpstreamError(504, code, words, trouble=Trouble.SILENT) from error
        except ProxyRefused as error:
            words = f"{who} answered {error.status} and opened no tunnel."
            raise UpstreamError(502, "proxy_refused", words) from error
        except ProxyBroke as error:
            raise UpstreamError(502, "proxy_broke", f"{who} {error}.") from error
        except TlsFailure as error:
            raise UpstreamError(502, f"{code}_tls_error", f"{who} gave no trusted connection: {error}.") from error
        except OSError as error:
            if error.errno in (EMFILE, ENFILE):
                words = "The proxy has as many connections and files open as the system allows."
                raise OverloadedError("too_many_open_files", words) from error
            raise UpstreamError(502, f"{code}_unreachable", f"{who} cannot be reached.") from error


class Pool:
    """The connections to one upstream that wait for their next exchange; the one used last is used first. No limit on
    their number.

    One that was idle for `max_idle_s`, or was made `max_age_s` ago, is closed; nothing is interrupted for that. One timer
    does it for all; it stops when it finds that nothing waits any more. `connect_timeout_s` is for all that making one takes.
    """

    def __init__(
        self,
        origin: Origin,
        connect_timeout_s: float,
        *,
        max_idle_s: float = MAX_IDLE_S,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        self._origin = origin
        self._connect_timeout_s = connect_timeout_s
        self._max_idle_s = max_idle_s
        self._max_age_s = max_age_s
        self._loop = asyncio.get_running_loop()
        self._made_at: dict[Connection, float] = {}
        """All there are, also those in use."""
        self._due_at: dict[Connection, float] = {}
        """Those that wait, and when each is to be closed; the one used last stands last."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def active(self) -> int:
        """How many carry an exchange."""
        return len(self._made_at) - len(self._due_at)

    @property
    def idle(self) -> int:
        return len(self._due_at)

    def take(self) -> Connection | None:
        """A connection that was kept alive, if there is one."""
        while self._due_at:
            connection, due_at = self._due_at.popitem()
            # The timer may be late.
            if connection.is_open() and self._loop.time() < due_at:
                return connection
            connection.abort()
        return None

    async def connect(self) -> Connection:
        """A new connection. UpstreamError or OverloadedError when none can be made."""
        connection = Connection(self)
        await self._origin.connect(connection, self._connect_timeout_s)
        self._made_at[connection] = self._loop.time()
        return connection

    def put(self, connection: Connection) -> None:
        due_at = min(self._loop.time() + self._max_idle_s, self._made_at[connection] + self._max_age_s)
        self._due_at[connection] = due_at
        if self._timer is None or due_at < self._timer.when():
            self._wake_at(due_at)

    def forget(self, connection: Connection) -> None:
        self._made_at.pop(connection, None)
        self._due_at.pop(connection, None)

    def close(self) -> None:
        for connection in list(self._made_at):
            connection.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _reap(self) -> None:
        """Close what has waited long enough, and come back when the next one will have; not while nothing waits."""
        self._timer = None
        now = self._loop.time()
        for connection in [connection for connection, due_at in self._due_at.items() if due_at <= now]:
            del self._due_at[connection]
            connection.abort()
        if self._due_at:
            self._wake_at(min(self._due_at.values()))

    def _wake_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._reap)
