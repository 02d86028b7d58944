"""GET /openapi.json: what there is to ask of this proxy, and what it answers, as an OpenAPI 3.1 document.

It is made of the routes themselves, of the docstrings of their handlers, and of what `operations.py` says of each. Nothing in it
comes from the settings: it tells nobody more than the source does, and is open to all, as programs that read such documents
send no keys. (https://spec.openapis.org/oas/v3.1.1; its schemas are JSON Schema 2020-12.)
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from http import HTTPStatus
from typing import Any, NamedTuple

from aiohttp import web
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from proxy import __version__
from proxy.server import shapes
from proxy.server.ledgeroperations import LEDGER_OPERATIONS
from proxy.server.middleware import is_open_while_draining, needed_key
from proxy.server.operations import EVENTS, JSON, OPERATIONS, Answer, Operation
from proxy.wire.encoding import dumps

ALL = {**OPERATIONS, **LEDGER_OPERATIONS}

_ABOUT = """\
A streaming reverse proxy for LLM APIs. What is asked under `/v1` is OpenAI's; the rest is this proxy's own.

Where `auth.mode` is "open" no virtual key is needed, nor, unless one is configured, an admin key. Every answer has an
`x-request-id`: yours, where you sent one. An error in the middle of a stream is its last event: no `[DONE]` comes behind it."""

# How a key is presented, and what a scheme of that kind is called.
_PRESENTED: Mapping[str, Mapping[str, str]] = {
    "": {"type": "http", "scheme": "bearer"},
    "AsApiKey": {"type": "apiKey", "in": "header", "name": "api-key"},
    "AsXApiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_KEYS = {"virtual": "virtualKey", "admin": "adminKey"}

_STRING, _NUMBER = {"type": "string"}, {"type": "integer"}
_HEADERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "x-headwater-target": ("The upstream and the model that answered.", _STRING),
    "x-headwater-attempts": ("After how many attempts; 0 for an answer from the cache.", _NUMBER),
    "x-headwater-stream": ("The answer's id, for /v1/streams/{id}.", _STRING),
    "x-headwater-job": ("The job that the call belongs to.", _STRING),
    "x-headwater-error-source": ("Whose fault it is.", {"type": "string", "enum": ["client", "proxy", "upstream"]}),
    "x-cache": ("`miss`, `bypass`, or what kind of hit.", _STRING),
    "Retry-After": ("Seconds until it may be tried again.", _STRING),
    "WWW-Authenticate": ("RFC 9110 §11.6.1.", _STRING),
    **{
        f"x-ratelimit-{what}-{of}": (f"OpenAI's: the {words} of the limit of {of}.", _STRING)
        for of in ("requests", "tokens")
        for what, words in (("limit", "size"), ("remaining", "rest"), ("reset", "time until all is there again"))
    },
}
# Where they are spoken of they are there, and others may be.
_ALWAYS = ("x-headwater-error-source", "WWW-Authenticate")
_LIMITS = tuple(name for name in _HEADERS if name.startswith("x-ratelimit-"))
_OF_ERRORS: Mapping[str, tuple[str, ...]] = {
    "401": ("WWW-Authenticate",),
    "429": ("Retry-After", *_LIMITS),
    "503": ("Retry-After",),
}

# What stands in a path, where its name does not say it.
_IN_PATHS = {
    "model": "As it is listed: it may hold slashes.",
    "rest": "Any other path of OpenAI's, such as `embeddings`: it may hold slashes.",
}

# The method and the paths that a docstring begins with: the document has them anyway.
_WHERE = re.compile(r"([A-Z]+|\*) (/[^\s,:]*(?:, /[^\s,:]*)*)(?:: |$)")


class Route(NamedTuple):
    """A route as the router has it: its method (`*` is any), its path as it is written, and its handler's docstring."""

    method: str
    path: str
    docstring: str


async def show(request: web.Request) -> web.StreamResponse:
    """GET /openapi.json: this document."""
    body = await asyncio.to_thread(document, routes_of(request.app))
    return web.Response(body=body, content_type="application/json")


def routes_of(app: web.Application) -> tuple[Route, ...]:
    """All routes of an app. HEAD, which aiohttp adds to each GET, is left out."""
    return tuple(
        Route(route.method, route.resource.canonical, route.handler.__doc__ or "")
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    )


