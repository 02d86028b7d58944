"""Answers that were given before: given again from the cache, and kept there for that.

What is kept is a completion, whichever way it first came; so an answer that was streamed can be given again in one body,
and the other way round. It comes back as a new answer: with an id and a time of its own, and with headers and a comment
that say where it came from.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from proxy.answers import Answer, Answers
from proxy.chat import Mode, Target
from proxy.encoders import Encoders
from proxy.semcache.cache import AnswerCache, Hit
from proxy.settings import CacheSettings
from proxy.store.entries import NewEntry
from proxy.tasks import off_loop
from proxy.wire.chunks import assemble, fill_in, split, usage_event
from proxy.wire.encoding import dumps, loads
from proxy.wire.headers import header_value
from proxy.wire.sse import DONE
from proxy.wire.usage import read_usage

_log = logging.getLogger(__name__)

# Where a stream from the cache ends. A comment, because several clients take any other event behind the answer for an error.
_ENDING = b": [CACHE_END]\n\n" + DONE

# What an answer may have ended with that is kept: one that was cut short or filtered says less than could be said.
_WHOLE_FINISHES = frozenset(("stop", "tool_calls"))

# Pieces of a paced answer go out at most so often; faster than a screen is redrawn serves nobody.
_MIN_PAUSE_S = 1 / 60


class Replays:
    """Gives answers again, and keeps them. One for each server."""

    def __init__(self, cache: AnswerCache, settings: CacheSettings, encoders: Encoders, answers: Answers) -> None:
        self._cache = cache
        self._answers = answers
        self._pace = settings.pace
        self._encoders = encoders
        self._now = asyncio.get_running_loop().time

    # ------------------------------------------------------------------ giving

    async def give(self, answer: Answer, hit: Hit) -> None:
        """Fill the answer's log with the hit, and close it."""
        entry, log, request = hit.entry, answer.log, answer.call.request
        completion = await off_loop(len(entry.answer), loads, entry.answer)
        completion |= {"id": answer.id, "created": int(time.time())}
        answer.mode, answer.entry, answer.is_whole = Mode.REPLAY, entry.id, True
        answer.target = Target(*entry.target.split("/", 1))
        answer.usage, answer.first_at = read_usage(completion), self._now()
        answer.model = str(completion["model"])
        answer.finish_reason = next((choice.get("finish_reason") for choice in completion["choices"]), None)
        log.headers = answer.head | {
            "x-headwater-target": header_value(entry.target),
            "x-headwater-attempts": "0",
            "x-cache": f"hit; {hit.kind}",
            "x-cache-score": f"{hit.score:.4f}",
            "x-cache-age": str(int(hit.age_s)),
            "x-cache-entry": str(entry.id),
        }
        log.ending = _ENDING
        events: list[bytes] = []
        if request.wants_stream or self._answers.window_s:
            events = await off_loop(len(entry.answer), lambda: list(split(completion)))
        log.commit()
        if request.wants_stream and not (answer.delivers_whole or answer.wants_whole):
            events = await self._paced(answer, events, entry.duration_s)
        if answer.wants_whole:
            log.put_whole(await off_loop(len(entry.answer), dumps, completion))
        usage = completion.get("usage")
        log.finish(b"".join(events), usage_event(completion, usage) if isinstance(usage, dict) else b"")

    async def _paced(self, answer: Answer, events: list[bytes], recorded_s: float) -> list[bytes]:
        """Say the events at the pace that is set, all but the last, which is left."""
        if self._pace == "none":
            return events
        total_s = recorded_s if self._pace == "recorded" else len(events) / self._pace
        begun = self._now()
        said = 0
        while (left := len(events) - 1 - said) > 0:
            passed_s = self._now() - begun
            due = len(events) - 1 if passed_s >= total_s else int(len(events) * passed_s / total_s) + 1 - said
            if due > 0:
                answer.log.append(b"".join(events[said : said + min(due, left)]))
                said += min(due, left)
            await asyncio.sleep(max(_MIN_PAUSE_S, total_s * said / len(events) - passed_s))
        return events[said:]

    # ------------------------------------------------------------------ keeping

    async def keep(self, answer: Answer, ended_at: float) -> None:
        """Keep an answer that was given, if it is one to be given again. `ended_at` is the loop's clock."""
        lookup, call, target = answer.lookup, answer.call, answer.target
        assert lookup is not None
        assert target is not None
        completion = await completion_of(answer)
        finishes = {choice.get("finish_reason") for choice in completion["choices"]}
        if not finishes or not finishes <= _WHOLE_FINISHES:
            return
        usage = read_usage(completion) or answer.usage
        if usage is None:
            usage = await self._encoders.estimate(call.request.model, call.request, answer.said)
        if usage is not None and read_usage({"usage": completion.get("usage")}) is None:
            completion["usage"] = usage.as_json()
        try:
            said = await off_loop(answer.log.size, dumps, completion)
        except ValueError as error:
            _log.info("%s is not kept in the cache: %s", call.id, error)
            return
        now = time.time()
        ttl_s = call.route.cache_ttl_s
        new = NewEntry(
            key=lookup.key,
            scope=lookup.scope,
            namespace=lookup.wish.namespace,
            model=call.request.model,
            target=str(target),
            answer=said,
            prompt_tokens=usage.prompt if usage is not None else 0,
            completion_tokens=usage.completion if usage is not None else 0,
            duration_s=max(0.0, ended_at - (answer.first_at or ended_at)),
            created_at=now,
            expires_at=now + ttl_s if ttl_s else None,
            partition=lookup.partition,
            question=lookup.question,
        )
        await self._cache.keep(lookup, new)


async def completion_of(answer: Answer) -> dict[str, Any]:
    """What an answer that is whole says, as one completion."""
    if answer.body:
        value = await off_loop(len(answer.body), loads, answer.body)
        assert answer.target is not None
        return fill_in(value, fallback_id=answer.id, created=int(time.time()), model=answer.target.model)
    events: Sequence[bytes] = [*answer.log.segments, answer.log.usage]
    completion: dict[str, Any] = await off_loop(answer.log.size, assemble, events)
    return completion


def text_of(completion: dict[str, Any]) -> str:
    """What a completion's first choice says in words; "" where it says something else."""
    content = completion["choices"][0]["message"].get("content") if completion["choices"] else None
    return content if isinstance(content, str) else ""
