"""The making of one answer: from its targets to the end of its log.

    plan (how to ask) → send → take (relay a stream, or make one of a body) → recover what breaks midway → finish

`Producer.produce` runs in the answer's own task. It asks one target after the other, in the ways that suit each, until one
has given the whole answer; what a failure is worth is decided in `policy/retries`. Once clients have a part of the answer, a
further attempt must first say that part again (`recovery.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from proxy.answerlog import AnswerLog
from proxy.answers import Answer, Answers
from proxy.chat import Ask, Mode, Target, Usage
from proxy.dialects.openai import CHAT_PATH, Refusal, chat_body, error_in_success, refusal
from proxy.encoders import Encoders
from proxy.errors import Trouble, UpstreamError
from proxy.histogram import BOUNDS_S, Histogram
from proxy.learning import Learning
from proxy.policy.capabilities import Key, Topic
from proxy.pump import Outlet, Pump, Unsaid
from proxy.recovery import Recovery
from proxy.settings import Settings
from proxy.tasks import LONG_WORK_BYTES, off_loop
from proxy.upstream.attempts import Attempts
from proxy.upstream.circuits import Circuits
from proxy.upstream.session import Reply, Upstream, UpstreamSession
from proxy.upstream.watch import Watch
from proxy.wire.chunks import assemble, fill_in, split, usage_event
from proxy.wire.encoding import dumps, loads
from proxy.wire.headers import header_value, informative_headers
from proxy.wire.normal import Expected, Normalizer, renaming
from proxy.wire.splice import Diverged, said
from proxy.wire.sse import EventTooLarge
from proxy.wire.usage import read_usage

_log = logging.getLogger(__name__)

# How long a continuation waits to learn how many tokens there are already: a good guess is not worth a long pause.
_COUNT_S = 1.0

# How long the end of an answer waits for its usage, behind others that are counted. A megabyte takes a quarter of a second.
_USAGE_S = 15.0


@dataclass(slots=True)
class _Job:
    """An answer in the making, and what its making needs."""

    answer: Answer
    watch: Watch
    attempts: Attempts
    recovery: Recovery | None = None
    said_by: tuple[Target | None, str | None, Mode, Usage | None] = (None, None, Mode.NONE, None)
    """Who said what broke, as which model and in which way, and what that took."""
    manners: dict[Target, tuple[Ask, list[tuple[Topic, str]]]] = field(default_factory=dict)
    """How to ask the targets that refused how they were asked, and what of it they refused."""
    convert: Callable[[bytes], bytes] | None = None
    """What the events of this attempt go through on their way to the clients."""


@lru_cache(maxsize=1024)
def _target_value(target: Target) -> str:
    return header_value(str(target))


def _ask_otherwise(ask: Ask, error: UpstreamError) -> tuple[Ask, Topic] | None:
    """How to ask again after an error that speaks of how we asked, and what of it; None when there is no other way."""
    match refusal(error):
        case Refusal.STREAM_OPTIONS if ask.usage:
            return ask.without_usage(), Topic.STREAM_OPTIONS
        case Refusal.STREAM if ask.stream and ask.may_fall_back:
            return ask.without_stream(), Topic.STREAMS
    if ask.partial and error.trouble in (Trouble.REQUEST, Trouble.CONTEXT):
        return ask.without_partial(), Topic.PREFILL
    return None


def _of_both_parts(usage: Usage, ask: Ask) -> Usage:
    """The usage of a continuation, with what was given to be continued as a part of the answer, not of the question."""
    return replace(
        usage,
        prompt=max(0, usage.prompt - ask.partial_tokens),
        completion=usage.completion + ask.partial_tokens,
        estimated=True,
    )


class Producer:
    """Makes answers. One for each server."""

    def __init__(
        self,
        settings: Settings,
        session: UpstreamSession,
        circuits: Circuits,
        learning: Learning,
        encoders: Encoders,
        answers: Answers,
    ) -> None:
        self._streaming = settings.streaming
        self._session = session
        self._circuits = circuits
        self._learning = learning
        self._encoders = encoders
        self._answers = answers
        self._now = asyncio.get_running_loop().time
        self.gaps = Histogram(BOUNDS_S)
        """The seconds between the pieces of upstreams' streams; their sum grows when a stream ends."""
        self._starts: dict[tuple[str, bool], bytes] = {}
        """What the requests to an upstream begin with: those for a stream, and those for one body."""

    async def produce(self, answer: Answer, watch: Watch) -> None:
        """Make the answer and close its log. Raises UpstreamError, or ClientError, when there will be none."""
        attempts = Attempts(answer.call.route, self._circuits, self._streaming.max_retries, self._now)
        job = _Job(answer, watch, attempts)
        try:
            while True:
                answer.target = attempts.target
                try:
                    with attempts:
                        await self._ask_target(job)
                    return
                except Diverged as reason:
                    assert job.recovery is not None
                    _log.info("%s: what broke was not saved: %s", answer.call.id, reason)
                    raise job.recovery.error from None
                except UpstreamError as error:
                    await self._go_on(job, error)
        finally:
            if answer.meter is not None:
                answer.meter.close()
            if job.recovery is not None and not job.recovery.is_caught_up:
                # Clients have nothing of who was to save it, nor is what that one took, at its price, theirs.
                answer.target, answer.model, answer.mode, answer.usage = job.said_by
                answer.finish_reason = None

    async def _go_on(self, job: _Job, error: UpstreamError) -> None:
        """Wait for the next attempt. Raises the error that clients are to be told when there is none."""
        answer = job.answer
        job.watch.lift()
        job.convert = None
        await answer.passed()
        if is_midway := bool(answer.log.segments):
            answer.has_broken = True
            if job.recovery is None or job.recovery.is_caught_up:
                job.said_by = answer.target, answer.model, answer.mode, answer.usage
            if job.recovery is None:
                deadline = self._now() + self._streaming.recovery_timeout_s
                setting = answer.call.route.recovery
                job.recovery = Recovery(error, setting=setting, deadline=deadline, now=self._now)
            if answer.call.route.recovery == "off":
                raise error
            if not job.recovery.take(await off_loop(answer.log.size, said, answer.log.segments)):
                raise job.recovery.error
            budget_s = job.recovery.left_s
        else:
            budget_s = answer.call.started + self._streaming.first_token_timeout_s - self._now()
        asked = answer.target
        try:
            await job.attempts.after(error, self._session.upstreams, is_midway=is_midway, budget_s=budget_s)
        except UpstreamError:
            if job.recovery is not None:
                raise job.recovery.error from None
            raise
        if not is_midway:
            # Nothing of it will be told, nor booked on the next target.
            answer.draft, answer.body, answer.usage, answer.told = None, b"", None, None
            answer.mode, answer.first_at = Mode.NONE, None
            answer.model = answer.finish_reason = None
        _log.info("%s: %s failed (%s), %s is asked", answer.call.id, asked, error.word, job.attempts.target)

    # ------------------------------------------------------------------ plan, send

    async def _ask_target(self, job: _Job) -> None:
        """Ask one target, in the way that is known to suit it, and once more in another way where it refuses that."""
        answer, target = job.answer, job.attempts.target
        upstream = self._session.upstreams[target.upstream]
        key = Key(upstream.name, target.model, upstream.credential)
        if target in job.manners:
            ask, refusals = job.manners[target]
        else:
            wants_stream = answer.call.request.wants_stream
            ask, refusals = await self._learning.plan(upstream, key, wants_stream=wants_stream), []
        if job.recovery is not None:
            ask = await self._continuing(ask, job, job.recovery, upstream, key)
        is_probe = ask.is_probe
        has_said = len(answer.log.segments)
        try:
            while True:
                try:
                    async with await self._send(job, upstream, ask) as reply:
                        if not 200 <= reply.status < 300:
                            raise await reply.error()
                        for topic, evidence in refusals:
                            self._learning.learn(key, topic, False, evidence)
                        return await self._take(job, key, ask, reply)
                except UpstreamError as error:
                    if len(answer.log.segments) > has_said or (other := _ask_otherwise(ask, error)) is None:
                        raise
                    # It is a fact about the target only if the other way works: some errors merely sound like one.
                    ask, refused = other
                    refusals.append((refused, f"answered {error.status}: {error.message}"))
                    job.manners[target] = (ask.without_partial(), refusals)
        finally:
            if is_probe:
                self._learning.announce(key)

    async def _continuing(self, ask: Ask, job: _Job, recovery: Recovery, upstream: Upstream, key: Key) -> Ask:
        """The same, with what was said already to be continued, where that is wished and not known to be refused."""
        begun = recovery.partial
        if not begun or upstream.prefill == "never" or self._learning.knows(key, Topic.PREFILL) is False:
            return ask
        answer = job.answer
        counted = None
        with suppress(TimeoutError):
            async with asyncio.timeout(min(_COUNT_S, max(0.0, recovery.left_s))):
                counted = await self._encoders.estimate(answer.call.request.model, answer.call.request, answer.said)
        # Four characters a token is what English has.
        return ask.continuing(begun, counted.completion if counted is not None else len(begun) // 4)

    async def _send(self, job: _Job, upstream: Upstream, ask: Ask) -> Reply:
        answer, watch, target = job.answer, job.watch, job.attempts.target
        answer.attempts += 1
        answer.asked_at = self._now()
        if ask.stream:
            limit_s, code = self._streaming.first_token_timeout_s, "first_token_timeout"
        else:
            limit_s, code = self._streaming.whole_answer_timeout_s, "whole_answer_timeout"
        watch.limit(limit_s, code, f"The upstream '{upstream.name}' gave no answer within {limit_s:g} s.")
        self._limit_recovery(job, limit_s)
        start = self._starts.get((upstream.name, ask.stream))
        if start is None:
            accept = "text/event-stream" if ask.stream else "application/json"
            headers = {"Content-Type": "application/json", "Accept": accept}
            start = self._session.request_start(upstream, "POST", CHAT_PATH, headers)
            self._starts[upstream.name, ask.stream] = start
        call = answer.call
        body = chat_body(call.request, target.model, ask, upstream.prefill)
        return await self._session.ask(upstream, start, (*call.forward_headers, ("x-request-id", call.id)), body, watch)

    def _limit_recovery(self, job: _Job, limit_s: float) -> None:
        """Where the time for recovery is over sooner than `limit_s`, that is the limit."""
        if job.recovery is not None and job.recovery.left_s < limit_s:
            words = "The answer could not be saved in time."
            job.watch.limit(max(0.0, job.recovery.left_s), "recovery_timeout", words, Trouble.FINAL)

    # ------------------------------------------------------------------ take what came

    async def _take(self, job: _Job, key: Key, ask: Ask, reply: Reply) -> None:
        answer = job.answer
        answer.draft, answer.body = None, b""
        if job.recovery is not None:
            job.recovery.begin(is_continuation=bool(ask.partial))
        if not answer.log.is_committed:
            answer.log.headers = {
                **answer.head,
                "x-headwater-target": _target_value(job.attempts.target),
                "x-headwater-attempts": str(answer.attempts),
                **informative_headers(reply.headers),
            }
        match await reply.kind():
            case "events":
                if ask.stream:
                    self._learning.learn(key, Topic.STREAMS, True, "answered stream: true with an event stream")
                await self._relay(job, key, ask, reply)
            case "json":
                await self._take_whole(job, key, ask, reply)
            case "other":
                what = reply.headers.get("Content-Type", "no content type")
                words = f"The upstream answered with '{what}', which is neither an event stream nor JSON."
                raise UpstreamError(502, "bad_upstream_answer", words)

    async def _relay(self, job: _Job, key: Key, ask: Ask, reply: Reply) -> None:
        """The upstream streams: pass its events on as they come, or keep them for clients that want all at once."""
        answer, watch, log = job.answer, job.watch, job.answer.log
        request = answer.call.request
        request.parsed.forget()
        normalizer = Normalizer(self._expected(answer), self._streaming.max_answer_bytes)
        answer.mode = Mode.RELAY if request.wants_stream else Mode.WHOLE
        if answer.delivers_whole or not request.wants_stream:
            answer.draft = AnswerLog(self._streaming.max_answer_bytes)
        pump = Pump(normalizer, watch, partial(self._begin, job, normalizer, reply), self.gaps.counts)
        try:
            await reply.deliver(pump)
            if not pump.is_over:
                pump.end()
        except EventTooLarge as error:
            words = f"In the upstream's stream {error}."
            raise UpstreamError(502, "answer_too_large", words, trouble=Trouble.FINAL) from None
        except UpstreamError:
            # Silence or a break behind the finish reason takes nothing from the answer.
            if not normalizer.is_finished:
                raise
        finally:
            log.source = None
            if pump.first_event_at is not None:
                self.gaps.total += pump.said_at - pump.first_event_at
            is_cut = not (normalizer.has_finish or normalizer.is_done)
            # What is not that of all that was said, but of less, or of what a client had before: that is counted.
            is_of_all = not (normalizer.says_more or (is_cut and job.recovery is not None))
            answer.usage = normalizer.usage if is_of_all else None
            if job.recovery is None:
                answer.told = normalizer.usage
            answer.model, answer.finish_reason = normalizer.model, normalizer.finish_reason
        watch.rest()
        if normalizer.error is not None:
            raise error_in_success(normalizer.error, self._secrets(key)) or UpstreamError(
                502, "upstream_error", "The upstream sent an error without a message."
            )
        last = pump.rest if job.convert is None else job.convert(pump.rest)
        is_over = normalizer.has_finish or (normalizer.is_done and normalizer.is_meaningful)
        if last and (answer.draft is not None or answer.meter is not None or answer.usage is None or not is_over):
            # It is counted with the rest, and need not wait for that.
            answer.say(last)
            last = b""
        await answer.passed()
        if not is_over:
            raise UpstreamError(502, "upstream_broke", "The upstream's stream ended before the answer was whole.")
        if job.recovery is not None:
            job.recovery.end()
        if normalizer.malformed:
            _log.warning(
                "%s: %s sent %d malformed events; they were left out",
                answer.call.id,
                answer.target,
                normalizer.malformed,
            )
        answer.is_whole = normalizer.has_finish
        answer.is_mended = normalizer.malformed > 0
        self._answers.withdraw(answer)
        usage = await self._usage_event(job, ask, normalizer)
        await self._finish(job, last, usage if job.convert is None else job.convert(usage))
        if ask.partial:
            self._learning.learn(key, Topic.PREFILL, True, "went on from a part of an answer")
        if ask.stream and ask.usage:
            self._learning.learn_usage(key, has_usage=normalizer.usage is not None)
        if ask.stream and pump.first_event_at is not None:
            first_s, last_s = pump.first_event_at - answer.asked_at, pump.said_at - answer.asked_at
            self._learning.learn_times(key, normalizer.events, first_s, last_s)
        if normalizer.is_done:
            await reply.read_to_end()

    def _begin(self, job: _Job, normalizer: Normalizer, reply: Reply, pump: Pump) -> Outlet:
        """The first event that means something is here: where it goes, and what its clients learn first."""
        answer, watch, log = job.answer, job.watch, job.answer.log
        job.attempts.note_life()
        self._limit_silence(watch)
        if job.recovery is not None:
            self._limit_recovery(job, self._streaming.idle_timeout_s)
            watch.follow(Unsaid(pump))
            job.convert = job.recovery.feed
            return lambda segment: self._catch_up(job, pump, reply, segment)
        answer.first_at = pump.first_event_at
        if not log.is_committed:
            self._name(answer, normalizer.id)
        if answer.id != normalizer.id:
            job.convert = renaming(normalizer.id, answer.id)
        if answer.draft is not None:
            watch.follow(Unsaid(pump))
        else:
            watch.follow(pump)
            log.source = reply
            log.commit()
        say = answer.say if answer.meter is not None else (log if answer.draft is None else answer.draft).append
        convert = job.convert
        return say if convert is None else lambda segment: say(convert(segment))

    def _catch_up(self, job: _Job, pump: Pump, reply: Reply, segment: bytes) -> None:
        """Pass on what the clients do not have yet; when it has come so far, the stream is like any other."""
        assert job.recovery is not None
        was_caught_up = job.recovery.is_caught_up
        fresh = job.recovery.feed(segment)
        if job.recovery.is_caught_up and not was_caught_up:
            self._limit_silence(job.watch)
            job.watch.follow(pump)
            job.answer.log.source = reply
        elif not was_caught_up:
            # What it repeats is a sign of life, but no reason to wait longer than for all of it.
            self._limit_recovery(job, self._streaming.idle_timeout_s)
        if fresh:
            job.answer.say(fresh)

    def _limit_silence(self, watch: Watch) -> None:
        limit_s = self._streaming.idle_timeout_s
        watch.limit(limit_s, "idle_timeout", f"The upstream fell silent for {limit_s:g} s in mid-answer.")

    def _name(self, answer: Answer, upstream_id: str) -> None:
        """Decide on the answer's id, which is told before anything of it."""
        name = header_value(self._answers.name(answer, upstream_id))
        answer.head["x-headwater-stream"] = answer.log.headers["x-headwater-stream"] = name

    def _secrets(self, key: Key) -> tuple[str, ...]:
        return self._session.upstreams[key.upstream].secrets

    def _expected(self, answer: Answer) -> Expected:
        request = answer.call.request
        assert answer.target is not None
        return Expected(
            fallback_id=answer.id,
            created=int(time.time()),
            model=answer.target.model,
            choices=request.choices,
            wants_running_usage=request.wants_running_usage,
        )

    async def _usage_event(self, job: _Job, ask: Ask, normalizer: Normalizer) -> bytes:
        """The event that says the usage, if anybody wants to know it, or it is to be kept with the answer."""
        answer = job.answer
        if ask.partial and answer.usage is not None:
            answer.usage = _of_both_parts(answer.usage, ask)
            normalizer.replace_usage(answer.usage)
        is_wanted = answer.wants_usage or answer.wants_whole
        if not (is_wanted or answer.lookup is not None):
            return b""
        if is_wanted and answer.usage is None:
            await self._count(answer)
        return normalizer.usage_event(answer.usage)

    async def _take_whole(self, job: _Job, key: Key, ask: Ask, reply: Reply) -> None:
        """The upstream sent one body: pass it on as it is, or make a stream of it for clients that want one."""
        answer, watch, log = job.answer, job.watch, job.answer.log
        request = answer.call.request
        if not reply.is_complete:
            limit_s = self._streaming.whole_answer_timeout_s
            watch.limit(limit_s, "whole_answer_timeout", f"The upstream's answer was not whole within {limit_s:g} s.")
            self._limit_recovery(job, limit_s)
        body = await reply.read_all(self._streaming.max_answer_bytes)
        watch.rest()
        try:
            value = loads(body) if len(body) < LONG_WORK_BYTES else await asyncio.to_thread(loads, body)
        except ValueError:
            raise UpstreamError(502, "bad_upstream_answer", "The upstream answered 200 with malformed JSON.") from None
        if not isinstance(value, dict):
            raise UpstreamError(
                502, "bad_upstream_answer", "The upstream answered 200 with JSON that is no completion."
            )
        if (error := error_in_success(value, self._secrets(key))) is not None:
            raise error
        assert answer.target is not None
        try:
            completion = fill_in(value, fallback_id=answer.id, created=int(time.time()), model=answer.target.model)
        except ValueError as problem:
            words = f"The upstream's answer is no completion: {problem}."
            raise UpstreamError(502, "bad_upstream_answer", words) from None
        if ask.stream:
            self._learning.learn(key, Topic.STREAMS, False, "answered stream: true with one JSON body")
            if not self._streaming.enable_fallback:
                # The same upstream would say the same again, and be paid for it; another one may stream.
                raise UpstreamError(
                    502,
                    "upstream_does_not_stream",
                    "The upstream answered a streaming request with one body, and streaming.enable_fallback is off.",
                    trouble=Trouble.MISSING,
                )
        answer.usage = read_usage(completion)
        told = None if answer.usage is None else value.get("usage")
        if ask.partial and answer.usage is not None:
            answer.usage = _of_both_parts(answer.usage, ask)
            told = answer.usage.as_json()
        finishes = [choice.get("finish_reason") for choice in completion["choices"]]
        answer.is_whole = bool(finishes) and None not in finishes
        answer.model = str(completion["model"])
        answer.finish_reason = next((str(finish) for finish in finishes if finish is not None), None)
        if job.recovery is None:
            answer.first_at = self._now()
            if not log.is_committed:
                self._name(answer, str(completion["id"]))
            if completion["id"] != answer.id:
                completion["id"] = answer.id
                body = dumps(completion)
            answer.body = body
        answer.mode = Mode.SYNTHESIS if request.wants_stream else Mode.WHOLE
        self._answers.withdraw(answer)
        stream = b""
        if request.wants_stream or self._answers.window_s:
            stream = await off_loop(len(body), lambda: b"".join(split(completion)))
        if job.recovery is not None:
            stream = await off_loop(len(stream), job.recovery.feed, stream)
            job.recovery.end()
        is_to_count = answer.wants_usage and answer.usage is None
        if stream and not answer.delivers_whole and (is_to_count or answer.meter is not None):
            # Counting takes its time, and the answer need not wait for it.
            answer.say(stream)
            await answer.passed()
            stream = b""
        if is_to_count:
            await self._count(answer)
        usage = b""
        is_needed = answer.wants_usage or (answer.wants_whole and not answer.body)
        if is_needed and (told or (told := answer.usage and answer.usage.as_json())):
            usage = usage_event(completion, told)
            if job.recovery is not None:
                usage = job.recovery.feed(usage)
        await self._finish(job, stream, usage)
        if ask.partial:
            self._learning.learn(key, Topic.PREFILL, True, "went on from a part of an answer")

    # ------------------------------------------------------------------ finish

    async def _finish(self, job: _Job, last: bytes, usage: bytes) -> None:
        """Close the log behind its last events."""
        answer, log = job.answer, job.answer.log
        if answer.wants_whole:
            if answer.body:
                log.put_whole(answer.body)
            else:
                events = [*answer.said, last, usage]
                log.put_whole(dumps(await off_loop(sum(map(len, events)), assemble, events)))
        if answer.draft is not None:
            last = b"".join(answer.draft.segments)
        # A stream that is too long to be kept is still a status now.
        log.finish(last, usage)

    async def _count(self, answer: Answer) -> None:
        """Count the tokens that nobody told, elsewhere. Their number stays unknown where that fails, and nothing else does."""
        request = answer.call.request
        with suppress(TimeoutError):
            async with asyncio.timeout(_USAGE_S):
                answer.usage = await self._encoders.estimate(request.model, request, answer.said, answer.told)
        # Not before: who leaves meanwhile pays for what was generated, and that is still to be counted.
        answer.is_counted = True
