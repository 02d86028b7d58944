"""Which targets a model's name means, and in which order a call asks them.

A name resolves, in this order: an alias from the config → a model group, which is an alias that was made while the proxy
runs → `upstream/model` → an upstream that names the model in full → an upstream whose own list has it → the first upstream
whose pattern fits. The list matters where several upstreams take any name (`models = ["*"]`), as servers found on the
machine do.
"""

from __future__ import annotations

import difflib
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise

from proxy.chat import CACHE_TIERS, CacheTier, Route, Target
from proxy.errors import ClientError
from proxy.settings import CacheSettings, ModelSettings, Settings, StreamingSettings, matches

_MAX_REMEMBERED = 4096

MAX_NAME = 256
"""Characters, as for an alias: names are remembered, and told in headers, logs and metrics."""


class Routes:
    """The names of one configuration. What a name resolved to is remembered until a list or a group changes."""

    def __init__(self, settings: Settings) -> None:
        self._streaming = settings.streaming
        self._cache = settings.cache
        # Of a cache that no model of the config uses nothing is opened at the start.
        used = [CACHE_TIERS.index(tier) for tier in CACHE_TIERS if tier in settings.cache_tiers]
        self._open_tiers = CACHE_TIERS[: max(used, default=0) + 1]
        self._aliases = {model.name: _route(model, settings.streaming, settings.cache) for model in settings.model}
        self._configured = tuple(self._aliases)
        self._closed: set[str] = set()
        self._group_problems: dict[str, list[str]] = {}
        self._patterns = {upstream.name: upstream.models for upstream in settings.upstream}
        self._listed: dict[str, tuple[str, ...]] = {}
        self._remembered: dict[str, Route] = {}

    @property
    def aliases(self) -> Mapping[str, Route]:
        """Those of the config, and then the model groups that can be asked for."""
        return self._aliases

    def group_problems(self, name: str) -> list[str]:
        """What of a model group cannot be used as it was made, and why, in words."""
        return self._group_problems.get(name, [])

    def set_group(self, name: str, group: ModelSettings | None) -> None:
        """Take note of a model group that is new or was changed: what it is told, None when it was taken out of use.

        The name of such a one, and of one that leads nowhere here, is nothing's: it is not looked for at the upstreams.
        """
        problems: list[str] = []
        if name in self._configured:
            problems = ["a [[model]] of the config has the same name, and goes first"]
        elif group is not None and (route := self._group_route(group, problems)) is not None:
            self._aliases[name] = route
            self._closed.discard(name)
        else:
            self._aliases.pop(name, None)
            self._closed.add(name)
        self._group_problems[name] = problems
        self._remembered.clear()

    def _group_route(self, group: ModelSettings, problems: list[str]) -> Route | None:
        """Where a group leads, as far as this config allows; None where that is nowhere."""
        known = tuple(entry for entry in group.targets if entry.target.partition("/")[0] in self._patterns)
        problems += [f"'{entry.target}': no upstream has that name" for entry in group.targets if entry not in known]
        if not known:
            return None
        route = _route(replace(group, targets=known), self._streaming, self._cache)
        if route.cache in self._open_tiers:
            return route
        problems.append(f"the cache '{route.cache}' is not open: no model of the config uses it")
        return replace(route, cache=self._open_tiers[-1])

    def set_listed(self, upstream: str, models: tuple[str, ...]) -> None:
        """Take note of the models that an upstream says it has."""
        if self._listed.get(upstream) != models:
            self._listed[upstream] = models
            self._remembered.clear()

    def listed(self, upstream: str) -> tuple[str, ...]:
        """The models that an upstream said it has, and may serve."""
        return tuple(name for name in self._listed.get(upstream, ()) if self._is_listed(upstream, name))

    def _is_listed(self, upstream: str, name: str) -> bool:
        return name not in self._closed and self.serves(upstream, name)

    def default_upstream(self) -> str:
        """The upstream for a request that names no model: the first one. ClientError 404 when there is none."""
        for name in self._patterns:
            return name
        raise ClientError(404, "no_upstream", "No upstream is configured.")

    def serves(self, upstream: str, model: str) -> bool:
        """Whether the config lets this upstream serve the model."""
        return any(matches(pattern, model) for pattern in self._patterns[upstream])

    def resolve(self, model: str) -> Route:
        """What a name stands for. ClientError 404 `model_not_found`, with close names, when it is nothing here."""
        found = self._remembered.get(model)
        if found is None:
            found = self._find(model)
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[model] = found
        return found

    def _find(self, model: str) -> Route:
        if model in self._aliases:
            return self._aliases[model]
        if model in self._closed:
            raise _nothing(model)
        if len(model) > MAX_NAME:
            raise _nothing(f"{model[:MAX_NAME]}…")
        streaming = self._streaming
        target = self._target(model)
        return Route(
            targets=(target,),
            weights=(None,),
            contexts={},
            recovery=streaming.recovery,
            delivers_whole=False,
            coalesces=streaming.coalesce,
            cache=_tier(self._cache),
            cache_ttl_s=self._cache.ttl_s,
            name=str(target),
        )

    def _target(self, model: str) -> Target:
        """The one target behind a name that is no alias."""
        upstream, slash, rest = model.partition("/")
        if slash and rest and upstream in self._patterns and self.serves(upstream, rest):
            return Target(upstream, rest)
        candidates = [name for name in self._patterns if self.serves(name, model)]
        for name in candidates:
            if model in self._patterns[name]:
                return Target(name, model)
        for name in candidates:
            if model in self._listed.get(name, ()):
                return Target(name, model)
        if candidates:
            return Target(candidates[0], model)
        close = difflib.get_close_matches(model, self.known_names(), n=3, cutoff=0.5)
        raise _nothing(model, f" Did you mean {' or '.join(close)}?" if close else "")

    def known_names(self) -> list[str]:
        """Every model name that all may know of: aliases, names in the config, names the upstreams have listed.

        No model groups, which may be for some teams only.
        """
        names = dict.fromkeys(self._configured)
        for upstream, patterns in self._patterns.items():
            names |= dict.fromkeys(
                pattern
                for pattern in patterns
                if not any(sign in pattern for sign in "*?[") and self._is_listed(upstream, pattern)
            )
            names |= dict.fromkeys(self.listed(upstream))
        return list(names)


