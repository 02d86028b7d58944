"""The operator's face: what is known of the targets, and the probes of a service manager."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from proxy.chat import Target
from proxy.errors import ClientError
from proxy.policy.capabilities import Capability, Key
from proxy.policy.circuits import State as Circuit
from proxy.server.downstream import json_response
from proxy.server.state import STATE
from proxy.upstream.circuits import CircuitRow

_NEVER_ASKED = CircuitRow(Circuit.CLOSED, 0, None, 0, 0, None)


async def health(request: web.Request) -> web.StreamResponse:
    """GET /health: the process answers."""
    return json_response({"status": "ok"})


async def ready(request: web.Request) -> web.StreamResponse:
    """GET /ready: new calls are taken; 503 as soon as the proxy is told to stop. Nobody needs a key for it."""
    state = request.app[STATE]
    body: dict[str, Any] = {"status": "draining" if state.is_draining else "ready"}
    if state.auth.is_open:
        body["in_flight"] = len(state.in_flight)
    return json_response(body, 503 if state.is_draining else 200)


async def list_targets(request: web.Request) -> web.StreamResponse:
    """GET /admin/targets: each target of a [[model]] or a model group, and each other one that was asked, and how it stands."""
    state = request.app[STATE]
    rows = dict(state.circuits.all())
    models: dict[Target, list[dict[str, Any]]] = {}
    for name, route in state.routes.aliases.items():
        for place, (target, weight) in enumerate(zip(route.targets, route.weights, strict=True), 1):
            context_tokens = route.contexts.get(target)
            entry = {"name": name, "place": place, "weight": weight, "context_tokens": context_tokens}
            models.setdefault(target, []).append(entry)
    # The dict has each once: first those that have a place behind a name, then the others.
    targets = [
        {
            "target": str(target),
            "upstream": target.upstream,
            "model": target.model,
            "models": models.get(target, []),
            **_standing(rows.get(target, _NEVER_ASKED)),
        }
        for target in models | rows
    ]
    return json_response({"object": "list", "data": targets})


async def list_capabilities(request: web.Request) -> web.StreamResponse:
    """GET /admin/capabilities: every fact, with its evidence and its age in seconds."""
    state = request.app[STATE]
    now, ttl_s = time.time(), state.settings.streaming.detection_cache_s
    entries = [_entry(key, capability, now, ttl_s) for key, capability in state.capabilities.all()]
    return json_response({"object": "list", "data": entries})


async def forget_capability(request: web.Request) -> web.StreamResponse:
    """DELETE /admin/capabilities/{upstream}/{model}: forget what is known, for every credential."""
    state = request.app[STATE]
    upstream, model = request.match_info["upstream"], request.match_info["model"]
    keys = [key for key, _ in state.capabilities.all() if (key.upstream, key.model) == (upstream, model)]
    if not keys:
        raise ClientError(404, "not_found", f"Nothing is known of '{upstream}/{model}'.")
    for key in keys:
        state.capabilities.forget(key)
    return json_response({"deleted": True, "upstream": upstream, "model": model})


def _standing(row: CircuitRow) -> dict[str, Any]:
    error = row.last_error
    return {
        "circuit": row.state,
        "failures_in_a_row": row.failures_in_a_row,
        "probe_in_s": None if row.probe_in_s is None else round(row.probe_in_s, 1),
        "attempts": row.attempts,
        "failures": row.failures,
        "last_error": error and {"code": error.code, "status": error.status, "age_s": round(error.age_s, 1)},
    }


def _entry(key: Key, capability: Capability, now: float, ttl_s: float) -> dict[str, Any]:
    return {
        **key._asdict(),
        "facts": {
            topic.value: {
                "value": fact.value,
                "evidence": fact.evidence,
                "age_s": round(now - fact.learned_at, 1),
                "is_fresh": fact.is_fresh(now, ttl_s),
            }
            for topic, fact in capability.facts.items()
        },
    }
