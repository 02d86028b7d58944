"""Finding out on purpose what the upstreams can do, for `headwater probe`.

A probe is an ordinary streaming call with `max_tokens: 1` through the pipeline, so what it finds is what a client's own
request would have found. One at a time; what was known of the target is forgotten before.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

from proxy.answerlog import read_to_end
from proxy.chat import Outcome, Target
from proxy.errors import ProxyError
from proxy.policy.capabilities import Key, Topic
from proxy.server.app import Parts
from proxy.wire.encoding import dumps
from proxy.wire.requests import parse_chat_request

_MAX_LISTED = 20
_REPORT_S = 5.0
_NO_CHAT = re.compile(r"embed|whisper|tts|dall-e|image|moderation|transcribe|rerank|realtime", re.IGNORECASE)


class Finding(NamedTuple):
    """A line of the table. `streams` is yes, no or unknown."""

    target: str
    streams: str
    evidence: str
    first_token_ms: str
    age_s: str


async def targets(parts: Parts, names: list[str]) -> list[Target]:
    """The targets behind the names; without names, those of aliases, model groups, and the first 20 listed models that chat."""
    routes = parts.routes
    if not names:
        names = list(routes.aliases)
        listed = [model["id"] for model in await parts.listing.models() if not _NO_CHAT.search(model["id"])]
        names += [name for name in listed if name not in names][:_MAX_LISTED]
    return list(dict.fromkeys(target for name in names for target in routes.resolve(name).targets))


async def probe(parts: Parts, wanted: list[Target], outcomes: dict[str, Outcome]) -> AsyncIterator[Finding]:
    """Probe each target. `outcomes` is where the pipeline's reports arrive, by call id."""
    for position, target in enumerate(wanted):
        upstream = parts.session.upstreams[target.upstream]
        key = Key(upstream.name, target.model, upstream.credential)
        parts.capabilities.forget(key)
        call_id = f"probe-{position}"
        failure = ""
        for limit in ("max_tokens", "max_completion_tokens"):
            try:
                await _call(parts, call_id, target, limit)
                failure = ""
                break
            except ProxyError as error:
                failure = error.message
                if "max_tokens" not in failure:
                    break
        fact = parts.capabilities.get(key).facts.get(Topic.STREAMS)
        outcome = outcomes.get(call_id)
        ttft_s = outcome.ttft_s if outcome is not None else None
        yield Finding(
            target=str(target),
            streams="unknown" if fact is None else "yes" if fact.value else "no",
            evidence=failure or (fact.evidence if fact is not None else "was not asked to stream"),
            first_token_ms="-" if ttft_s is None else f"{ttft_s * 1000:.0f}",
            age_s="-" if fact is None else f"{max(0.0, time.time() - fact.learned_at):.0f}",
        )


async def _call(parts: Parts, call_id: str, target: Target, limit: str) -> None:
    body = {"model": str(target), "messages": [{"role": "user", "content": "Hi"}], "stream": True, limit: 1}
    seat = parts.pipeline.start(call_id, parse_chat_request(dumps(body)))
    try:
        await read_to_end(seat.log, seat.leave)
    finally:
        # The report comes a moment after the answer.
        await parts.in_flight.drained(_REPORT_S)
