"""The document at /openapi.json: it speaks of every route, and what it says of each is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from openapi_spec_validator import validate

from proxy.server.openapi import ALL, said_of
from proxy.server.operations import EVENTS, JSON, UNSPOKEN
from tests.conftest import Proxy, Start
from tests.server.contract import Asked, Contract, routes
from tests.server.stage import MODES, Stage, staged
from tests.server.test_auth import KEYS

CONTRACT = Contract()

# What a good request needs that the document does not oblige it to.
QUERIES = {"DELETE /admin/cache": "?all=true", "GET /api/credits/teams/{id}/check": "?amount=1"}

STREAMED = {"stream": True}


def test_it_is_openapi() -> None:
    validate(CONTRACT.document)


def test_every_route_is_spoken_of_and_nothing_else() -> None:
    assert {route[:2] for route in routes()} == ALL.keys() | UNSPOKEN
    for route in routes():
        if (operation := ALL.get(route[:2])) is not None:
            where, summary, _ = said_of(route, operation)
            assert f"{route.method} {route.path}" in where
            assert summary, f"the docstring of {where} says nothing of it"


@pytest.mark.parametrize("operation", [one for one in CONTRACT.operations() if one.body is not None], ids=repr)
def test_every_example_is_good(operation: Asked) -> None:
    assert operation.body is not None
    CONTRACT.validate(operation.body["schema"], operation.body["example"], operation)


async def test_everybody_is_told_the_same(proxy: Proxy, start: Start) -> None:
    guarded = await start(auth=KEYS)
    async with proxy.get("/openapi.json") as one, guarded.get("/openapi.json") as other:
        assert one.status == other.status == 200
        assert await one.json() == await other.json() == CONTRACT.document


async def test_a_page_may_use_every_method(start: Start) -> None:
    proxy = await start(server={"cors_origins": ["*"]})
    headers = {"Origin": "https://docs.example.com", "Access-Control-Request-Method": "PATCH"}
    async with proxy.client.options(f"{proxy.base}/models", headers=headers) as response:
        allowed = response.headers["Access-Control-Allow-Methods"].split(", ")
    assert set(allowed) >= {operation.method for operation in CONTRACT.operations()}


@pytest.mark.parametrize("auth", MODES, ids=["open", "keys"])
async def test_every_operation_answers_as_it_says(tmp_path: Path, auth: dict[str, Any]) -> None:
    async with staged(tmp_path, auth) as stage:
        for operation in sorted(CONTRACT.operations(), key=_when):
            await _try(stage, operation, is_open=auth["mode"] == "open")


def _when(operation: Asked) -> tuple[bool, int]:
    """In the table's order; what is deleted comes last, one before many."""
    if operation.method == "DELETE":
        return True, -len(operation.path)
    return False, [path for _, path in ALL].index(operation.path)


async def _try(stage: Stage, operation: Asked, *, is_open: bool) -> None:
    path, headers = stage.path(operation), stage.credentials(operation)
    example = None if operation.body is None else operation.body["example"]

    async def told(target: str, body: Any = example, **more: str) -> int:
        """The status of an answer that is as the document says."""
        data = None if body is None else json.dumps(body).encode()
        answer = await stage.ask(operation.method, target, more or headers, data)
        operation.check(answer)
        return answer.status

    assert await told(path + QUERIES.get(repr(operation), "")) in operation.successes, operation
    if query := operation.parameters("query"):
        await told(f"{path}?{urlencode({name: _sample(schema) for name, schema in query.items()})}")
        assert await told(f"{path}?" + urlencode(dict.fromkeys(query, "\x00"))) < 500
    if example is not None:
        await told(path, [])
        if {EVENTS, JSON} <= operation.said["responses"].get("200", {}).get("content", {}).keys():
            assert await told(path, example | STREAMED) in operation.successes
    if operation.needs != "none":
        assert await told(path, **{"x-api-key": "sk-wrong"}) == 401 or is_open


def _sample(schema: dict[str, Any]) -> Any:
    """A value of a query's that fits."""
    if "const" in schema:
        return schema["const"]
    return schema["enum"][0] if "enum" in schema else {"integer": 1, "string": "local", "number": 1}[schema["type"]]
