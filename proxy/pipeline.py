"""One call's journey. Read this file first, from top to bottom.

    receive → plan (which targets, how to ask) → send (attempts, failover) → deliver (readers of a log) → settle

A face in `server/` has parsed the request and calls `Pipeline.start`. That makes an `AnswerLog`, and a *producer task*
that owns the upstream connection and fills the log. The face reads the log: as a stream, or as one body. Forward
only: nothing found later changes what was decided before.

The producer task settles the call exactly once, however it ends: done, upstream error, all readers gone, shutdown.

What an upstream can do is learned here, from the answers to the clients' own requests, and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from proxy.answerlog import AnswerLog
from proxy.chat import Ask, Call, ChatRequest, Mode, Outcome, Status, Target, Usage
from proxy.dialects.openai import CHAT_PATH, Refusal, chat_body, error_in_success, refusal
from proxy.encoders import Encoders
from proxy.errors import ClientError, OverloadedError, ProxyError, UpstreamError
from proxy.policy.capabilities import Fact, Key, Topic, looks_buffered, plan
from proxy.policy.routing import Routes
from proxy.pump import Pump
from proxy.settings import Settings
from proxy.store.capabilities import CapabilityStore
from proxy.tasks import Tasks
from proxy.upstream.session import Reply, Upstream, UpstreamSession
from proxy.upstream.watch import Watch
from proxy.wire.chunks import assemble, fill_in, split
from proxy.wire.encoding import dumps, loads
from proxy.wire.headers import header_value, informative_headers
from proxy.wire.normal import Expected, Normalizer, read_usage
from proxy.wire.sse import DONE, EventTooLarge, data_event

_log = logging.getLogger(__name__)

# How long a call waits for another one to find out whether their common, unknown target streams.
_VERDICT_S = 1.0

# Bodies above this are split, assembled and parsed in a thread: 64 KiB are about 2 ms of work.
_LONG_WORK_BYTES = 64 * 1024

Report = Callable[[Outcome], None]


@dataclass(slots=True)
class _Run:
    """What is found out on the way, by the producer task alone; the Outcome is made of it."""

    call_id: str
    model: str
    started: float
    target: Target | None = None
    mode: Mode = Mode.NONE
    attempts: int = 0
    ttft_s: float | None = None
    usage: Usage | None = None
    is_whole: bool = False
    has_begun: bool = False
    is_given_up: bool = False
    is_stopping: bool = False
    http_status: int = 200
    answer: list[bytes] | bytes = field(default_factory=list)
    is_counted: bool = False


def _give_up(task: asyncio.Task[Any], run: _Run) -> None:
    """End a call's task. One that has not had its first turn yet is not cancelled: it would end without settling."""
    run.is_given_up = True
    if run.has_begun:
        task.cancel()


def _ask_otherwise(ask: Ask, error: UpstreamError) -> tuple[Ask, Topic] | None:
    """How to ask again after an error that speaks of how we asked, and what of it; None when there is no other way."""
    match refusal(error):
        case Refusal.STREAM_OPTIONS if ask.usage:
            return ask.without_usage(), Topic.STREAM_OPTIONS
        case Refusal.STREAM if ask.stream and ask.may_fall_back:
            return ask.without_stream(), Topic.STREAMS
    return None


