"""Which target a model's name means.

A name resolves, in this order: an alias from the config → `upstream/model` → an upstream that names the model in full
→ an upstream whose own list has it → the first upstream whose pattern fits. The list matters where several upstreams
take any name (`models = ["*"]`), as servers found on the machine do.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from proxy.chat import Target
from proxy.errors import ClientError
from proxy.settings import Settings, matches

_MAX_REMEMBERED = 4096


class Routes:
    """The names of one configuration. What a name resolved to is remembered until a list changes."""

    def __init__(self, settings: Settings) -> None:
        self._aliases = {
            model.name: tuple(Target(*target.split("/", 1)) for target in model.targets) for model in settings.model
        }
        self._patterns = {upstream.name: upstream.models for upstream in settings.upstream}
        self._listed: dict[str, tuple[str, ...]] = {}
        self._remembered: dict[str, tuple[Target, ...]] = {}

    @property
    def aliases(self) -> Mapping[str, tuple[Target, ...]]:
        return self._aliases

    def set_listed(self, upstream: str, models: tuple[str, ...]) -> None:
        """Take note of the models that an upstream says it has."""
        if self._listed.get(upstream) != models:
            self._listed[upstream] = models
            self._remembered.clear()

    def listed(self, upstream: str) -> tuple[str, ...]:
        """The models that an upstream said it has, and may serve."""
        return tuple(name for name in self._listed.get(upstream, ()) if self.serves(upstream, name))

    def default_upstream(self) -> str:
        """The upstream for a request that names no model: the first one. ClientError 404 when there is none."""
        for name in self._patterns:
            return name
        raise ClientError(404, "no_upstream", "No upstream is configured.")

    def serves(self, upstream: str, model: str) -> bool:
        """Whether the config lets this upstream serve the model."""
        return any(matches(pattern, model) for pattern in self._patterns[upstream])

    def resolve(self, model: str) -> tuple[Target, ...]:
        """The targets for a name, first to last. ClientError 404 `model_not_found`, with close names, when there is none."""
        found = self._remembered.get(model)
        if found is None:
            found = self._find(model)
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[model] = found
        return found

    def _find(self, model: str) -> tuple[Target, ...]:
        if model in self._aliases:
            return self._aliases[model]
        upstream, slash, rest = model.partition("/")
        if slash and rest and upstream in self._patterns and self.serves(upstream, rest):
            return (Target(upstream, rest),)
        candidates = [name for name in self._patterns if self.serves(name, model)]
        for name in candidates:
            if model in self._patterns[name]:
                return (Target(name, model),)
        for name in candidates:
            if model in self._listed.get(name, ()):
                return (Target(name, model),)
        if candidates:
            return (Target(candidates[0], model),)
        close = difflib.get_close_matches(model, self.known_names(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ClientError(404, "model_not_found", f"The model '{model}' does not exist here.{hint}", param="model")

    def known_names(self) -> list[str]:
        """Every model name that is known: aliases, names in the config, names the upstreams have listed."""
        names = dict.fromkeys(self._aliases)
        for upstream, patterns in self._patterns.items():
            names |= dict.fromkeys(pattern for pattern in patterns if not any(sign in pattern for sign in "*?["))
            names |= dict.fromkeys(self.listed(upstream))
        return list(names)
