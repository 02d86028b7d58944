"""What a client asks for: its body as a ChatRequest, checked but not interpreted, and its headers as Wishes.

Only what the proxy itself must understand is looked at; everything else passes unread, unknown members included, and
nothing in a body is given a default.
"""

from __future__ import annotations

from typing import Any

from multidict import MultiMapping

from proxy.chat import CACHE_TIERS, NO_CACHE_WISH, CacheWish, ChatRequest, Parsed, Wishes
from proxy.errors import ClientError
from proxy.wire.encoding import dumps, loads

MAX_CHOICES = 128

_COALESCE = "x-headwater-coalesce"
_DELIVERY = "x-headwater-delivery"
_CACHE = "x-headwater-cache"
_NAMESPACE = "x-headwater-namespace"
_NO_WISHES = Wishes()
_MAX_NAMESPACE = 128
_MAX_DIGITS = 15


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request's body. ClientError 400 otherwise."""
    try:
        body = loads(raw)
    except ValueError as error:
        raise ClientError(400, "invalid_json", f"The body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ClientError(400, "invalid_type", "The body must be a JSON object.")
    return body


def parse_chat_request(raw: bytes) -> ChatRequest:
    """The request in a chat completion's body. ClientError 400 names the member that is wrong in `param`."""
    return chat_request(raw, parse_object(raw))


def chat_request(raw: bytes, body: dict[str, Any]) -> ChatRequest:
    """The same, of a body that was parsed already: `body` is what `raw` says."""
    model = required_model(body)
    messages = body.get("messages")
    if messages is None:
        raise _wrong("messages", "is required", "missing_required_parameter")
    if not isinstance(messages, list):
        raise _wrong("messages", "must be an array")
    if not messages:
        raise _wrong("messages", "must not be empty", "empty_array")
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _wrong(f"messages[{position}]", "must be an object")
        if not isinstance(message.get("role"), str):
            raise _wrong(f"messages[{position}].role", "must be a string")
        if not isinstance(message.get("content"), str | list | None):
            raise _wrong(f"messages[{position}].content", "must be a string, an array of parts, or null")
    stream = body.get("stream")
    if not isinstance(stream, bool | None):
        raise _wrong("stream", "must be true, false or null")
    options = body.get("stream_options")
    if not isinstance(options, dict | None):
        raise _wrong("stream_options", "must be an object or null")
    choices = body.get("n")
    if choices is None:
        choices = 1
    if type(choices) is not int:
        raise _wrong("n", "must be an integer")
    if not 1 <= choices <= MAX_CHOICES:
        raise _wrong("n", f"must be between 1 and {MAX_CHOICES}", "invalid_value")
    return ChatRequest(
        raw=raw,
        parsed=Parsed(raw, body, loads),
        model=model,
        wants_stream=bool(stream),
        wants_usage=bool(options and options.get("include_usage")),
        wants_running_usage=bool(options and options.get("continuous_usage_stats")),
        choices=choices,
    )


def parse_wishes(headers: MultiMapping[str]) -> Wishes:
    """What the `x-headwater-…` headers ask for: `coalesce: yes | no`, `delivery: whole | stream`,
    `cache: semantic | exact | off`, in any case, and `namespace`; and what `Cache-Control` says to a cache.

    `headers` finds names in any case. ClientError 400 names the header in `param` when one of ours says something else.
    """
    coalesce, delivery = headers.get(_COALESCE), headers.get(_DELIVERY)
    cache = _cache_wish(headers)
    if coalesce is None and delivery is None and cache is NO_CACHE_WISH:
        return _NO_WISHES
    return Wishes(
        coalesces=coalesce is None or _choice(_COALESCE, coalesce, "yes", "no"),
        delivers_whole=None if delivery is None else _choice(_DELIVERY, delivery, "whole", "stream"),
        cache=cache,
    )


def _cache_wish(headers: MultiMapping[str]) -> CacheWish:
    tier, namespace = headers.get(_CACHE), headers.get(_NAMESPACE)
    if tier is None and namespace is None and "Cache-Control" not in headers:
        return NO_CACHE_WISH
    if tier is not None and (tier := tier.strip().lower()) not in CACHE_TIERS:
        raise _wrong(_CACHE, "must be 'semantic', 'exact' or 'off'", "invalid_value")
    if namespace is not None and not (len(namespace) <= _MAX_NAMESPACE and namespace.isprintable()):
        raise _wrong(_NAMESPACE, f"must be a name of at most {_MAX_NAMESPACE} printable characters", "invalid_value")
    # Several lines of it are one list (RFC 9110 §5.3).
    directives = _directives(",".join(headers.getall("Cache-Control", [])))
    return CacheWish(
        looks_up="no-cache" not in directives,
        keeps="no-store" not in directives,
        max_age_s=_delta_seconds(directives["max-age"]) if "max-age" in directives else None,
        only_if_cached="only-if-cached" in directives,
        tier=next((known for known in CACHE_TIERS if known == tier), None),
        namespace=namespace or "",
    )


def _directives(control: str) -> dict[str, str]:
    """The directives of a `Cache-Control` (RFC 9111 §5.2), each with its argument; those that nobody knows are passed over."""
    found: dict[str, str] = {}
    for part in control.split(","):
        name, _, argument = part.partition("=")
        found.setdefault(name.strip().lower(), argument.strip().strip('"'))
    return found


def _delta_seconds(text: str) -> float:
    """A number of seconds (RFC 9111 §1.2.2). Where it is none, the stored answer counts as stale (§4.2.1): 0."""
    return float(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else 0.0


def _choice(header: str, value: str, this: str, that: str) -> bool:
    """Whether a header says `this`, and not `that`."""
    word = value.strip().lower()
    if word not in (this, that):
        raise _wrong(header, f"must be '{this}' or '{that}'", "invalid_value")
    return word == this


def required_model(body: dict[str, Any]) -> str:
    """The `model` member of a body. ClientError 400 when it is missing or not a name."""
    model = body.get("model")
    if model is None:
        raise _wrong("model", "is required", "missing_required_parameter")
    if not isinstance(model, str):
        raise _wrong("model", "must be a string")
    if not model.strip():
        raise _wrong("model", "must not be empty", "invalid_value")
    return model


def with_one_model(raw: bytes, body: dict[str, Any]) -> bytes:
    """The JSON of a body, in which every reader finds the model that was read here: for callers who may not ask for any.

    `raw` itself, where that is so. Of members with the same name some readers take the first, and Go's take a name in any case
    (https://pkg.go.dev/encoding/json#Unmarshal). ClientError 400 for the latter, and for what is nested too deeply to be written.
    """
    for name in body:
        if name != "model" and name.lower() == "model":
            raise _wrong(name, "names a model too", "several_models")
    # A letter of a name may be written as an escape (RFC 8259 §7).
    if raw.count(b'"model"') == 1 and b"\\u00" not in raw:
        return raw
    try:
        return dumps(body)
    except ValueError:
        raise ClientError(400, "invalid_json", "The body is nested too deeply.") from None


def _wrong(param: str, what: str, code: str = "invalid_type") -> ClientError:
    return ClientError(400, code, f"'{param}' {what}.", param=param)
