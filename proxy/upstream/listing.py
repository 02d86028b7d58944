"""The list of models: what the upstreams say they have, and what the config adds.

Each upstream is asked at most once a minute, all at the same time, each for a few seconds at the most. One that does
not answer is represented by what it said before, or by the names that the config gives.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from proxy.errors import ProxyError
from proxy.policy.routing import Routes
from proxy.upstream.session import Upstream, UpstreamSession
from proxy.upstream.watch import Watch
from proxy.wire.encoding import loads

_log = logging.getLogger(__name__)

_FRESH_S = 60.0
_PATIENCE_S = 5.0
_MAX_LIST_BYTES = 16 * 1024 * 1024

Model = dict[str, Any]


class Listing:
    """What the upstreams list. It also tells the routes, which prefer an upstream that has a model over one that might."""

    def __init__(self, session: UpstreamSession, routes: Routes) -> None:
        self._session = session
        self._routes = routes
        self._known: dict[str, dict[str, Model]] = {}
        self._asked_at: dict[str, float] = {}
        self._asking: asyncio.Lock = asyncio.Lock()

    async def models(self) -> list[Model]:
        """OpenAI's model objects: aliases and model groups first, then each upstream's; a name that two upstreams have, once."""
        await self.refresh()
        merged: dict[str, Model] = {}
        for name, route in self._routes.aliases.items():
            merged[name] = _model(name, "headwater") | {"targets": [str(target) for target in route.targets]}
        for upstream in self._session.upstreams.values():
            listed = self._known.get(upstream.name, {})
            for name in self._routes.listed(upstream.name):
                merged.setdefault(name, listed[name])
        for name in self._routes.known_names():
            merged.setdefault(name, _model(name, "headwater"))
        return list(merged.values())

    async def refresh(self) -> None:
        """Ask every upstream that was not asked lately. Never raises: who does not answer is left as it was."""
        async with self._asking:
            now = asyncio.get_running_loop().time()
            due = [
                upstream
                for upstream in self._session.upstreams.values()
                if now - self._asked_at.get(upstream.name, now - _FRESH_S) >= _FRESH_S
            ]
            await asyncio.gather(*(self._ask(upstream, now) for upstream in due))

    async def _ask(self, upstream: Upstream, now: float) -> None:
        self._asked_at[upstream.name] = now
        try:
            value = await self._fetch(upstream)
        except (ProxyError, ValueError) as error:
            _log.warning("the upstream '%s' does not list its models: %s", upstream.name, error)
            return
        entries = value.get("data") if isinstance(value, dict) else value
        models = {
            entry["id"]: {**_model(entry["id"], upstream.name), **entry}
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        }
        self._known[upstream.name] = models
        self._routes.set_listed(upstream.name, tuple(models))

    async def _fetch(self, upstream: Upstream) -> Any:
        start = self._session.request_start(upstream, "GET", "/models", {"Accept": "application/json"})
        with Watch(self._session.wheel, heartbeat_s=0, total_s=_PATIENCE_S, on_silence=lambda: None) as watch:
            async with await self._session.ask(upstream, start, (), None, watch) as reply:
                if reply.status != 200:
                    raise await reply.error()
                return loads(await reply.read_all(_MAX_LIST_BYTES))


def _model(name: str, owner: str) -> Model:
    return {"id": name, "object": "model", "created": 0, "owned_by": owner}
