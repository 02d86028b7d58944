"""OpenAI's dialect: bodies for the upstream, and what its refusals and errors mean.

Rules of the room: bytes and values in, bytes and values out. Wording that upstreams use is matched here and nowhere
else, with the thread it was seen in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import Any, Literal

from proxy.chat import Ask, ChatRequest
from proxy.errors import ClientError, Trouble, UpstreamError
from proxy.wire.encoding import dumps, loads

CHAT_PATH = "/chat/completions"

_SHOWN_CHARACTERS = 300


_USAGE_MEMBER = b'{"stream_options":{"include_usage":true},'


Prefill = Literal["auto", "prefix", "continue_final_message", "never"]


def chat_body(request: ChatRequest, model: str, ask: Ask, prefill: Prefill = "auto") -> bytes:
    """The body for the upstream: the very bytes that came in, where nothing has to change.

    `prefill` is how the upstream wants to be told to go on from `ask.partial`. ClientError 400 when the body must be
    written anew and is nested deeper than can be written.
    """
    if ask.partial:
        return encode(_continued(_changed(request, model, ask), ask, prefill))
    is_renamed = model != request.model
    adds_usage = ask.stream and ask.usage and not request.wants_usage
    if not is_renamed and not adds_usage and ask.stream == request.wants_stream and ask.usage == request.wants_usage:
        return request.raw
    body = request.body
    if adds_usage and not is_renamed and "stream_options" not in body:
        # The one change that most streams need. A valid object with a model has a brace first, and a member behind it.
        return request.raw.replace(b"{", _USAGE_MEMBER, 1)
    changed = _changed(request, model, ask)
    return request.raw if changed is body else encode(changed)


def _changed(request: ChatRequest, model: str, ask: Ask) -> dict[str, Any]:
    """The request's members as the upstream is to get them; the very object where none changes."""
    body = request.body
    changes: dict[str, Any] = {}
    dropped: set[str] = set()
    if model != request.model:
        changes["model"] = model
    if not ask.stream:
        # An upstream that refuses streaming may refuse the very word: it is left out, not set to false.
        if request.wants_stream:
            dropped |= {"stream", "stream_options"}
    elif ask.usage and not request.wants_usage:
        changes["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    elif not ask.usage and "stream_options" in body:
        dropped.add("stream_options")
    if not changes and not dropped & body.keys():
        return body
    return {name: value for name, value in body.items() if name not in dropped} | changes


def _continued(body: dict[str, Any], ask: Ask, prefill: Prefill) -> dict[str, Any]:
    """The body with the beginning of its answer as a last message, and room left for the rest only."""
    message: dict[str, Any] = {"role": "assistant", "content": ask.partial}
    changes: dict[str, Any] = {}
    match prefill:
        case "prefix":
            message["prefix"] = True
        case "continue_final_message":
            changes |= {"continue_final_message": True, "add_generation_prompt": False}
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(limit := body.get(name), int):
            changes[name] = max(1, limit - ask.partial_tokens)
    return {**body, **changes, "messages": [*body["messages"], message]}


def encode(body: dict[str, Any]) -> bytes:
    """A body as JSON. ClientError 400 when it is nested too deeply."""
    try:
        return dumps(body)
    except ValueError as error:
        raise ClientError(400, "invalid_json", f"The body cannot be passed on: {error}") from None


class Refusal(Enum):
    """A 4xx that says nothing against the request, only against how it was put."""

    STREAM = auto()
    STREAM_OPTIONS = auto()


_REFUSING = frozenset((400, 403, 404, 405, 415, 422, 501))

# "… must be verified to stream this model" (https://github.com/RooCodeInc/Roo-Code/issues/6868, and nested inside
# OpenRouter's 400: https://github.com/BeehiveInnovations/pal-mcp-server/issues/134); "streaming is not supported",
# "does not support streaming", "stream is not allowed", "unsupported value: 'stream'".
_NO_STREAM = re.compile(
    r"verified to stream"
    r"|(?<!octet-)\bstream(?:ing|ed)?\b[^.]{0,60}(?:\bnot|n't|\bun)[ -]?(?:yet |currently )?"
    r"(?:supported|allowed|available|enabled|permitted)"
    r"|(?:\bnot|n't) (?:yet |currently )?(?:support|allow|permit)\w*[^.]{0,40}\bstream"
    r"|\bunsupported[^.]{0,40}(?<!octet-)\bstream"
    r"|\bstream[^.]{0,20}\b(?:must be|should be|has to be) (?:false|disabled)"
    r"|\bstream(?:ing)? (?:is )?(?:disabled|unsupported|unavailable)",
    re.IGNORECASE,
)
# https://github.com/QuantumNous/new-api/issues/418, https://github.com/BerriAI/litellm/issues/23847
_NO_STREAM_OPTIONS = re.compile(r"stream_options|include_usage", re.IGNORECASE)


def refusal(error: UpstreamError) -> Refusal | None:
    """What of our asking the upstream refuses, if that is what its error says."""
    if error.status not in _REFUSING:
        return None
    if isinstance(error.code, str) and error.code.startswith(("content_", "context_")):
        return None
    # OpenRouter nests the provider's own words in `metadata.raw`; what else stands there may be the user's text.
    extra = {name: part for name, part in error.extra.items() if name != "metadata"}
    if isinstance(metadata := error.extra.get("metadata"), dict):
        extra["raw"] = metadata.get("raw")
    words = f"{error.message} {error.param or ''} {dumps(extra).decode() if extra else ''}"
    if _NO_STREAM_OPTIONS.search(words):
        return Refusal.STREAM_OPTIONS
    if error.param == "stream" or _NO_STREAM.search(words):
        return Refusal.STREAM
    return None


def error_from_response(
    status: int, headers: Mapping[str, str], body: bytes, secrets: tuple[str, ...]
) -> UpstreamError:
    """The error in an upstream's 3xx, 4xx or 5xx answer: its own words where they have OpenAI's shape, ours otherwise."""
    retry_after = headers.get("Retry-After")
    if not 400 <= status <= 599:
        return UpstreamError(502, "bad_upstream_answer", f"The upstream answered with the unexpected status {status}.")
    parsed = _parse(body)
    error = _error_object(parsed)
    if error is None:
        # Before anything is cut off: half a key is still too much.
        words = _plain_words(scrub(body.decode("utf-8", "replace"), secrets), headers.get("Content-Type", ""))
        said = f": {words}" if words else "."
        return UpstreamError(
            status, f"upstream_{status}", f"The upstream answered {status}{said}", retry_after=retry_after
        )
    return _from_object(status, error, secrets, retry_after)


def error_in_success(value: dict[str, Any], secrets: tuple[str, ...]) -> UpstreamError | None:
    """The error that a body with status 200, or an event of a stream, holds; None when it holds none.

    Its status is the one it names, or the one that its type or code stands for, or 502.
    """
    if not value.get("error") and value.get("object") != "error" and "choices" in value:
        return None
    error = _error_object(value)
    if error is None:
        return None
    return _from_object(_implied_status(error), error, secrets, None)


def scrub(text: str, secrets: tuple[str, ...]) -> str:
    """The text without our credentials, which some upstreams quote in their errors."""
    for secret in secrets:
        if len(secret) >= 4:
            text = text.replace(secret, "[redacted]")
    return text


def _parse(body: bytes) -> Any:
    try:
        return loads(body)
    except ValueError:
        return None


def _error_object(value: Any) -> dict[str, Any] | None:
    """The error object in the shapes that upstreams use; None when there is none."""
    match value:
        case [first, *_]:  # Gemini wraps its error in a list
            return _error_object(first)
        case {"error": dict(error)} if error:
            return error
        case {"error": str(message)} if message:
            return {"message": message, **{name: value[name] for name in ("code", "type") if name in value}}
        case {"object": "error", "message": str()} | {"message": str(), "type": str()}:  # vLLM
            return {name: part for name, part in value.items() if name != "object"}
        case {"message": str(message)} | {"detail": str(message)}:
            return {"message": message}
        case {"detail": list(details)}:  # FastAPI's validation errors
            return {"message": "; ".join(_detail(detail) for detail in details)}
    return None


def _detail(detail: Any) -> str:
    if not isinstance(detail, dict):
        return str(detail)
    place = ".".join(str(part) for part in detail.get("loc", ()) if part != "body")
    return f"{place}: {detail.get('msg', '')}".strip(": ")


def _from_object(
    status: int, error: dict[str, Any], secrets: tuple[str, ...], retry_after: str | None
) -> UpstreamError:
    text = dumps(error).decode()
    if any(secret in text for secret in secrets):
        error = loads(scrub(text, secrets).encode())
    message = error.get("message")
    if not isinstance(message, str) or not message:
        message = dumps(message).decode() if message else f"The upstream answered {status} without a message."
    code, kind, param = error.get("code"), error.get("type"), error.get("param")
    extra = {name: value for name, value in error.items() if name not in ("message", "type", "param", "code")}
    return UpstreamError(
        status,
        code if isinstance(code, str | int) else None,
        message,
        kind=kind if isinstance(kind, str) and kind else None,
        param=param if isinstance(param, str) else None,
        retry_after=retry_after,
        extra=extra,
        trouble=_trouble(status, error),
    )


# What codes and types stand for, whatever the status that came with them. The first that fits counts.
_CODES = (
    # OpenAI's; Azure's, nested in `innererror`: https://github.com/compl-ai/compl-ai/issues/20; Xiaomi's:
    # https://github.com/XiaomiMiMo/MiMo-V2-Flash/issues/18; OpenAI's for images: https://github.com/GooeyAI/gooey-server/pull/1091
    (
        Trouble.POLICY,
        re.compile("(?i)content_filter|content_policy|responsibleaipolicy|moderation_blocked|data_?inspection_?failed"),
    ),
    # llama.cpp sends its own with 400, and at first did with 500: https://github.com/ggml-org/llama.cpp/pull/15780
    (Trouble.CONTEXT, re.compile("(?i)context_length_exceeded|exceed_context_size")),
    # As `type` alone, too: https://github.com/ChatGPTNextWeb/NextChat/issues/1792
    (
        Trouble.CREDENTIAL,
        re.compile("(?i)insufficient_(?:quota|balance|credits)|billing_|account_deactivated|invalid_api_key"),
    ),
    (Trouble.MISSING, re.compile("(?i)model_not_found")),
    # Groq's 413 for more tokens than it allows a minute: https://github.com/HunorLaczko/ha-groq-cloud-api/issues/27
    (Trouble.LIMITED, re.compile("(?i)rate_limit")),
    (Trouble.OVERLOADED, re.compile("(?i)overloaded")),
)

# What messages say where no code does, and with which statuses that is believed. "Exceeded your current quota" is not among
# them: Gemini says so of its limits per minute too (https://github.com/google-gemini/gemini-cli/issues/8437).
_WORDS = (
    # https://github.com/openai/openai-python/issues/331, https://github.com/RanFeng/clipsketch-ai/issues/6,
    # https://github.com/Wei-Shaw/sub2api/issues/7093, https://openrouter.ai/docs/api/reference/errors-and-debugging,
    # https://github.com/deepseek-ai/DeepSeek-V2/issues/30
    (
        Trouble.POLICY,
        frozenset((400, 403, 422, 451)),
        re.compile(
            r"(?i)content management policy|a result of our safety system|blocked by (?:our|the) safety system"
            r"|\b(?:prompt|input|request|message|content)s? (?:was|were|has been|have been) flagged\b"
            r"|^content exists risk",
        ),
    ),
    # In this order vLLM and OpenRouter (https://github.com/topoteretes/cognee/issues/1061), vLLM since 0.16
    # (https://github.com/harbor-framework/harbor/pull/996), LM Studio (https://github.com/lmstudio-ai/lmstudio-bug-tracker/issues/546),
    # SGLang (https://github.com/BerriAI/litellm/issues/10793), llama.cpp, Anthropic and Bedrock
    # (https://github.com/anymorph-ai/Claudable/issues/3, https://github.com/earendil-works/pi/issues/102,
    # https://github.com/BerriAI/litellm/pull/21647), Gemini (https://github.com/google-gemini/gemini-cli/issues/6678),
    # Azure (https://github.com/BerriAI/litellm/issues/15968), text-generation-inference.
    (
        Trouble.CONTEXT,
        frozenset((400, 413, 422)),
        re.compile(
            r"(?i)\bmaximum context (?:length|limit)\b"
            r"|\bcontext length (?:is|of) only \d"
            r"|\blonger than the model's context length\b"
            r"|\bexceeds? (?:the )?(?:available context size|context (?:limit|window))\b"
            r"|\bprompt is too long: \d|\binput is too long for\b"
            r"|\binput token count [^.]{0,20}exceeds the maximum\b"
            r"|\binput tokens exceed the configured limit\b"
            r"|`inputs` tokens \+ `max_new_tokens` must be\b",
        ),
    ),
    # Anthropic's 400 (https://github.com/anthropics/claude-quickstarts/issues/83), and Gemini's
    # (https://github.com/cequence-io/openai-scala-client/issues/109).
    (Trouble.CREDENTIAL, frozenset((400,)), re.compile(r"(?i)\bcredit balance is too low\b|\bAPI key not valid\b")),
)

# What stands in quotes may be the user's own words; an apostrophe inside a word opens none.
_QUOTED = re.compile('"[^"]*(?:"|$)|“[^”]*(?:”|$)|(?<!\\w)\'.*?(?:\'(?!\\w)|$)', re.DOTALL)

# What an upstream has to say it says at the beginning; behind it may stand the whole request.
_TELLING_CHARACTERS = 400


def _trouble(status: int, error: dict[str, Any]) -> Trouble | None:
    """What the error's codes say it is or, where they say nothing, its words; None where only the status tells."""
    nested = list(_nested(error))
    for trouble, pattern in _CODES:
        if any(pattern.search(str(part.get(name))) for part in nested for name in ("code", "type", "status")):
            return trouble
    # OpenRouter's 403 for what its moderation flagged, and not for a bad key.
    if any(isinstance(data := part.get("metadata"), dict) and "flagged_input" in data for part in nested):
        return Trouble.POLICY
    messages = [part["message"] for part in nested if isinstance(part.get("message"), str)]
    said = [_QUOTED.sub("", message[:_TELLING_CHARACTERS]) for message in messages]
    for trouble, statuses, pattern in _WORDS:
        if status in statuses and any(pattern.search(words) for words in said):
            return trouble
    return None


def _nested(error: dict[str, Any], depth: int = 3) -> Iterator[dict[str, Any]]:
    """An error object, and those it holds: gateways put the provider's own into theirs, as an object or as text."""
    yield error
    if not depth:
        return
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None  # OpenRouter
    parts = [error.get("innererror"), error.get("provider_specific_fields"), error.get("error")]
    parts += [_embedded(text) for text in (error.get("message"), raw) if isinstance(text, str)]
    parts.append({"message": raw} if isinstance(raw, str) else raw)
    for part in parts:
        if isinstance(part, dict):
            yield from _nested(part, depth - 1)


def _embedded(text: str) -> dict[str, Any] | None:
    """The error object that stands in the text as JSON, in its envelope; None when there is none."""
    value = _parse(text[text.find("{") : text.rfind("}") + 1].encode())
    match value:
        case {"error": _} | {"object": "error"}:
            return _error_object(value)
    return None


_STATUS_OF_WORD = {
    "rate_limit": 429,
    "too_many": 429,
    "insufficient_quota": 429,
    "resource_exhausted": 429,
    "authentication": 401,
    "invalid_api_key": 401,
    "unauthenticated": 401,
    "unauthorized": 401,
    "permission": 403,
    "forbidden": 403,
    "not_found": 404,
    "context_length": 400,
    "exceed_context": 400,
    "content_filter": 400,
    "content_policy": 400,
    "responsibleaipolicy": 400,
    "moderation_blocked": 400,
    "invalid_request": 400,
    "invalid_argument": 400,
    "bad_request": 400,
    "overloaded": 503,
    "unavailable": 503,
    "timeout": 504,
}


def _implied_status(error: dict[str, Any]) -> int:
    for name in ("code", "status", "status_code"):
        value = error.get(name)
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        if isinstance(value, int) and 400 <= value <= 599:
            return value
    words = f"{error.get('code') or ''} {error.get('type') or ''} {error.get('status') or ''}".lower()
    return next((status for word, status in _STATUS_OF_WORD.items() if word in words), 502)


def _plain_words(body: str, content_type: str) -> str:
    """What a body that is no JSON says to a person: the title of an HTML page, or the start of a text."""
    text = body[: 64 * 1024].strip()
    if "html" in content_type or text[:15].lower().startswith(("<!doctype", "<html")):
        title = re.search(r"<title[^<>]*>([^<]*)</title>", text, re.IGNORECASE)
        said = " ".join(title.group(1).split())[:_SHOWN_CHARACTERS] if title else ""
        return f"an HTML page, “{said}”" if said else "an HTML page"
    return " ".join(text.split())[:_SHOWN_CHARACTERS]