def _nothing(model: str, hint: str = "") -> ClientError:
    return ClientError(404, "model_not_found", f"The model '{model}' does not exist here.{hint}", param="model")


def _route(model: ModelSettings, streaming: StreamingSettings, cache: CacheSettings) -> Route:
    targets = tuple(Target(*entry.target.split("/", 1)) for entry in model.targets)
    return Route(
        targets=targets,
        weights=tuple(entry.weight for entry in model.targets),
        contexts={
            target: entry.context_tokens
            for target, entry in zip(targets, model.targets, strict=True)
            if entry.context_tokens is not None
        },
        recovery=streaming.recovery if model.recovery is None else model.recovery,
        delivers_whole=model.delivery == "whole",
        coalesces=streaming.coalesce if model.coalesce is None else model.coalesce,
        cache=_tier(cache) if model.cache is None else model.cache,
        cache_ttl_s=cache.ttl_s if model.cache_ttl_s is None else model.cache_ttl_s,
        name=" ".join(map(str, targets)),
    )


def _tier(cache: CacheSettings) -> CacheTier:
    if not cache.exact:
        return "off"
    return "semantic" if cache.semantic else "exact"


def draw(route: Route, luck: Callable[[], float]) -> tuple[Target, ...]:
    """The targets in the order in which one call asks them; each place among those in a row that have a weight is drawn.

    A place goes to one of the targets left with a probability in proportion to its weight. `luck` gives numbers in
    [0, 1), as `random.random` does; it is called once for each place at which there is a choice. Where there is none at
    all, this is `route.targets` itself.
    """
    if len(route.weights) == 1 or not any(one and other for one, other in pairwise(route.weights)):
        return route.targets
    order: list[Target] = []
    equals: list[tuple[Target, float]] = []
    for target, weight in zip(route.targets, route.weights, strict=True):
        if weight is not None:
            equals.append((target, weight))
            continue
        order += _drawn(equals, luck)
        order.append(target)
        equals = []
    order += _drawn(equals, luck)
    return tuple(order)


def _drawn(equals: list[tuple[Target, float]], luck: Callable[[], float]) -> Iterator[Target]:
    left = list(equals)
    while len(left) > 1:
        sums = list(accumulate(weight for _, weight in left))
        # Rounding must not lead past the end: the bound that `random.choices` has for the same reason.
        target, _ = left.pop(bisect(sums, luck() * sums[-1], hi=len(sums) - 1))
        yield target
    yield from (target for target, _ in left)
