"""Every operation of our own document, with whatever may come: never a 500, always an answer that the document speaks of.

`make fuzz` tries more, and at random; the default profile tries the same each time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tests.conftest import ADMIN_KEY, examples
from tests.server.contract import Asked, Contract
from tests.server.stage import Stage, staged
from tests.server.test_auth import KEYS

CONTRACT = Contract()
IS_DEFAULT = settings.get_current_profile_name() == "default"

_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, 2**64, -(2**63) - 1, 10**400, -1, 0])
    | st.floats()
    | _TEXT
    | st.sampled_from(["\x00", "\ud800", "x" * 5000, "１", "local", "2026-13-45", "1e999", "%00"])
)
ANYTHING: SearchStrategy[Any] = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3), max_leaves=5
)

# Bodies that are no JSON objects, or only just.
_RAW = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"{",
    b"{}",
    b"\x00",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b"a=b&c=d",
    b"[" * 50_000,
    b'{"metadata":' * 300 + b"1" + b"}" * 300,
    b'{"model":"model-a","messages":' + b"[" * 1000 + b"]" * 1000 + b"}",
    b'{"id":"a","id":"b","team":"local","team":1}',
    b'{"amount":' + b"9" * 5000 + b"}",
    b'{"amount":1e400,"expires_at":-0.0}',
    b'{"name":"\\ud800","id":"\\u0000"}',
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nmodel-a\r\n--x--\r\n',
]
_KINDS = ["application/json", "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "?"]
_NAMES = ["local", "1", "0", "-1", "9" * 40, ".", "..", "%00", "%ED%A0%80", "%FF", "%", "%zz", "a" * 5000, "a%2Fb"]
_PLAIN = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)


class Try(NamedTuple):
    """A request, and whether it presents what lets in."""

    target: str
    headers: Mapping[str, str]
    body: bytes | None
    is_let_in: bool


def fitting(schema: Mapping[str, Any]) -> SearchStrategy[Any]:
    """Values that fit a schema of the document's, as far as it uses JSON Schema."""
    schema = CONTRACT.resolved(schema)
    match schema:
        case {"anyOf": kinds}:
            return st.one_of([fitting(kind) for kind in kinds])
        case {"const": value}:
            return st.just(value)
        case {"enum": values}:
            return st.sampled_from(values)
        case {"type": "string", "pattern": pattern}:
            return st.from_regex(pattern, fullmatch=True).filter(lambda text: len(text) <= schema.get("maxLength", 100))
        case {"type": "string"}:
            return st.text(min_size=schema.get("minLength", 0), max_size=20)
        case {"type": "integer"}:
            return st.integers(schema.get("minimum"), schema.get("maximum"))
        case {"type": "number"}:
            return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)
        case {"type": "boolean"}:
            return st.booleans()
        case {"type": "null"}:
            return st.none()
        case {"type": "array"}:
            return st.lists(fitting(schema.get("items", {})), min_size=schema.get("minItems", 0), max_size=3)
        case {"type": "object"}:
            members = {name: fitting(kind) for name, kind in schema.get("properties", {}).items()}
            required = set(schema.get("required", ()))
            return st.fixed_dictionaries(
                {name: kind for name, kind in members.items() if name in required},
                optional={name: kind for name, kind in members.items() if name not in required},
            )
    return ANYTHING


@st.composite
def _bodies(draw: DrawFn, schema: Mapping[str, Any], example: Mapping[str, Any]) -> bytes:
    """Such as fit, nearly fit, and do not fit at all."""
    how = draw(st.sampled_from(["fits", "wrong", "extra", "missing", "twice", "anything", "raw"]))
    if how == "raw":
        return draw(st.sampled_from(_RAW))
    if how == "anything":
        value: Any = draw(ANYTHING)
    else:
        value = {**example, **draw(fitting(schema))} if draw(st.booleans()) else draw(fitting(schema))
        names = sorted(CONTRACT.resolved(schema)["properties"])
        if how == "wrong":
            value[draw(st.sampled_from(names))] = draw(ANYTHING)
        elif how == "extra":
            value[draw(_TEXT)] = draw(ANYTHING)
        elif how == "missing":
            value.pop(draw(st.sampled_from(names)), None)
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    if how == "twice":
        text = f"{text[:-1]}, {json.dumps(example)[1:]}"
    return text.encode("utf-8", "surrogatepass")


@st.composite
def _tries(draw: DrawFn, operation: Asked, stage: Stage) -> Try:
    """Requests for an operation, most of them by who may ask, and for what is there."""
    names = dict(stage.names_of(operation))
    for name in operation.parameters("path"):
        if draw(st.sampled_from([True, False, False])):
            names[name] = draw(st.sampled_from(_NAMES) | _TEXT.filter(bool).map(_quoted))
    target = operation.path.format(**names)
    members = operation.parameters("query")
    values = st.one_of(_TEXT, *(fitting(kind).map(str) for kind in members.values()))
    query = draw(st.lists(st.tuples(st.sampled_from([*members, "unknown"]), values), max_size=3))
    if query:
        target += "?" + "&".join(f"{name}={_quoted(value)}" for name, value in query)
    wishes = {name: _PLAIN | _plain(kind) for name, kind in operation.parameters("header").items()}
    headers = draw(st.fixed_dictionaries({}, optional=wishes))
    body = None
    if operation.body is not None:
        body = draw(_bodies(operation.body["schema"], operation.body["example"]))
        headers["Content-Type"] = draw(st.sampled_from(_KINDS))
    who = draw(st.sampled_from(["right"] * 8 + ["nobody", "wrong", "other"]))
    match who:
        case "right":
            headers |= stage.credentials(operation)
        case "wrong":
            headers["api-key"] = "sk-hw-wrong"
        case "other":
            headers["x-api-key"] = stage.key if operation.needs == "admin" else ADMIN_KEY
    return Try(target, headers, body, is_let_in=who == "right" or operation.needs == "none")


def _plain(schema: Mapping[str, Any]) -> SearchStrategy[str]:
    """A header's values that fit, as far as it says which these are."""
    return fitting(schema).map(str) if "enum" in schema else _PLAIN


def _quoted(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Stage]]:
    """A proxy for all of them, which runs while it is asked."""
    with asyncio.Runner() as runner:
        context = staged(tmp_path_factory.mktemp("fuzz"), KEYS)
        yield runner, runner.run(context.__aenter__())
        runner.run(context.__aexit__(None, None, None))


@pytest.mark.parametrize("operation", CONTRACT.operations(), ids=repr)
@settings(examples(12), derandomize=IS_DEFAULT, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_is_asked_is_answered_as_the_document_says(
    operation: Asked, running: tuple[asyncio.Runner, Stage], data: st.DataObject
) -> None:
    runner, stage = running
    tried = data.draw(_tries(operation, stage))
    answer = runner.run(stage.ask(operation.method, tried.target, tried.headers, tried.body))
    operation.check(answer)
    assert answer.status != 500, answer.body
    assert tried.is_let_in or answer.status in (401, 404), answer.body
