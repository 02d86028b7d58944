"""What teams may say of jobs and their calls: the members of each body, and what of a call's body goes to an upstream.

A member of ours that is null is as good as left out. All others of a call's body are OpenAI's, and are not looked at here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Required, TypeVar, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from proxy.chat import ChatRequest
from proxy.dialects.openai import encode
from proxy.errors import ClientError
from proxy.server.accountforms import filled
from proxy.store.jobs import MAX_METADATA_BYTES
from proxy.wire.encoding import dumps
from proxy.wire.requests import chat_request, parse_object

# What is shown is nested a little deeper than what was said, and has to be written too.
_AROUND = 8


def _showable(metadata: dict[str, Any]) -> dict[str, Any]:
    nested: Any = metadata
    for _ in range(_AROUND):
        nested = [nested]
    try:
        written = dumps(nested)
    except ValueError:
        raise PydanticCustomError("too_deep", "Must not be nested so deeply") from None
    if len(written) > MAX_METADATA_BYTES:
        raise PydanticCustomError("too_large", f"Must be at most {MAX_METADATA_BYTES} bytes of JSON")
    return metadata


_Word = Annotated[str, Field(max_length=256)]
_Metadata = Annotated[dict[str, Any], AfterValidator(_showable)]

_STRICT = ConfigDict(extra="forbid", strict=True)


@with_config(_STRICT)
class JobForm(TypedDict, total=False):
    job_type: Required[Annotated[str, Field(min_length=1, max_length=256)]]
    team_id: str | None
    user_id: _Word | None
    metadata: _Metadata | None


@with_config(_STRICT)
class MetadataForm(TypedDict):
    metadata: _Metadata


@with_config(_STRICT)
class EndForm(TypedDict, total=False):
    status: Required[Literal["completed", "failed", "cancelled"]]
    metadata: _Metadata | None
    error_message: Annotated[str, Field(max_length=4096)] | None


@with_config(_STRICT)
class CallForm(TypedDict, total=False):
    """What is ours in the body of a call."""

    model_group: str | None
    purpose: str | None
    team_id: str | None
    user_id: str | None


@with_config(_STRICT)
class OneShotForm(CallForm, total=False):
    """What is ours in the body of a call that is a job."""

    job_type: _Word | None
    metadata: _Metadata | None


_OURS: Mapping[type[Any], frozenset[str]] = {form: frozenset(get_type_hints(form)) for form in (CallForm, OneShotForm)}

F = TypeVar("F", CallForm, OneShotForm)


def parse_call(raw: bytes, form: type[F], *, stream: bool) -> tuple[F, ChatRequest]:
    """What is ours in a call's body, and the chat request that the rest is: for a stream, or for one body.

    ClientError 400 names the member that is wrong in `param`.
    """
    body = parse_object(raw)
    ours = _OURS[form]
    given = filled(form, {name: value for name, value in body.items() if name in ours})
    rest = {name: value for name, value in body.items() if name not in ours}
    if (group := given.get("model_group")) is not None:
        if rest.get("model") not in (None, group):
            words = "'model' and 'model_group' are two names for the same, and must not differ."
            raise ClientError(400, "invalid_value", words, param="model_group")
        rest["model"] = group
    if stream:
        rest["stream"] = True
    else:
        # OpenAI refuses the options of a stream where none is asked for.
        rest.pop("stream", None)
        rest.pop("stream_options", None)
    is_changed = rest.keys() != body.keys() or (stream and body["stream"] is not True)
    return given, chat_request(encode(rest) if is_changed else raw, rest)
