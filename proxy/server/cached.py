"""The operator's face of the cache: what it holds and saves, single entries, and why a question finds what it finds."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from proxy.chat import LOCAL, Lookup, Target
from proxy.errors import ClientError, OverloadedError
from proxy.semcache.cache import Figures, age_s_of, is_young_enough
from proxy.semcache.embedder import EmbeddingError
from proxy.semcache.meaning import Candidate
from proxy.server.auth import caller_of
from proxy.server.downstream import json_response
from proxy.server.queries import behind, check_names, number, page_size
from proxy.server.state import STATE, State
from proxy.store.accounts import caller_of_team
from proxy.store.entries import Entry, Facts
from proxy.wire.encoding import loads
from proxy.wire.headers import upstream_headers
from proxy.wire.requests import parse_chat_request, parse_wishes


async def figures(request: web.Request) -> web.StreamResponse:
    """GET /admin/cache: what there is, how often it served since the start, and what that saved."""
    state = request.app[STATE]
    cache = state.pipeline.cache
    store, found = cache.store, cache.figures
    lookups = found.exact_hits + found.semantic_hits + found.misses
    oldest, newest = store.created_range or (None, None)
    return json_response(
        {
            "entries": store.count,
            "bytes": store.bytes,
            "in_memory": {"entries": store.memory_count, "bytes": store.memory_bytes},
            "oldest_at": oldest,
            "newest_at": newest,
            "problem": cache.problem,
            "semantic": {
                "is_on": cache.meaning.is_on,
                "embedder": cache.meaning.embedder,
                "is_ready": cache.meaning.is_ready,
                "indexed": cache.meaning.indexed,
                "bytes": cache.meaning.index_bytes,
                "threshold": round(cache.threshold, 4),
            },
            "since_start": {
                "lookups": lookups,
                "exact_hits": found.exact_hits,
                "semantic_hits": found.semantic_hits,
                "misses": found.misses,
                "of_these_too_late": found.too_late,
                "of_these_without_a_vector": found.unembedded,
                "hit_rate": round((lookups - found.misses) / lookups, 4) if lookups else None,
                "verified_right": found.verified_right,
                "verified_wrong": found.verified_wrong,
                "saved": await _saved(state, found),
            },
        }
    )


async def delete_many(request: web.Request) -> web.StreamResponse:
    """DELETE /admin/cache?model=…&namespace=…: forget all answers to which that applies; all there are, with `all=true`."""
    given = request.query
    check_names(given, ("model", "namespace", "all"))
    if not ("model" in given or "namespace" in given) and given.get("all") != "true":
        raise ClientError(400, "missing_required_parameter", "Say model, namespace, or all=true.", param="model")
    store = request.app[STATE].pipeline.cache.store
    count = await store.delete_where(model=given.get("model"), namespace=given.get("namespace"))
    return json_response({"deleted": count})


async def list_entries(request: web.Request) -> web.StreamResponse:
    """GET /admin/cache/entries?limit=&before=&model=&namespace=: the newest first; `before` is an id to go on behind."""
    given = request.query
    check_names(given, ("limit", "before", "model", "namespace"))
    limit = page_size(given)
    store = request.app[STATE].pipeline.cache.store
    found = await store.entries(limit, behind(given), model=given.get("model"), namespace=given.get("namespace"))
    return json_response({"object": "list", "data": [_facts(facts) for facts in found]})


async def get_entry(request: web.Request) -> web.StreamResponse:
    """GET /admin/cache/entries/{id}: all that is kept of an answer, and the answer."""
    entry = await request.app[STATE].pipeline.cache.store.get(_id(request))
    if entry is None:
        raise _no_entry(request)
    return json_response(_facts(entry) | {"answer": loads(entry.answer)})


async def delete_entry(request: web.Request) -> web.StreamResponse:
    """DELETE /admin/cache/entries/{id}: never give this answer again."""
    if not await request.app[STATE].pipeline.cache.store.delete(_id(request)):
        raise _no_entry(request)
    return json_response({"deleted": True, "id": _id(request)})


async def explain(request: web.Request) -> web.StreamResponse:
    """POST /admin/cache/explain?team=…: a chat request as it would be sent, headers included; what it would find, and why.

    With virtual keys `team` says whose it would be, the team `local`'s by default.
    """
    state = request.app[STATE]
    chat = parse_chat_request(await request.read())
    headers = request.headers
    wishes = parse_wishes(headers)
    caller = caller_of(LOCAL, state.auth.without_admin_key(headers))
    if not state.auth.is_open:
        caller = caller_of_team(state.accounts.team(request.query.get("team", LOCAL.team)).id)
    going_up = upstream_headers(headers, for_team=not state.auth.is_open)
    lookup = state.pipeline.lookup(chat, going_up, caller, wishes)
    if lookup is None or not lookup.wish.looks_up:
        words = (
            "Nothing is looked up for such a request: see cache.exact, the model's cache, and the request's headers."
        )
        return json_response({"verdict": "off", "why": words})
    exact = await state.pipeline.cache.exact(lookup)
    answer: dict[str, Any] = {"verdict": "miss", "exact_entry": exact and exact.entry.id, "scope": lookup.scope}
    answer |= await _by_meaning(state, lookup)
    if exact is not None:
        answer |= {"verdict": "exact", "why": "This very request was answered before."}
    return json_response(answer)


async def _by_meaning(state: State, lookup: Lookup) -> dict[str, Any]:
    """What a request finds by its meaning."""
    cache = state.pipeline.cache
    found: dict[str, Any] = {"question": lookup.question or None, "threshold": round(cache.threshold, 4), "nearest": []}
    if not cache.meaning.is_on:
        return found | {"why": "Nothing is compared by meaning here: see cache.semantic, and the log for the embedder."}
    if lookup.partition is None:
        words = "It is answered word for word only: not a plain request for one text, too long, of too many turns"
        return found | {"why": f"{words}, or about a time that passes."}
    try:
        candidates = await cache.meaning.candidates(lookup.partition, lookup.question)
    except EmbeddingError as error:
        raise OverloadedError("no_vector", f"The question's vector could not be made: {error}.") from None
    if not candidates:
        return found | {"why": "No question that was answered with all else equal is near to it."}
    for candidate in candidates:
        entry = await cache.store.get(candidate.id)
        if entry is not None:
            is_fresh = is_young_enough(age_s_of(entry), lookup.wish)
            found["nearest"].append(_candidate(candidate, entry, cache.threshold_of(entry), is_fresh=is_fresh))
    served = next((one for one in found["nearest"] if one["would_be_served"]), None)
    if served is not None:
        return found | {"verdict": "semantic", "why": "A question of the same meaning was answered before."}
    words = "Something speaks against each of the nearest questions, or their scores are too low"
    return found | {"why": f"{words}, or their answers too old."}


def _candidate(candidate: Candidate, entry: Entry, least: float, *, is_fresh: bool) -> dict[str, Any]:
    return {
        "id": candidate.id,
        "question": candidate.question,
        "similarity": round(candidate.similarity, 4),
        "score": round(candidate.score, 4),
        "threshold": round(least, 4),
        "objections": candidate.objections,
        "would_be_served": is_fresh and not candidate.objections and candidate.score >= least,
    }


async def _saved(state: State, figures: Figures) -> dict[str, Any]:
    """The tokens that were not asked for again, and their price; `microusd` is None where no price is known at all."""
    await state.price_lookup.learn(*(Target(*target.split("/", 1)) for target in figures.saved))
    now = time.time()
    prices = [
        state.price_lookup.prices.sum_microusd(Target(*target.split("/", 1)), prompt, completion, now)
        for target, (prompt, completion) in figures.saved.items()
    ]
    known_prices = [price for price in prices if price is not None]
    return {
        "prompt_tokens": sum(prompt for prompt, _ in figures.saved.values()),
        "completion_tokens": sum(completion for _, completion in figures.saved.values()),
        "microusd": sum(known_prices) if known_prices or not prices else None,
        "is_priced_in_full": len(known_prices) == len(prices),
    }


def _facts(facts: Facts) -> dict[str, Any]:
    return {
        "id": facts.id,
        "model": facts.model,
        "target": facts.target,
        "namespace": facts.namespace,
        "scope": facts.scope,
        "question": facts.question or None,
        "is_found_by_meaning": facts.partition is not None,
        "bytes": facts.size,
        "prompt_tokens": facts.prompt_tokens,
        "completion_tokens": facts.completion_tokens,
        "created_at": facts.created_at,
        "age_s": round(age_s_of(facts), 1),
        "expires_at": facts.expires_at,
        "used_at": facts.used_at,
        "hits": facts.hits,
        "verified_right": facts.rights,
        "verified_wrong": facts.wrongs,
    }


def _id(request: web.Request) -> int:
    return number(request.match_info["id"], "id", at_least=0)


def _no_entry(request: web.Request) -> ClientError:
    return ClientError(404, "not_found", f"There is no entry {request.match_info['id']} in the cache.")
