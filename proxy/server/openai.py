"""The OpenAI face: chat completions, the list of models, and every other `/v1/*` route relayed unread."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from urllib.parse import unquote

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage
from multidict import CIMultiDict

from proxy.chat import Identity, Target
from proxy.dialects.openai import encode
from proxy.errors import ClientError, UpstreamError
from proxy.policy.limits import most_completion_tokens
from proxy.server.auth import caller_of, check_model, may_ask, may_ask_any
from proxy.server.downstream import Downstream, cut, json_response
from proxy.server.middleware import VISIT, Visit
from proxy.server.state import STATE, State
from proxy.wire.headers import STREAM_HEADERS, downstream_headers, header_value, upstream_headers
from proxy.wire.requests import parse_chat_request, parse_object, parse_wishes, required_model, with_one_model

CHAT_PATH = "/v1/chat/completions"

# What an account at an upstream holds (https://platform.openai.com/docs/api-reference): all teams' alike, and what is done with
# it may name models of its own.
_OF_THE_ACCOUNT = frozenset(
    (
        "assistants",
        "batches",
        "containers",
        "conversations",
        "evals",
        "files",
        "fine_tuning",
        "organization",
        "threads",
        "uploads",
        "vector_stores",
    )
)

# What names a field `model` for any reader of forms, plainly or as RFC 5987 has it.
_MODEL_NAMES = re.compile(rb"""[;\s]name\*?\s*=\s*(?:[\w-]+'[^']*')?"?model["';\s]""", re.IGNORECASE)


def chat_completions(state: State, visit: Visit, message: RawRequestMessage, body: bytes, down: Downstream) -> None:
    """POST /v1/chat/completions"""
    headers = message.headers
    chat = parse_chat_request(body)
    if not may_ask_any(visit.identity):
        check_model(visit.identity, chat.model)
        if (plain := with_one_model(body, chat.body)) is not body:
            chat = parse_chat_request(plain)
    wishes = parse_wishes(headers)
    caller = caller_of(visit.identity, headers)
    with state.limiting.admitted(visit.identity, visit.headers, len(body), most_completion_tokens(chat.body)) as ticket:
        seat = state.pipeline.start(visit.id, chat, upstream_headers(headers), caller, wishes, ticket=ticket)
    visit.is_call = True
    if chat.wants_stream:
        down.stream(seat, wants_usage=chat.wants_usage)
    else:
        down.whole(seat)


async def misplaced(request: web.Request) -> web.StreamResponse:
    """A request for a path of the door's, sent at once behind one for an upgrade: all others come through the door."""
    raise ClientError(400, "misplaced_request", "Nothing is answered behind a request to upgrade the connection.")


async def list_models(request: web.Request) -> web.StreamResponse:
    """GET /v1/models: what the upstreams list, and the aliases; of these, what may be asked for."""
    identity = request[VISIT].identity
    models = await request.app[STATE].listing.models()
    return json_response({"object": "list", "data": [model for model in models if may_ask(identity, model["id"])]})


async def get_model(request: web.Request) -> web.StreamResponse:
    """GET /v1/models/{model}"""
    name = request.match_info["model"]
    for model in await request.app[STATE].listing.models():
        if model["id"] == name and may_ask(request[VISIT].identity, name):
            return json_response(model)
    raise ClientError(404, "model_not_found", f"The model '{name}' does not exist here.", param="model")