class Pipeline:
    """Takes calls from the faces to the upstreams. One for each server; `report` gets each call's Outcome, once."""

    def __init__(
        self,
        settings: Settings,
        routes: Routes,
        session: UpstreamSession,
        capabilities: CapabilityStore,
        encoders: Encoders,
        tasks: Tasks,
        report: Report,
    ) -> None:
        self._streaming = settings.streaming
        self.routes = routes
        self.session = session
        self._capabilities = capabilities
        self._encoders = encoders
        self._tasks = tasks
        self._report = report
        self._starts: dict[tuple[str, bool], bytes] = {}
        """What the requests to an upstream begin with: those for a stream, and those for one body."""
        self._verdicts: dict[Key, asyncio.Future[None]] = {}
        self._live: dict[asyncio.Task[Any], _Run] = {}
        self._unfinished = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    # ------------------------------------------------------------------ receive, plan

    def start(self, call_id: str, request: ChatRequest, headers: tuple[tuple[str, str], ...]) -> AnswerLog:
        """Begin a call. Its log is to be joined by a reader, and a call that its last reader leaves is cancelled.

        ClientError when no upstream serves the model.
        """
        targets = self.routes.resolve(request.model)
        call = Call(call_id, request, targets, asyncio.get_running_loop().time(), headers)
        log = AnswerLog(self._streaming.max_answer_bytes)
        run = _Run(call_id, request.model, call.started)
        producer = self._tasks.spawn(self._produce(call, log, run), "call")
        self._live[producer] = run
        self._is_idle.clear()
        log.on_left = lambda: None if log.is_closed else _give_up(producer, run)
        return log

    @property
    def in_flight(self) -> int:
        return len(self._live)

    async def drained(self, timeout_s: float) -> None:
        """Wait until no call is in flight, no answer is being delivered and no report is due, for at most `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)

    def begin_delivery(self) -> None:
        """Somebody still writes an answer, though the call that produced it may be settled: until `end_delivery`."""
        self._unfinished += 1
        self._is_idle.clear()

    def end_delivery(self) -> None:
        self._unfinished -= 1
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._live and not self._unfinished:
            self._is_idle.set()

    def stop(self) -> None:
        """End all running calls, as interrupted."""
        for task, run in self._live.items():
            run.is_stopping = True
            _give_up(task, run)

    async def _produce(self, call: Call, log: AnswerLog, run: _Run) -> None:
        watch = Watch(
            self.session.wheel,
            heartbeat_s=self._streaming.heartbeat_interval_s if call.request.wants_stream else 0,
            total_s=self._streaming.total_timeout_s,
            on_silence=log.ping,
        )
        status, error = Status.INTERNAL_ERROR, None
        try:
            run.has_begun = True
            if run.is_given_up:
                raise asyncio.CancelledError
            with watch:
                try:
                    await self._answer(call, log, run, watch)
                except asyncio.CancelledError:
                    watch.raise_if_expired()
                    raise
            log.finish()
            status = Status.OK if run.is_whole else Status.INCOMPLETE
        except ProxyError as failure:
            error = failure
            log.fail(failure)
            status = Status.CLIENT_ERROR if isinstance(failure, ClientError) else Status.UPSTREAM_ERROR
        except asyncio.CancelledError:
            if log.is_closed:
                status = Status.OK if run.is_whole else Status.INCOMPLETE
            elif run.is_stopping:
                error = OverloadedError("shutting_down", "The proxy was stopped before the answer was whole.")
                log.fail(error)
                status = Status.INTERRUPTED
            else:
                status = Status.CANCELLED
            raise
        finally:
            if not log.is_closed:
                log.fail(ProxyError(500, "internal_error", "The proxy failed."))
            run.answer = run.answer or log.segments
            self._settle(run, call.request, status, error, is_committed=log.is_committed)

    # ------------------------------------------------------------------ send

    async def _answer(self, call: Call, log: AnswerLog, run: _Run, watch: Watch) -> None:
        """Ask one target after the other until one answers; nothing is asked again once a byte has gone down."""
        targets = call.targets[: self._streaming.max_retries + 1]
        for target in targets:
            run.target = target
            try:
                await self._ask_target(call, target, log, run, watch)
                return
            except UpstreamError as error:
                if log.is_spent or not error.may_retry or target is targets[-1]:
                    raise
                _log.info("%s: %s answered %s, the next target is asked", call.id, target, error.status)

    async def _ask_target(self, call: Call, target: Target, log: AnswerLog, run: _Run, watch: Watch) -> None:
        """Ask one target, in the way that is known to suit it, and once more in another way where it refuses that."""
        upstream = self.session.upstreams[target.upstream]
        key = Key(upstream.name, target.model, upstream.credential)
        ask = await self._plan(call.request, upstream, key)
        is_probe = ask.is_probe
        refusals: list[tuple[Topic, str]] = []
        try:
            while True:
                log.rewind()
                try:
                    async with await self._send(call, target, upstream, ask, run, watch) as reply:
                        if not 200 <= reply.status < 300:
                            raise await reply.error()
                        for topic, evidence in refusals:
                            self._learn(key, topic, False, evidence)
                        return await self._take(call, key, ask, reply, log, run, watch)
                except UpstreamError as error:
                    if log.is_spent or (other := _ask_otherwise(ask, error)) is None:
                        raise
                    # It is a fact about the target only if the other way works: some errors merely sound like one.
                    ask, refused = other
                    refusals.append((refused, f"answered {error.status}: {error.message}"))
        finally:
            if is_probe:
                self._announce(key)

    async def _plan(self, request: ChatRequest, upstream: Upstream, key: Key) -> Ask:
        """How to ask. Of several calls that know nothing of their target one goes ahead; the others wait a moment."""
        ask = self._plan_now(request, upstream, key)
        if ask.is_probe and (verdict := self._verdicts.get(key)) is not None:
            await asyncio.wait((verdict,), timeout=_VERDICT_S)
            ask = self._plan_now(request, upstream, key)
        if ask.is_probe and key not in self._verdicts:
            self._verdicts[key] = asyncio.get_running_loop().create_future()
        return ask

    def _plan_now(self, request: ChatRequest, upstream: Upstream, key: Key) -> Ask:
        return plan(
            self._capabilities.get(key),
            wants_stream=request.wants_stream,
            setting=upstream.stream,
            force_non_streaming=self._streaming.force_non_streaming,
            enable_fallback=self._streaming.enable_fallback,
            now=time.time(),
            ttl_s=self._streaming.detection_cache_s,
        )

    def _announce(self, key: Key) -> None:
        """Whoever waits to learn whether a target streams need not wait longer."""
        if (verdict := self._verdicts.pop(key, None)) is not None:
            verdict.set_result(None)

    async def _send(self, call: Call, target: Target, upstream: Upstream, ask: Ask, run: _Run, watch: Watch) -> Reply:
        run.attempts += 1
        if ask.stream:
            limit_s, code = self._streaming.first_token_timeout_s, "first_token_timeout"
        else:
            limit_s, code = self._streaming.whole_answer_timeout_s, "whole_answer_timeout"
        watch.limit(limit_s, code, f"The upstream '{upstream.name}' gave no answer within {limit_s:g} s.")
        start = self._starts.get((upstream.name, ask.stream))
        if start is None:
            accept = "text/event-stream" if ask.stream else "application/json"
            headers = {"Content-Type": "application/json", "Accept": accept}
            start = self.session.request_start(upstream, "POST", CHAT_PATH, headers)
            self._starts[upstream.name, ask.stream] = start
        body = chat_body(call.request, target.model, ask)
        return await self.session.ask(upstream, start, (*call.forward_headers, ("x-request-id", call.id)), body, watch)

    # ------------------------------------------------------------------ take what came

    async def _take(
        self, call: Call, key: Key, ask: Ask, reply: Reply, log: AnswerLog, run: _Run, watch: Watch
    ) -> None:
        log.headers = {"x-headwater-target": header_value(str(run.target)), **informative_headers(reply.headers)}
        match await reply.kind():
            case "events":
                if ask.stream:
                    self._learn(key, Topic.STREAMS, True, "answered stream: true with an event stream")
                await self._relay(call, key, ask, reply, log, run, watch)
            case "json":
                await self._take_whole(call, key, ask, reply, log, run, watch)
            case "other":
                what = reply.headers.get("Content-Type", "no content type")
                words = f"The upstream answered with '{what}', which is neither an event stream nor JSON."
                raise UpstreamError(502, "bad_upstream_answer", words)

    async def _relay(
        self, call: Call, key: Key, ask: Ask, reply: Reply, log: AnswerLog, run: _Run, watch: Watch
    ) -> None:
        """The upstream streams: pass its events on as they come, or keep them for a client that wants one body."""
        request = call.request
        request.parsed.forget()
        normalizer = Normalizer(self._expected(call), self._streaming.max_answer_bytes)
        run.mode = Mode.RELAY if request.wants_stream else Mode.WHOLE
        pump = Pump(normalizer, log, watch, self._streaming.idle_timeout_s, commits=request.wants_stream)
        log.source = reply
        try:
            await reply.deliver(pump)
            if not pump.is_over:
                pump.end()
        except EventTooLarge as error:
            raise UpstreamError(
                502, "answer_too_large", f"In the upstream's stream {error}.", may_retry=False
            ) from None
        except UpstreamError:
            # Silence or a break behind the finish reason takes nothing from the answer.
            if not normalizer.is_finished:
                raise
        finally:
            log.source = None
            run.usage = normalizer.usage
            if pump.first_event_at is not None:
                run.ttft_s = pump.first_event_at - run.started
        watch.rest()
        if normalizer.error is not None:
            raise error_in_success(normalizer.error, self._secrets(key)) or UpstreamError(
                502, "upstream_error", "The upstream sent an error without a message."
            )
        if not (normalizer.has_finish or (normalizer.is_done and normalizer.is_meaningful)):
            if pump.rest:
                log.append(pump.rest)
            raise UpstreamError(502, "upstream_broke", "The upstream's stream ended before the answer was whole.")
        if normalizer.malformed:
            _log.warning(
                "%s: %s sent %d malformed events; they were left out", call.id, run.target, normalizer.malformed
            )
        run.is_whole = normalizer.has_finish
        if request.wants_usage or not request.wants_stream:
            if run.usage is None:
                await self._count(run, request, [*log.segments, pump.rest])
            pump.rest += normalizer.usage_event(run.usage)
        if request.wants_stream:
            log.finish(pump.rest + DONE)
        else:
            log.append(pump.rest)
            completion = await self._off_loop(log.size, assemble, log.segments)
            log.put_whole(dumps(completion))
            log.finish()
        self._learn_from_stream(key, ask, normalizer, run, pump.said_at - run.started)
        if normalizer.is_done:
            await reply.read_to_end()

    def _secrets(self, key: Key) -> tuple[str, ...]:
        return self.session.upstreams[key.upstream].secrets

    def _expected(self, call: Call) -> Expected:
        return Expected(
            fallback_id=f"chatcmpl-{call.id}",
            created=int(time.time()),
            model=call.request.model,
            choices=call.request.choices,
            wants_running_usage=call.request.wants_running_usage,
        )

    async def _take_whole(
        self, call: Call, key: Key, ask: Ask, reply: Reply, log: AnswerLog, run: _Run, watch: Watch
    ) -> None:
        """The upstream sent one body: pass it on as it is, or make a stream of it for a client that wants one."""
        request = call.request
        limit_s = self._streaming.whole_answer_timeout_s
        watch.limit(limit_s, "whole_answer_timeout", f"The upstream's answer was not whole within {limit_s:g} s.")
        body = await reply.read_all(self._streaming.max_answer_bytes)
        watch.rest()
        run.ttft_s = asyncio.get_running_loop().time() - run.started
        try:
            value = await self._off_loop(len(body), loads, body)
        except ValueError:
            raise UpstreamError(502, "bad_upstream_answer", "The upstream answered 200 with malformed JSON.") from None
        if not isinstance(value, dict):
            raise UpstreamError(
                502, "bad_upstream_answer", "The upstream answered 200 with JSON that is no completion."
            )
        if (error := error_in_success(value, self._secrets(key))) is not None:
            raise error
        try:
            completion = fill_in(
                value, fallback_id=f"chatcmpl-{call.id}", created=int(time.time()), model=request.model
            )
        except ValueError as problem:
            words = f"The upstream's answer is no completion: {problem}."
            raise UpstreamError(502, "bad_upstream_answer", words) from None
        run.answer = body
        run.usage = read_usage(completion)
        run.is_whole = bool(completion["choices"]) and all(
            choice.get("finish_reason") is not None for choice in completion["choices"]
        )
        if not request.wants_stream:
            run.mode = Mode.WHOLE
            log.put_whole(body)
            return
        if ask.stream:
            self._learn(key, Topic.STREAMS, False, "answered stream: true with one JSON body")
            if not self._streaming.enable_fallback:
                raise UpstreamError(
                    502,
                    "upstream_does_not_stream",
                    "The upstream answered a streaming request with one body, and streaming.enable_fallback is off.",
                )
        run.mode = Mode.SYNTHESIS
        stream = await self._off_loop(len(body), lambda: b"".join(split(completion)))
        if request.wants_usage:
            if run.usage is None:
                # Counting takes its time, and the answer need not wait for it.
                log.append(stream)
                log.commit()
                stream = b""
                await self._count(run, request, body)
            if usage := value.get("usage") or (run.usage and run.usage.as_json()):
                chunk = {name: completion[name] for name in ("id", "created", "model")}
                chunk |= {"object": "chat.completion.chunk", "choices": [], "usage": usage}
                stream += data_event(dumps(chunk))
        # A stream that is too long to be kept is still a status now.
        log.finish(stream + DONE)

    async def _count(self, run: _Run, request: ChatRequest, answer: list[bytes] | bytes) -> None:
        """Count the tokens that nobody told, off the loop. Their number stays unknown where that fails, and nothing else does."""
        run.usage = await self._encoders.estimate(run.model, request, answer)
        run.is_counted = True

    async def _off_loop(self, size: int, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do CPU work here when it is short, in a thread when it would hold up everybody else."""
        if size < _LONG_WORK_BYTES:
            return work(*arguments)
        return await asyncio.to_thread(work, *arguments)

    # ------------------------------------------------------------------ learn

    def _learn(self, key: Key, topic: Topic, value: bool, evidence: str) -> None:
        if topic is Topic.STREAMS:
            self._announce(key)
        now = time.time()
        if self._capabilities.get(key).needs(topic, value, now, self._streaming.detection_cache_s):
            self._capabilities.learn(key, topic, Fact(value, evidence[:200], now))

    def _learn_from_stream(self, key: Key, ask: Ask, normalizer: Normalizer, run: _Run, last_event_s: float) -> None:
        """What a stream that came to its end has shown."""
        if not ask.stream or run.ttft_s is None:
            return
        if ask.usage:
            self._learn(key, Topic.STREAM_OPTIONS, True, "took stream_options")
            has_usage = normalizer.usage is not None
            self._learn(key, Topic.SENDS_USAGE, has_usage, "sent usage" if has_usage else "sent no usage when asked")
        if normalizer.events >= 20:
            buffers = looks_buffered(normalizer.events, run.ttft_s, last_event_s)
            spread_ms = (last_event_s - run.ttft_s) * 1000
            evidence = f"{normalizer.events} events within {spread_ms:.0f} ms, {run.ttft_s:.1f} s after the request"
            self._learn(key, Topic.BUFFERS, buffers, evidence)

    # ------------------------------------------------------------------ settle

    def _settle(
        self, run: _Run, request: ChatRequest | None, status: Status, error: ProxyError | None, *, is_committed: bool
    ) -> None:
        """Close the books on a call. Called once for each, from the `finally` of the task that owns it."""
        task = asyncio.current_task()
        assert task is not None
        self._live.pop(task, None)
        duration_s = asyncio.get_running_loop().time() - run.started
        if error is not None and not is_committed:
            run.http_status = error.status
        elif status is Status.CANCELLED:
            run.http_status = 499  # nginx's name for a client that closed its connection
        if request is not None and run.usage is None and not run.is_counted and run.ttft_s is not None and run.answer:
            self._unfinished += 1
            self._tasks.spawn(self._report_estimated(run, request, status, error, duration_s), "estimate tokens")
        else:
            self._report(self._outcome(run, status, error, duration_s))
        self._note_idle()

    async def _report_estimated(
        self, run: _Run, request: ChatRequest, status: Status, error: ProxyError | None, duration_s: float
    ) -> None:
        """The report of a call whose tokens nobody told: counted after the client has its answer."""
        try:
            await self._count(run, request, run.answer)
        finally:
            self._report(self._outcome(run, status, error, duration_s))
            self._unfinished -= 1
            self._note_idle()

    def _outcome(self, run: _Run, status: Status, error: ProxyError | None, duration_s: float) -> Outcome:
        return Outcome(
            call_id=run.call_id,
            model=run.model,
            target=run.target,
            mode=run.mode,
            status=status,
            http_status=run.http_status,
            attempts=run.attempts,
            ttft_s=run.ttft_s,
            duration_s=duration_s,
            usage=run.usage,
            error=error.word if error is not None else None,
        )

    # ------------------------------------------------------------------ routes that are relayed unread

    @asynccontextmanager
    async def passing(
        self,
        call_id: str,
        target: Target,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
    ) -> AsyncIterator[Reply]:
        """An upstream's reply to a request that is passed on unread, for as long as the block lasts.

        The block reads the reply and writes it to the client; the call is settled when it is left, however that is.
        """
        run = _Run(call_id, target.model, asyncio.get_running_loop().time(), target=target, mode=Mode.PASSTHROUGH)
        task = asyncio.current_task()
        assert task is not None
        run.has_begun = True
        self._live[task] = run
        self._is_idle.clear()
        upstream = self.session.upstreams[target.upstream]
        watch = Watch(
            self.session.wheel, heartbeat_s=0, total_s=self._streaming.total_timeout_s, on_silence=lambda: None
        )
        status: Status = Status.INTERNAL_ERROR
        error: ProxyError | None = None
        try:
            with watch:
                limit_s = self._streaming.whole_answer_timeout_s
                message = f"The upstream '{upstream.name}' gave no answer within {limit_s:g} s."
                watch.limit(limit_s, "whole_answer_timeout", message)
                run.attempts = 1
                start = self.session.request_start(upstream, method, path, headers)
                if body is None and method in ("POST", "PUT", "PATCH"):
                    body = b""
                is_head = method == "HEAD"
                async with await self.session.ask(upstream, start, (), body, watch, has_no_body=is_head) as reply:
                    if reply.status >= 300:
                        raise await reply.error()
                    limit_s = self._streaming.idle_timeout_s
                    watch.limit(limit_s, "idle_timeout", f"The upstream fell silent for {limit_s:g} s in mid-answer.")
                    run.ttft_s = watch.heard_at - run.started
                    run.http_status = reply.status
                    try:
                        yield reply
                    except asyncio.CancelledError:
                        watch.raise_if_expired()
                        raise
            status = Status.OK
        except ProxyError as failure:
            status, error = Status.UPSTREAM_ERROR, failure
            raise
        except (asyncio.CancelledError, ConnectionError, TimeoutError):
            # These are the client's: what upstreams do has become a ProxyError.
            status = Status.INTERRUPTED if run.is_stopping else Status.CANCELLED
            raise
        finally:
            self._settle(run, None, status, error, is_committed=run.ttft_s is not None)