def said_of(route: Route, operation: Operation) -> tuple[list[str], str, str]:
    """What the docstring says of a route: the methods and paths that it is for, its first sentence, and the rest.

    ValueError without the first.
    """
    docstring = route.docstring if operation.speaker is None else operation.speaker.__doc__ or ""
    found = _WHERE.match(" ".join(docstring.split()))
    if found is None:
        raise ValueError(f"the docstring of {route.method} {route.path} does not begin with these")
    first, _, rest = found.string[found.end() :].partition(". ")
    paths = [path.partition("?")[0] for path in found[2].split(", ")]
    return [f"{found[1]} {path}" for path in paths], first[:1].upper() + first[1:].removesuffix("."), rest


@lru_cache(maxsize=1)
def document(routes: tuple[Route, ...]) -> bytes:
    """The document as JSON. Takes up to 200 ms the first time."""
    spoken_of = [(route, ALL[route[:2]]) for route in routes if route[:2] in ALL]
    schemas = _Schemas([operation for _, operation in spoken_of])
    paths: dict[str, dict[str, Any]] = {}
    for route, operation in spoken_of:
        # With a virtual key nothing else is passed on.
        method = "post" if route.method == "*" else route.method.lower()
        paths.setdefault(route.path, {})[method] = _operation(method, route, operation, schemas)
    return dumps(
        {
            "openapi": "3.1.0",
            "info": {"title": "Headwater", "version": __version__, "description": _ABOUT},
            "servers": [{"url": "/"}],
            "paths": paths,
            "components": {
                "schemas": schemas.components,
                "headers": {
                    name: {"description": words, "required": name in _ALWAYS, "schema": kind}
                    for name, (words, kind) in _HEADERS.items()
                },
                "responses": {_name_of(status): _response_of(status) for status in _statuses(paths)},
                "securitySchemes": {
                    name + how: kind for name in _KEYS.values() for how, kind in _PRESENTED.items()
                },
            },
        }
    )  # fmt: skip


