"""The document at /openapi.json as a judge: whether an answer is one that it speaks of.

What the document leaves open to those who read it, further members of our own objects, is closed here: a member that it does not
speak of is a mistake in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from jsonschema import Draft202012Validator

from proxy.server.app import make_app
from proxy.server.openapi import Route, document, routes_of
from proxy.server.state import State
from proxy.settings import Settings
from tests.fakes.client import Answer

JSON = "application/json"


@cache
def routes() -> tuple[Route, ...]:
    """Every route there is."""
    return routes_of(make_app(cast(State, SimpleNamespace(settings=Settings()))))


class Asked(NamedTuple):
    """One operation of the document."""

    contract: Contract
    method: str
    path: str
    said: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def needs(self) -> str:
        """Which key: none, virtual, admin."""
        schemes = {next(iter(scheme)) for scheme in self.said["security"]}
        return "admin" if "adminKey" in schemes else "virtual" if "virtualKey" in schemes else "none"

    def parameters(self, place: str) -> dict[str, Any]:
        """The schemas of what may stand there."""
        return {one["name"]: one["schema"] for one in self.said.get("parameters", ()) if one["in"] == place}

    @property
    def body(self) -> dict[str, Any] | None:
        """What is said of its body: a `schema` and an `example`."""
        found = self.said.get("requestBody")
        return None if found is None else cast(dict[str, Any], found["content"][JSON])

    @property
    def successes(self) -> set[int]:
        return {int(status) for status, said in self.said["responses"].items() if "$ref" not in said}

    def check(self, answer: Answer) -> None:
        """AssertionError for an answer that the document does not speak of."""
        where = (self, answer.status, answer.body[:500])
        responses = self.said["responses"]
        said = responses.get(str(answer.status)) or responses.get(f"{answer.status // 100}XX")
        assert said is not None, where
        words = said["description"]
        said = self.contract.resolved(said)
        for name, header in said.get("headers", {}).items():
            if self.contract.resolved(header)["required"]:
                assert name.lower() in answer.headers, (name, where)
        if "content" not in said:
            assert answer.body == b"", where
            return
        media = answer.headers["content-type"].partition(";")[0]
        kind = said["content"].get(media) or said["content"].get("*/*")
        assert kind is not None, (media, where)
        if media == JSON:
            value = json.loads(answer.body)
            self.contract.validate(kind["schema"], value, where)
            if answer.status >= 400 and answer.headers["x-headwater-error-source"] != "upstream":
                assert f"`{value['error']['code']}`" in words, where
        elif media == "text/event-stream":
            for event in _events(answer.body):
                self.contract.validate(kind["x-event-schema"], event, where)


class Contract:
    """The document, of this app."""

    def __init__(self) -> None:
        self.document: dict[str, Any] = json.loads(document(routes()))
        self._components = deepcopy(self.document["components"])
        for schema in self._components["schemas"].values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)

    def operations(self) -> list[Asked]:
        return [
            Asked(self, method.upper(), path, said)
            for path, methods in self.document["paths"].items()
            for method, said in methods.items()
        ]

    def resolved(self, said: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a reference refers to; anything else as it is."""
        if "$ref" not in said:
            return said
        found = self.document
        for name in said["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return found

    def validate(self, schema: Mapping[str, Any], value: Any, where: Any) -> None:
        """AssertionError when the value does not fit."""
        validator = Draft202012Validator({**schema, "components": self._components})
        problems = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]
        assert not problems, (problems, where)


def _events(body: bytes) -> Iterator[Any]:
    """What the events of a whole stream hold."""
    found = re.findall(rb"^data: (.*)$", body, re.MULTILINE)
    assert found.pop() == b"[DONE]", body
    yield from map(json.loads, found)
