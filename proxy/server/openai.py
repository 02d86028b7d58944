"""The OpenAI face: chat completions, the list of models, and every other `/v1/*` route relayed unread."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from functools import partial
from urllib.parse import unquote

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage
from multidict import CIMultiDict, MultiMapping

from proxy.answers import Seat
from proxy.chat import ChatRequest, Target
from proxy.dialects.openai import encode
from proxy.errors import ClientError, UpstreamError
from proxy.policy.limits import most_completion_tokens
from proxy.server.accounting import Entry
from proxy.server.auth import caller_of, check_model, may_ask, may_ask_any
from proxy.server.door import Later, Way
from proxy.server.downstream import Downstream, cut, for_team, json_response
from proxy.server.middleware import VISIT, Visit
from proxy.server.state import STATE, State
from proxy.wire.headers import STREAM_HEADERS, downstream_headers, header_value, upstream_headers
from proxy.wire.requests import parse_chat_request, parse_object, parse_wishes, required_model, with_one_model

CHAT_PATH = "/v1/chat/completions"
_CHAT_WORDS = ["v1", "chat", "completions"]

JOB, PURPOSE = "x-headwater-job", "x-headwater-purpose"
"""The headers by which a call says which job it belongs to, and in a word of its own what it is for."""

# What an account at an upstream holds (https://platform.openai.com/docs/api-reference): all teams' alike, and what is done with
# it may name models of its own. Sessions too: their secrets open the account past this proxy.
_HELD_BY_THE_ACCOUNT = frozenset(
    (
        "assistants",
        "batches",
        "chatkit",
        "containers",
        "conversations",
        "evals",
        "files",
        "fine_tuning",
        "organization",
        "realtime",
        "threads",
        "uploads",
        "vector_stores",
    )
)

# What generates text: its answers have as many tokens as nobody knows.
_GENERATING = ("completions", "responses", "messages")

# The head of a form's field says that it is the model's. Its bounds, and that of fields: no program comes near them.
_MODEL_NAME = re.compile(rb'[;\s]name="?model"?[;\r]')
_LINE_END = re.compile(rb"[\r\n]")
_MAX_PART_HEAD_BYTES, _MAX_FIELDS = 4096, 1000

# What may name a field `model` for any reader of forms: plainly, with backslashes (RFC 9110 §5.6.4), or encoded or in pieces
# (RFC 2231), whatever name that is: no program names its fields so (RFC 7578 §5.1).
_MODEL_NAMES = re.compile(rb"""[;\s]name(?:\*[\d*]*\s*=|\s*=\s*"?\\?m\\?o\\?d\\?e\\?l["';\s])""", re.IGNORECASE)


def chat_completions(
    state: State, visit: Visit, message: RawRequestMessage, body: bytes, down: Downstream
) -> Later | None:
    """POST /v1/chat/completions: an answer, as a stream or as one body. Every parameter passes through unread."""
    chat = parse_chat_request(body)
    entry = begin(state, visit, message.headers, chat.model, chat.body.get("user"))
    start = prepared(state, visit, entry, message.headers, chat)
    if entry.job is not None:
        return partial(_chat_in_job, visit, entry, start, chat, down)
    deliver(start(), chat, down)
    return None


WAY = Way("POST", CHAT_PATH, chat_completions)


async def _chat_in_job(
    visit: Visit, entry: Entry, start: Callable[[], Seat], chat: ChatRequest, down: Downstream
) -> None:
    await enter_job(visit, entry)
    deliver(start(), chat, down)


def deliver(seat: Seat, chat: ChatRequest, down: Downstream) -> None:
    """Answer as the request wants it."""
    if chat.wants_stream:
        down.stream(seat, wants_usage=chat.wants_usage)
    else:
        down.whole(seat)


def prepared(
    state: State, visit: Visit, entry: Entry, headers: MultiMapping[str], chat: ChatRequest
) -> Callable[[], Seat]:
    """What starts a call that may be made. ClientError 400, 403, 429 when it may not."""
    if not may_ask_any(visit.identity):
        check_model(visit.identity, chat.model)
        if (plain := with_one_model(chat.raw, chat.body)) is not chat.raw:
            chat = parse_chat_request(plain)
    wishes = parse_wishes(headers)
    caller = caller_of(visit.identity, headers)
    entry.admit(visit.headers, len(chat.raw), most_completion_tokens(chat.body))

    def start() -> Seat:
        going_up = upstream_headers(headers, for_team=visit.identity.has_key)
        seat = state.pipeline.start(visit.id, chat, going_up, caller, wishes, ticket=entry)
        visit.is_call = True
        entry.log = seat.log
        return seat

    return start


async def enter_job(visit: Visit, entry: Entry) -> None:
    """Begin a call of a job, before anything of an answer is given. ClientError 404 without such a job, 409 when it has ended."""
    await entry.enter_job()
    visit.headers[JOB] = entry.job or ""


def begin(state: State, visit: Visit, headers: Mapping[str, str], model: str, user: object = None) -> Entry:
    """The entry of a call that begins, for a model; from now on it is accounted for, also when it is refused."""
    visit.entry = entry = state.accounting.entry(
        visit.identity, visit.id, model, user=user, job=headers.get(JOB), purpose=headers.get(PURPOSE, "")
    )
    return entry


async def misplaced(request: web.Request) -> web.StreamResponse:
    """A request for a path of the door's, sent at once behind one for an upgrade: all others come through the door."""
    raise ClientError(400, "misplaced_request", "Nothing is answered behind a request to upgrade the connection.")


async def list_models(request: web.Request) -> web.StreamResponse:
    """GET /v1/models: what the upstreams list, the aliases and the model groups; of these, what may be asked for."""
    identity = request[VISIT].identity
    models = await request.app[STATE].listing.models()
    return json_response({"object": "list", "data": [model for model in models if may_ask(identity, model["id"])]})


async def get_model(request: web.Request) -> web.StreamResponse:
    """GET /v1/models/{model}: one of them."""
    name = request.match_info["model"]
    for model in await request.app[STATE].listing.models():
        if model["id"] == name and may_ask(request[VISIT].identity, name):
            return json_response(model)
    raise ClientError(404, "model_not_found", f"The model '{name}' does not exist here.", param="model")


async def pass_on(request: web.Request) -> web.StreamResponse:
    """* /v1/{rest}: any other request of OpenAI's, both ways unread. It goes to the upstream that serves the body's model, or
    to the first one.

    Who has a virtual key must name a model, in a POST, and nothing that the account at the upstream holds: files, batches,
    stored answers belong to all teams alike.
    """
    state = request.app[STATE]
    visit = request[VISIT]
    words = _words(request.path)
    if request.method == "POST" and words == _CHAT_WORDS:
        # An upstream may take it for a chat request, and nobody would mend or count the answer.
        raise ClientError(404, "not_found", f"Chat requests are served at {CHAT_PATH}, by no other spelling of it.")
    if visit.identity.has_key and (request.method != "POST" or _HELD_BY_THE_ACCOUNT.intersection(words[1:2])):
        raise _nameless()
    body = await request.read() if request.can_read_body else None
    entry, target, body = _target_of(state, visit, request.content_type, request.headers, body)
    path = request.rel_url.raw_path.removeprefix("/v1")
    if query := request.rel_url.raw_query_string:
        path = f"{path}?{query}"
    if ".." in unquote(request.rel_url.raw_path).replace("\\", "/").split("/"):
        raise ClientError(404, "not_found", "This path is not served here.")
    headers = dict(upstream_headers(request.headers, for_team=visit.identity.has_key))
    headers |= {name: value for name in ("Accept", "Content-Type") if (value := request.headers.get(name)) is not None}
    headers["x-request-id"] = visit.id
    response: web.StreamResponse | None = None
    try:
        if request.method != "POST":
            # It reads or deletes what was made before, and paid for.
            entry.waive()
        generates = request.method == "POST" and _last_word(path) in _GENERATING
        entry.admit(visit.headers, len(body or b""), None if generates else 0)
        visit.is_call = True
        async with state.passing.pass_on(visit.id, target, request.method, path, body, headers, entry) as reply:
            told = downstream_headers(reply.headers)
            down = CIMultiDict(for_team(told) if visit.identity.has_key else told)
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
    state: State, visit: Visit, content_type: str, headers: Mapping[str, str], body: bytes | None
) -> tuple[Entry, Target, bytes | None]:
    """The entry of a call, where it goes, and its body with the model's name as that upstream knows it."""
    routes, identity = state.routes, visit.identity
    if body and (content_type.endswith("json") or body.lstrip()[:1] == b"{"):
        value = parse_object(body)
        if "model" in value:
            name = required_model(value)
            entry = begin(state, visit, headers, name, value.get("user"))
            if not may_ask_any(identity):
                check_model(identity, name)
                body = with_one_model(body, value)
            target = routes.resolve(name).targets[0]
            return entry, target, body if target.model == name else encode({**value, "model": target.model})
    elif body and content_type == "multipart/form-data" and (found := _model_field(headers, body)) is not None:
        start, end = found
        name = body[start:end].decode("utf-8", "replace")
        entry = begin(state, visit, headers, name)
        # Which of several an upstream reads is its own affair, and only one is looked at.
        if identity.has_key and len(_MODEL_NAMES.findall(body)) > 1:
            raise ClientError(400, "several_models", "Only one field may name a model.", param="model")
        check_model(identity, name)
        target = routes.resolve(name).targets[0]
        if target.model != name:
            body = body[:start] + target.model.encode() + body[end:]
        return entry, target, body
    if identity.has_key:
        raise _nameless()
    return begin(state, visit, headers, ""), Target(routes.default_upstream(), "-"), body


