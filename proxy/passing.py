"""Requests that are passed on unread: every route of an upstream that is not the chat's. One attempt, both ways as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from proxy.chat import LEFT_STATUS, Mode, Outcome, Status, Target, Ticket, Usage, status_of
from proxy.errors import ProxyError
from proxy.inflight import InFlight
from proxy.settings import Settings
from proxy.upstream.session import Reply, UpstreamSession
from proxy.upstream.watch import Watch
from proxy.wire.usage import BEGINNING_BYTES, END_BYTES, usage_at_ends


class Passed:
    """An upstream's reply on its way through. Nothing of it is read but, at its ends, what it says of its usage."""

    def __init__(self, reply: Reply) -> None:
        self.status = reply.status
        self.headers = reply.headers
        self.awaiting_client = reply.awaiting_client
        self._reply = reply
        self._head, self._tail = b"", bytearray()

    async def read(self) -> bytes:
        """The next bytes of its body; b"" at the end."""
        data = await self._reply.read()
        if len(self._head) < BEGINNING_BYTES:
            self._head += data[: BEGINNING_BYTES - len(self._head)]
        self._tail += data
        if len(self._tail) > 2 * END_BYTES:
            del self._tail[:-END_BYTES]
        return data

    def usage(self, *, is_whole: bool) -> Usage | None:
        """What it took, as far as that is told. Of one that was cut short only what it said last can be that of all."""
        end = self._tail[-(END_BYTES if is_whole else BEGINNING_BYTES) :]
        return usage_at_ends(self._head, bytes(end))


class Passing:
    """Passes requests on. One for each server; `report` gets each one's Outcome, once."""

    def __init__(
        self, settings: Settings, session: UpstreamSession, in_flight: InFlight, report: Callable[[Outcome], None]
    ) -> None:
        self._streaming = settings.streaming
        self._session = session
        self._in_flight = in_flight
        self._report = report

    @asynccontextmanager
    async def pass_on(
        self,
        call_id: str,
        target: Target,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        ticket: Ticket | None = None,
    ) -> AsyncIterator[Passed]:
        """An upstream's reply, for as long as the block lasts. UpstreamError for one with an error status.

        The block reads the reply and writes it to the client; the call is settled when it is left, however that is.
        """
        task = asyncio.current_task()
        assert task is not None
        is_stopping = False

        def stop() -> None:
            nonlocal is_stopping
            is_stopping = True
            task.cancel()

        self._in_flight.enter(task, stop)
        upstream = self._session.upstreams[target.upstream]
        started = self._session.wheel.now()
        ttft_s: float | None = None
        passed: Passed | None = None
        attempts = 0
        http_status = 200
        watch = Watch(
            self._session.wheel, heartbeat_s=0, total_s=self._streaming.total_timeout_s, on_silence=lambda: None
        )
        status: Status = Status.INTERNAL_ERROR
        error: ProxyError | None = None
        try:
            with watch:
                if ticket is not None:
                    await ticket.open((target,))
                limit_s = self._streaming.whole_answer_timeout_s
                message = f"The upstream '{upstream.name}' gave no answer within {limit_s:g} s."
                watch.limit(limit_s, "whole_answer_timeout", message)
                attempts = 1
                start = self._session.request_start(upstream, method, path, headers)
                if body is None and method in ("POST", "PUT", "PATCH"):
                    body = b""
                is_head = method == "HEAD"
                async with await self._session.ask(upstream, start, (), body, watch, has_no_body=is_head) as reply:
                    if reply.status >= 300:
                        raise await reply.error()
                    limit_s = self._streaming.idle_timeout_s
                    watch.limit(limit_s, "idle_timeout", f"The upstream fell silent for {limit_s:g} s in mid-answer.")
                    ttft_s = watch.heard_at - started
                    http_status = reply.status
                    try:
                        passed = Passed(reply)
                        yield passed
                    except asyncio.CancelledError:
                        watch.raise_if_expired()
                        raise
            status = Status.OK
        except ProxyError as failure:
            status, error = status_of(failure), failure
            raise
        except (asyncio.CancelledError, ConnectionError, TimeoutError):
            # These are the client's: what upstreams do has become a ProxyError.
            status = Status.INTERRUPTED if is_stopping else Status.CANCELLED
            raise
        finally:
            if error is not None and ttft_s is None:
                http_status = error.status
            elif status is Status.CANCELLED:
                http_status = LEFT_STATUS
            self._report(
                Outcome(
                    call_id=call_id,
                    model=target.model,
                    target=target,
                    mode=Mode.PASSTHROUGH,
                    status=status,
                    http_status=http_status,
                    attempts=attempts,
                    ttft_s=ttft_s,
                    duration_s=self._session.wheel.now() - started,
                    # Who reads what was made before, or deletes it, is told again what that took.
                    usage=passed.usage(is_whole=status is Status.OK)
                    if passed is not None and method == "POST"
                    else None,
                    error=error.word if error is not None else None,
                    ticket=ticket,
                )
            )
            self._in_flight.leave(task)
