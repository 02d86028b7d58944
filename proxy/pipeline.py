"""One call's journey. Read this file first, from top to bottom.

    receive → plan (which targets) → look up (in flight? given before?) → produce → deliver (readers of a log) → settle, keep

A face in `server/` has parsed the request and calls `Pipeline.start`. That finds the answer that another call asks for just
now, or begins a new one: an `AnswerLog`, and a *producer task* that fills the log, with an answer that was given before
(`replay.py`) or with one from an upstream, whose connection it owns (`producer.py`). The call gets a seat at the answer
(`answers.py`), and the face reads the log: as a stream, or as one body. Forward only: nothing found later changes what was
decided before.

Every call is settled exactly once, however it ends: with its answer (done, upstream error, shutdown), or when its client has
left and others stay. An answer that all have left is given up.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from proxy.answerlog import AnswerLog, read_to_end
from proxy.answers import Answer, Answers, Seat, ShareKey
from proxy.chat import (
    CACHE_TIERS,
    LEFT_STATUS,
    CacheWish,
    Call,
    ChatRequest,
    Lookup,
    Mode,
    Outcome,
    Status,
    Ticket,
    Usage,
    Wishes,
    status_of,
)
from proxy.encoders import Encoders
from proxy.errors import ClientError, OverloadedError, ProxyError
from proxy.inflight import InFlight
from proxy.learning import Learning
from proxy.policy.cachekey import answer_key, headers_part, partition_key, question_of, scope_of
from proxy.policy.guard import is_time_bound
from proxy.policy.routing import Routes
from proxy.producer import Producer
from proxy.replay import Replays, completion_of, text_of
from proxy.semcache.cache import AnswerCache, Hit
from proxy.settings import Settings
from proxy.store.capabilities import CapabilityStore
from proxy.store.content import Contents
from proxy.tasks import Tasks
from proxy.upstream.circuits import Circuits
from proxy.upstream.session import UpstreamSession
from proxy.upstream.watch import Watch
from proxy.wire.encoding import loads

Report = Callable[[Outcome], None]

_NO_WISHES = Wishes()

# What the proxy asks for itself, to see whether a near match was right.
_VERIFY = "verify"
_MAX_VERIFYING = 2


class Pipeline:
    """Takes calls from the faces to their answers. One for each server; `report` gets each call's Outcome, once.

    `contents` packs what is to be stored of each call that has a ticket; None where nothing is.
    """

    def __init__(
        self,
        settings: Settings,
        routes: Routes,
        session: UpstreamSession,
        circuits: Circuits,
        capabilities: CapabilityStore,
        encoders: Encoders,
        cache: AnswerCache,
        in_flight: InFlight,
        tasks: Tasks,
        report: Report,
        contents: Contents | None = None,
    ) -> None:
        self._streaming = settings.streaming
        self._caching = settings.cache
        self.cache = cache
        self._routes = routes
        self._wheel = session.wheel
        self._in_flight = in_flight
        self._encoders = encoders
        self._tasks = tasks
        self._report = report
        self._contents = contents
        self._loop = asyncio.get_running_loop()
        max_kept_bytes = int(settings.streaming.resume_max_mb * 1024 * 1024)
        self.saved = self.lost = 0
        """Answers that broke midway, and came to their end all the same, or with an error."""
        self.answers = Answers(settings.streaming.resume_window_s, max_kept_bytes)
        learning = Learning(settings.streaming, capabilities)
        self._producer = Producer(settings, session, circuits, learning, encoders, self.answers)
        self.gaps = self._producer.gaps
        self._replays = Replays(cache, settings.cache, encoders, self.answers)
        self._verifying = 0

    # ------------------------------------------------------------------ receive, plan, look up

    def start(
        self,
        call_id: str,
        request: ChatRequest,
        headers: tuple[tuple[str, str], ...] = (),
        caller: str = "",
        wishes: Wishes = _NO_WISHES,
        purpose: str = "",
        ticket: Ticket | None = None,
    ) -> Seat:
        """Begin a call. Its seat's log is to be read; one whose last reader leaves is given up.

        `headers` go on to the upstream; `caller` is whose answers it may share; `ticket` comes back with the outcome.
        ClientError when no upstream serves the model, or when it may only be answered from the cache, and nothing is looked
        up there.
        """
        route = self._routes.resolve(request.model)
        call = Call(call_id, request, route, self._loop.time(), headers, caller, purpose, ticket)
        delivers_whole = route.delivers_whole if wishes.delivers_whole is None else wishes.delivers_whole
        share, lookup = self._look(call, wishes, delivers_whole=delivers_whole)
        answer = self._asked(share, request) if share is not None else None
        if answer is None:
            answer = self._begin(call, share, lookup, delivers_whole=delivers_whole)
        answer.wants_usage = answer.wants_usage or request.wants_usage
        answer.wants_whole = answer.wants_whole or not request.wants_stream
        seat = Seat(answer, call, self._left)
        answer.seats.append(seat)
        return seat

    def _asked(self, share: ShareKey, request: ChatRequest) -> Answer | None:
        """The answer in flight that a request may share."""
        answer = self.answers.asked(share)
        if answer is None:
            return None
        # Who wants a stream is not to wait for a whole body because somebody else does not mind.
        if request.wants_stream and not answer.call.request.wants_stream:
            return None
        # One from the cache may be said slowly, and who wants one body need not wait for that; or have been deleted meanwhile.
        if answer.entry is not None and not (request.wants_stream and self.cache.store.is_live(answer.entry)):
            return None
        return answer

    def lookup(
        self, request: ChatRequest, headers: tuple[tuple[str, str], ...], caller: str, wishes: Wishes
    ) -> Lookup | None:
        """What such a call looks for in the cache; None where nothing. ClientError as from `start`."""
        call = Call("", request, self._routes.resolve(request.model), self._loop.time(), headers, caller)
        return self._look(call, wishes, delivers_whole=False)[1]

    def _look(self, call: Call, wishes: Wishes, *, delivers_whole: bool) -> tuple[ShareKey | None, Lookup | None]:
        """What two calls have in common that can share an answer in flight, and what one looks for in the cache; or None."""
        request, route, wish = call.request, call.route, wishes.cache
        temperature = request.body.get("temperature")
        # https://platform.openai.com/docs/api-reference/chat/create: it is 1 where nothing is said.
        if not isinstance(temperature, int | float):
            temperature = 1
        shares = route.coalesces and wishes.coalesces and temperature <= self._streaming.coalesce_max_temperature
        tier = route.cache if wish.tier is None else min(route.cache, wish.tier, key=CACHE_TIERS.index)
        caches = tier != "off" and temperature <= self._caching.max_temperature and (wish.looks_up or wish.keeps)
        if wish.only_if_cached and not (caches and wish.looks_up):
            raise _not_cached()
        if not (shares or caches):
            return None, None
        scope = scope_of(call.caller, wish.namespace)
        others = (scope, headers_part(call.forward_headers), route.name)
        key = answer_key(request.body, request.raw, *others)
        share = lookup = None
        if shares:
            # Who may come back to an answer counts its events, so all that share it must have been told the same.
            shares_usage = request.wants_usage if self.answers.window_s else None
            share = (key, delivers_whole, request.wants_running_usage, shares_usage, wish)
        if caches:
            question = partition = None
            if tier == "semantic" and self.cache.meaning.is_on:
                question = question_of(
                    request.body,
                    max_turns=self._caching.semantic_max_turns,
                    max_characters=self._caching.semantic_max_characters,
                )
                if question is not None and not is_time_bound(question):
                    partition = partition_key(request.body, request.raw, *others)
            lookup = Lookup(key, scope, wish, question if partition is not None and question else "", partition)
        return share, lookup

    def _begin(self, call: Call, share: ShareKey | None, lookup: Lookup | None, *, delivers_whole: bool) -> Answer:
        log = AnswerLog(self._streaming.max_answer_bytes)
        answer = Answer(
            call,
            share,
            log,
            id=f"chatcmpl-{call.id}",
            delivers_whole=delivers_whole,
            wants_usage=False,
            wants_whole=False,
            lookup=lookup,
        )
        self.answers.enter(answer)
        answer.head["x-headwater-stream"] = answer.id
        if lookup is not None and lookup.wish.looks_up:
            answer.head["x-cache"] = "miss"
        elif call.route.cache != "off":
            answer.head["x-cache"] = "bypass"
        log.headers = answer.head
        answer.payer = call
        task = self._tasks.spawn(self._produce(answer), "answer")
        answer.task = task
        self._in_flight.enter(task, lambda: self._stop(answer))
        return answer

    def rejoin(self, answer: Answer) -> Seat:
        """A seat for a client that comes back to an answer: the one it has left, if one is free."""
        for seat in answer.seats:
            if seat.timer is not None:
                seat.timer.cancel()
                seat.timer = None
                return seat
        seat = Seat(answer, None, self._left)
        answer.seats.append(seat)
        return seat

    # ------------------------------------------------------------------ produce

    async def _produce(self, answer: Answer) -> None:
        log, call = answer.log, answer.call
        watch = Watch(
            self._wheel,
            heartbeat_s=self._streaming.heartbeat_interval_s if call.request.wants_stream else 0,
            total_s=self._streaming.total_timeout_s,
            on_silence=log.ping,
        )
        status, error = Status.INTERNAL_ERROR, None
        try:
            answer.has_begun = True
            if answer.is_given_up or answer.is_stopping:
                raise asyncio.CancelledError
            with watch:
                try:
                    await self._fill(answer, watch)
                except asyncio.CancelledError:
                    watch.raise_if_expired()
                    raise
            status = Status.OK if answer.is_whole else Status.INCOMPLETE
        except ProxyError as failure:
            error = failure
            log.fail(failure)
            status = status_of(failure)
        except asyncio.CancelledError:
            if log.is_closed:
                status = Status.OK if answer.is_whole else Status.INCOMPLETE
            elif answer.refusal is not None:
                error = answer.refusal
                log.fail(error)
                status = status_of(error)
            elif answer.is_stopping:
                error = OverloadedError("shutting_down", "The proxy was stopped before the answer was whole.")
                log.fail(error)
                status = Status.INTERRUPTED
            else:
                status = Status.CANCELLED
            raise
        finally:
            if not log.is_closed:
                log.fail(ProxyError(500, "internal_error", "The proxy failed."))
            self._end(answer, status, error)

    async def _fill(self, answer: Answer, watch: Watch) -> None:
        """Fill the log: with an answer that was given before, or with one from an upstream."""
        lookup = answer.lookup
        hit = await self.cache.find(lookup) if lookup is not None else None
        if hit is None:
            if lookup is not None and lookup.wish.only_if_cached:
                raise _not_cached()
            call = answer.call
            if call.ticket is not None:
                # Who gets nothing before the end would have nothing of an answer that is stopped midway.
                grows = call.request.wants_stream and not answer.delivers_whole
                stop = partial(self._refuse, answer) if grows else None
                answer.meter = await call.ticket.open(call.route.targets, stop)
            await self._producer.produce(answer, watch)
            return
        await self._replays.give(answer, hit)
        if hit.kind == "semantic" and random.random() < self._caching.verify_rate:
            assert lookup is not None
            self._in_flight.hold()
            self._tasks.spawn(self._verify(answer.call, lookup.wish, hit), "verify a near match")

    def _refuse(self, answer: Answer, error: ProxyError) -> None:
        answer.refusal = error
        self._cancel(answer)

    def _stop(self, answer: Answer) -> None:
        answer.is_stopping = True
        self._cancel(answer)

    def _cancel(self, answer: Answer) -> None:
        """End an answer's task. One that has not had its first turn yet is not cancelled: it would end without settling."""
        if answer.has_begun and answer.task is not None:
            answer.task.cancel()

    # ------------------------------------------------------------------ leave, settle

    def _left(self, seat: Seat) -> None:
        """A client has gone before its end. It may come back within the resume window."""
        if seat.log.is_closed:
            return
        # Who wanted one body has got no id to come back with.
        if self.answers.window_s and (seat.call is None or seat.call.request.wants_stream):
            seat.timer = self._loop.call_later(self.answers.window_s, self._vacate, seat)
        else:
            self._vacate(seat)

    def _vacate(self, seat: Seat) -> None:
        """A client has gone for good. The last one takes the answer with it."""
        answer = seat.answer
        seat.timer = None
        if answer.log.is_closed:
            return
        seat.is_gone = True
        others = [other for other in answer.seats if not other.is_gone]
        if not others:
            answer.is_given_up = True
            self.answers.give_up(answer)
            self._cancel(answer)
        elif seat.call is None:
            answer.seats.remove(seat)
        elif any(other.call is not None for other in others):
            answer.seats.remove(seat)
            self._settle_left(answer, seat)

    def _settle_left(self, answer: Answer, seat: Seat) -> None:
        """A client has gone, and others stay. What the answer costs is for one that stays."""
        call = seat.call
        assert call is not None
        was_payer = call is answer.payer
        if was_payer:
            answer.payer = next(other.call for other in answer.seats if other.call is not None)
        outcome = self._outcome(seat, call, Status.CANCELLED, None, None)
        if was_payer and answer.payer and call.ticket is not None and answer.payer.ticket is not None:
            call.ticket.hand_over(answer.payer.ticket)
        self._settle(answer, [(call, outcome)])

    def _end(self, answer: Answer, status: Status, error: ProxyError | None) -> None:
        """Close the books on an answer, and on all calls that still are at it."""
        self.answers.end(answer)
        if answer.has_broken:
            self.saved += status in (Status.OK, Status.INCOMPLETE)
            self.lost += status is Status.UPSTREAM_ERROR
        settled: list[tuple[Call, Outcome]] = []
        for seat in answer.seats:
            if seat.timer is not None:
                seat.timer.cancel()
            if seat.call is not None:
                settled.append((seat.call, self._outcome(seat, seat.call, status, error, answer.usage)))
        self._settle(answer, settled)
        is_new = status is Status.OK and answer.entry is None and not answer.is_mended
        if is_new and answer.lookup is not None and answer.lookup.wish.keeps:
            self._in_flight.hold()
            self._tasks.spawn(self._keep(answer), "keep an answer")
        # What refers to each other waits for the collector of garbage.
        answer.seats.clear()
        assert answer.task is not None
        self._in_flight.leave(answer.task)
        answer.task = None

    def _outcome(
        self, seat: Seat, call: Call, status: Status, error: ProxyError | None, usage: Usage | None
    ) -> Outcome:
        """What became of a call."""
        answer = seat.answer
        http_status = 200
        # Who wants one body gets its status with it, whatever a stream of the same answer has told already.
        if error is not None and not (answer.log.is_committed and call.request.wants_stream):
            http_status = error.status
        elif status is Status.CANCELLED:
            http_status = LEFT_STATUS
        return Outcome(
            call_id=call.id,
            model=call.request.model,
            target=answer.target,
            mode=self._mode(answer, call),
            status=status,
            http_status=http_status,
            attempts=answer.attempts,
            ttft_s=None if answer.first_at is None else max(0.0, answer.first_at - call.started),
            duration_s=self._loop.time() - call.started,
            usage=usage,
            error=error.word if error is not None else None,
            cache_entry=answer.entry,
            purpose=call.purpose,
            ticket=call.ticket,
            answered_model=answer.model,
            finish_reason=answer.finish_reason,
        )

    def _mode(self, answer: Answer, call: Call) -> Mode:
        if call is not answer.payer:
            return Mode.COALESCED
        is_stream = answer.mode in (Mode.RELAY, Mode.SYNTHESIS)
        # It was begun for one that wanted a stream, and has left.
        return Mode.WHOLE if is_stream and not call.request.wants_stream else answer.mode

    def _settle(self, answer: Answer, settled: list[tuple[Call, Outcome]]) -> None:
        """Report what became of some calls: after their tokens are counted, where nobody told them, and what they said is packed,
        where that is stored.
        """
        said: list[bytes] | bytes | None = None
        if settled and settled[0][1].usage is None and not answer.is_counted and answer.said:
            said = answer.said if isinstance(answer.said, bytes) else answer.said.copy()
        # What was neither asked of an upstream nor given again says nothing.
        packs = self._contents is not None and (answer.attempts > 0 or answer.entry is not None)
        if said is not None or packs:
            given = answer.given if packs else None
            self._in_flight.hold()
            self._tasks.spawn(self._report_late(answer, said, given, settled), "end calls")
            return
        for _, outcome in settled:
            self._report(outcome)

    async def _report_late(
        self,
        answer: Answer,
        said: list[bytes] | bytes | None,
        given: list[bytes] | bytes | None,
        settled: list[tuple[Call, Outcome]],
    ) -> None:
        """The reports of calls, after the clients have their answer: with their tokens counted where something was `said`,
        and with what is to be stored of them where something was `given`.
        """
        outcomes = [outcome for _, outcome in settled]
        request, told = answer.call.request, answer.told
        try:
            if said is not None:
                usage = await self._encoders.estimate(request.model, request, said, told)
                outcomes = [outcome._replace(usage=usage) for outcome in outcomes]
            if given is not None and self._contents is not None:
                packed = await self._contents.packed(given)
                for position, (call, _) in enumerate(settled):
                    if call.ticket is not None:
                        content = await self._contents.exchange(call.request.raw, packed)
                        outcomes[position] = outcomes[position]._replace(content=content)
        finally:
            for outcome in outcomes:
                self._report(outcome)
            self._in_flight.release()

    # ------------------------------------------------------------------ keep, verify

    async def _keep(self, answer: Answer) -> None:
        try:
            await self._replays.keep(answer, self._loop.time())
        finally:
            self._in_flight.release()

    async def _verify(self, call: Call, wish: CacheWish, hit: Hit) -> None:
        """See whether an answer to a question of the same meaning was right: ask this one too, and compare."""
        self._verifying += 1
        try:
            if self._verifying > _MAX_VERIFYING:
                return
            # What is kept of it is for those who may have it: the same namespace, or nobody.
            asking = Wishes(
                coalesces=False, cache=CacheWish(False, wish.keeps, tier=wish.tier, namespace=wish.namespace)
            )
            with suppress(ProxyError):
                call_id = f"{call.id}-verify"
                ticket = None if call.ticket is None else call.ticket.aside(call_id, _VERIFY)
                headers, caller = call.forward_headers, call.caller
                seat = self.start(call_id, call.request, headers, caller, asking, _VERIFY, ticket)
                await read_to_end(seat.log, seat.leave)
                if seat.answer.is_whole:
                    given, other = loads(hit.entry.answer), await completion_of(seat.answer)
                    await self.cache.learn(hit, text_of(given), text_of(other))
        finally:
            self._verifying -= 1
            self._in_flight.release()


def _not_cached() -> ClientError:
    # RFC 9111 §5.2.1.7
    return ClientError(504, "not_cached", "The answer is not in the cache, and Cache-Control says only-if-cached.")