async def pass_on(request: web.Request) -> web.StreamResponse:
    """Any other /v1 route: to the upstream that serves the body's model, or to the first one; both ways unread.

    Who has a virtual key must name a model, in a POST, and nothing that the account at the upstream holds: files, batches,
    stored answers belong to all teams alike.
    """
    state = request.app[STATE]
    visit = request[VISIT]
    if visit.identity.key and not (request.method == "POST" and _first_word(request.path) not in _OF_THE_ACCOUNT):
        raise _nameless()
    body = await request.read() if request.can_read_body else None
    target, body = _target_of(state, visit.identity, request.content_type, request.headers, body)
    path = request.rel_url.raw_path.removeprefix("/v1")
    if query := request.rel_url.raw_query_string:
        path = f"{path}?{query}"
    if ".." in unquote(request.rel_url.raw_path).replace("\\", "/").split("/"):
        raise ClientError(404, "not_found", "This path is not served here.")
    headers = dict(upstream_headers(request.headers))
    headers |= {name: value for name in ("Accept", "Content-Type") if (value := request.headers.get(name)) is not None}
    headers["x-request-id"] = visit.id
    response: web.StreamResponse | None = None
    try:
        with state.limiting.admitted(visit.identity, visit.headers, len(body or b"")) as ticket:
            visit.is_call = True
            passing = state.passing.pass_on(visit.id, target, request.method, path, body, headers, ticket)
        async with passing as reply:
            down = CIMultiDict(downstream_headers(reply.headers))
            down["x-headwater-target"] = header_value(str(target))
            if reply.headers.get("Content-Type", "").startswith("text/event-stream"):
                down.update(STREAM_HEADERS)
            response = web.StreamResponse(status=reply.status, headers=down)
            await response.prepare(request)
            while data := await reply.read():
                with reply.awaiting_client():
                    async with asyncio.timeout(state.settings.streaming.send_timeout_s):
                        await response.write(data)
            await response.write_eof()
    except TimeoutError:
        cut(request)
        raise asyncio.CancelledError from None
    except UpstreamError:
        if response is None:
            raise
        # Behind the status only a broken connection can say that the rest is missing.
        cut(request)
    assert response is not None
    return response


def _target_of(
    state: State, identity: Identity, content_type: str, headers: Mapping[str, str], body: bytes | None
) -> tuple[Target, bytes | None]:
    """Where a request goes, and its body with the model's name as that upstream knows it."""
    routes = state.routes
    if body and (content_type.endswith("json") or body.lstrip()[:1] == b"{"):
        value = parse_object(body)
        if "model" in value:
            name = required_model(value)
            if not may_ask_any(identity):
                check_model(identity, name)
                body = with_one_model(body, value)
            target = routes.resolve(name).targets[0]
            return target, body if target.model == name else encode({**value, "model": target.model})
    elif body and content_type == "multipart/form-data" and (found := _model_field(headers, body)) is not None:
        name = body[found.start(1) : found.end(1)].decode("utf-8", "replace")
        # Which of several an upstream reads is its own affair, and only one is looked at.
        if identity.key and len(_MODEL_NAMES.findall(body)) > 1:
            raise ClientError(400, "several_models", "Only one field may name a model.", param="model")
        check_model(identity, name)
        target = routes.resolve(name).targets[0]
        if target.model != name:
            body = body[: found.start(1)] + target.model.encode() + body[found.end(1) :]
        return target, body
    if identity.key:
        raise _nameless()
    return Target(routes.default_upstream(), "-"), body


def _model_field(headers: Mapping[str, str], body: bytes) -> re.Match[bytes] | None:
    """The part of a form that names the model (RFC 7578): its value is group 1."""
    boundary = re.search(r'boundary="?([^";,\s]+)', headers.get("Content-Type", ""))
    if boundary is None:
        return None
    end = rb"\r\n--" + re.escape(boundary.group(1).encode())
    return re.search(rb'name="?model"?(?:;[^\r\n]*)?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]*)' + end, body)


def _nameless() -> ClientError:
    words = "With a virtual key only POST requests that name a model, and no files or the like, are passed on."
    return ClientError(403, "model_required", words, param="model")


def _first_word(path: str) -> str:
    """What comes first behind /v1/, also for an upstream that takes `//` and `/./` out of a path (RFC 3986 §5.2.4)."""
    words = [word for word in path.lower().split("/") if word not in ("", ".")]
    return words[1] if len(words) > 1 else ""