def _model_field(headers: Mapping[str, str], body: bytes) -> tuple[int, int] | None:
    """Where in a form (RFC 7578) the model's name begins and ends. Takes a time in proportion to the form, whatever it holds."""
    boundary = re.search(r'[;\s]boundary="?([^";,\s]+)', headers.get("Content-Type", ""))
    if boundary is None:
        return None
    delimiter = b"\r\n--" + boundary.group(1).encode("utf-8", "surrogateescape")
    end = 0 if body.startswith(delimiter[2:]) else body.find(delimiter)
    for _ in range(_MAX_FIELDS):
        start, end = end, body.find(delimiter, end + 1)
        if start < 0 or end < 0:
            return None
        head_end = body.find(b"\r\n\r\n", start, min(end, start + _MAX_PART_HEAD_BYTES))
        if (
            head_end > 0
            and _MODEL_NAME.search(body, start, head_end + 2)
            and not _LINE_END.search(body, head_end + 4, end)
        ):
            return head_end + 4, end
    return None


def _nameless() -> ClientError:
    words = "With a virtual key only POST requests that name a model, and no files or the like, are passed on."
    return ClientError(403, "model_required", words, param="model")


def _last_word(path: str) -> str:
    return path.partition("?")[0].rstrip("/").rpartition("/")[2]


def _words(path: str) -> list[str]:
    """What stands between the slashes, as an upstream sees it that takes `//` and `/./` out of a path (RFC 3986 §5.2.4)."""
    return [word for word in path.lower().split("/") if word not in ("", ".")]