def _operation(method: str, route: Route, operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    _, summary, rest = said_of(route, operation)
    found: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method}{route.path}").strip("_"),
        "tags": [_tag_of(route.path)],
        "summary": summary,
        "security": _security(route.path),
        "responses": {
            **{str(status): _answer(answer, schemas) for status, answer in operation.answers.items()},
            **{
                status: {"$ref": f"#/components/responses/{_name_of(status)}", "description": f"{words}."}
                for status, words in sorted(_errors(route, operation).items())
                if status not in map(str, operation.answers)
            },
        },
    }
    if rest:
        found["description"] = rest
    if parameters := [*_of_path(route.path, operation, schemas), *_of_query(operation, schemas)]:
        found["parameters"] = parameters
    if operation.body is not None:
        content = {JSON: {"schema": schemas.of(operation.body), "example": operation.example}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _of_path(path: str, operation: Operation, schemas: _Schemas) -> Iterator[dict[str, Any]]:
    kinds = schemas.members(operation.path)
    for name in re.findall(r"{(\w+)}", path):
        yield _parameter(name, "path", {"description": _IN_PATHS.get(name), **kinds.get(name, _STRING)}, required=True)


def _of_query(operation: Operation, schemas: _Schemas) -> Iterator[dict[str, Any]]:
    for place, form in (("query", operation.query), ("header", operation.headers)):
        required = getattr(form, "__required_keys__", ())
        for name, kind in schemas.members(form).items():
            yield _parameter(name, place, kind, required=name in required)


def _parameter(name: str, place: str, kind: Mapping[str, Any], *, required: bool) -> dict[str, Any]:
    """What OpenAPI says beside a schema, and not in it: its description."""
    schema = dict(kind)
    words = schema.pop("description", None)
    found = {"name": name, "in": place, "required": required, "schema": schema}
    return found if words is None else {**found, "description": words}


def _answer(answer: Answer, schemas: _Schemas) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for media, kind in answer.kinds.items():
        # OpenAPI 3.1 has no word for what each event of a stream holds.
        is_stream = media == EVENTS
        content[media] = (
            {"schema": _STRING, "x-event-schema": schemas.of(kind)} if is_stream else {"schema": schemas.of(kind)}
        )
    return _response(answer.words, content, answer.headers)


def _response(words: str, content: Mapping[str, Any], headers: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"description": words}
    if headers:
        found["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in headers}
    if content:
        found["content"] = content
    return found


def _response_of(status: str) -> dict[str, Any]:
    """What all errors of that status have in common."""
    content = {JSON: {"schema": {"$ref": f"#/components/schemas/{shapes.Error.__name__}"}}}
    return _response("An error.", content, ("x-headwater-error-source", *_OF_ERRORS.get(status, ())))


def _name_of(status: str) -> str:
    """What the component of such errors is called."""
    if not status.isdigit():
        return "OtherClientError" if status == "4XX" else "OtherServerError"
    return re.sub(r"\W", "", HTTPStatus(int(status)).phrase.title())


def _statuses(paths: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The statuses of errors that some operation has."""
    return sorted(
        {
            status
            for operations in paths.values()
            for operation in operations.values()
            for status, response in operation["responses"].items()
            if "$ref" in response
        }
    )


def _errors(route: Route, operation: Operation) -> dict[str, str]:
    """All errors of a route, by status: those of its own, and those that follow from what it reads and who may ask."""
    found: list[tuple[int | str, str]] = [*operation.refuses.items()]
    key = needed_key(route.path)
    if operation.body is not None:
        words = "`invalid_json`, `invalid_body`, `invalid_type`, `invalid_value`, `missing_required_parameter`"
        found.append((400, f"The body is wrong, and `param` says where: {words}, `unknown_parameter`"))
        found.append((408, "The body did not come: `request_timeout`"))
        found.append((413, "The body is too large: `request_too_large`"))
    elif key != "none":
        found.append(
            (
                400,
                "The query or the path is wrong, and `param` says where: `invalid_value`, `missing_required_parameter`",
            )
        )
    if "{" in route.path:
        found.append((404, "There is no such path: `not_found`"))
    if key == "virtual":
        found.append((401, "There is no key, or no good one: `missing_api_key`, `invalid_api_key`"))
        found.append((403, "The key may not be used now: `key_suspended`, `key_expired`, `team_suspended`"))
    elif key == "admin":
        found.append((401, "This is not the admin key: `invalid_admin_key`"))
        found.append((403, "Nobody has an admin key: `no_admin_key`"))
    found.append((403, "A page of another origin asks: `origin_not_allowed`"))
    if not is_open_while_draining(route.path):
        found.append((503, "It is stopping: `shutting_down`"))
    if key != "none":
        words = "`database_unavailable`, `ledger_unavailable`, `cache_unavailable`"
        found.append((503, f"A database cannot be used now: {words}"))
    errors: dict[str, str] = {}
    for status, words in found:
        errors[str(status)] = f"{errors[str(status)]}. {words}" if str(status) in errors else words
    return errors


def _security(path: str) -> list[dict[str, list[str]]]:
    key = needed_key(path)
    return [] if key == "none" else [{_KEYS[key] + how: []} for how in _PRESENTED]


def _tag_of(path: str) -> str:
    first, second = f"{path}/".split("/")[1:3]
    if first == "v1":
        return "OpenAI"
    return second if first in ("admin", "api") else "proxy"


class _Titleless(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class _Schemas:
    """The JSON Schemas of everything that the operations speak of. `components` are those with a name, by that."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        parameters = {
            form: None for one in operations for form in (one.query, one.headers, one.path) if form is not None
        }
        bodies = {one.body: None for one in operations if one.body is not None}
        kinds = {kind: None for one in operations for answer in one.answers.values() for kind in answer.kinds.values()}
        self._found, shared = TypeAdapter.json_schemas(
            [(kind, "validation", TypeAdapter(kind)) for kind in {**parameters, **bodies, **kinds, shapes.Error: None}],
            schema_generator=_Titleless,
            ref_template="#/components/schemas/{model}",
        )
        self.components: dict[str, Any] = shared["$defs"]
        self._members: dict[Any, dict[str, Any]] = {
            form: self.components.pop(self.of(form)["$ref"].rpartition("/")[2])["properties"] for form in parameters
        }

    def of(self, kind: Any) -> dict[str, Any]:
        """The schema of a type: for one with a name, where it stands."""
        return self._found[kind, "validation"]

    def members(self, form: type[Any] | None) -> dict[str, Any]:
        """The schemas of all that may stand in a path, a query or the headers, by name."""
        return {} if form is None else self._members[form]
