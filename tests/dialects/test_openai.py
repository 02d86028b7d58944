"""Bodies for the upstream, and what its refusals and errors mean."""

from __future__ import annotations

import json
from typing import Any

import pytest
from multidict import CIMultiDict

from proxy.chat import Ask
from proxy.dialects.openai import Refusal, chat_body, error_from_response, error_in_success, refusal, scrub
from proxy.errors import ClientError, Trouble, UpstreamError
from proxy.wire.requests import parse_chat_request

SECRET = "sk-very-secret-0123456789"
STREAM = Ask(stream=True, usage=True, may_fall_back=True)
WHOLE = Ask(stream=False, usage=False, may_fall_back=False)
OPTIONS = {"include_usage": True}


def body(**members: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **members}, indent=1).encode()


@pytest.mark.parametrize(
    ("members", "ask"),
    [
        ({}, WHOLE),
        ({"stream": False, "temperature": 0}, WHOLE),
        ({"stream": True, "stream_options": OPTIONS}, STREAM),
        ({"stream": True}, STREAM.without_usage()),
        ({"stream": None, "new": {"a": [None]}}, WHOLE),
    ],
)
def test_a_request_in_which_nothing_changes_is_forwarded_byte_for_byte(members: dict[str, Any], ask: Ask) -> None:
    raw = body(**members)
    assert chat_body(parse_chat_request(raw), "m", ask) is raw


@pytest.mark.parametrize(
    ("members", "model", "ask", "expected"),
    [
        ({}, "other", WHOLE, {"model": "other"}),
        ({"stream": True}, "m", STREAM, {"stream_options": OPTIONS}),
        ({"stream": True}, "other", STREAM.without_usage(), {"model": "other"}),
        (
            {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False}},
            "m",
            STREAM,
            {"stream_options": {"include_usage": True, "include_obfuscation": False}},
        ),
        ({"stream": True, "stream_options": None}, "m", STREAM, {"stream_options": OPTIONS}),
        ({"stream": True, "stream_options": OPTIONS}, "m", STREAM.without_usage(), {"stream_options": ...}),
        ({"stream": True, "stream_options": OPTIONS}, "m", WHOLE, {"stream": ..., "stream_options": ...}),
        ({"stream": True}, "m", WHOLE, {"stream": ...}),
    ],
)
def test_only_what_must_change_changes(members: dict[str, Any], model: str, ask: Ask, expected: dict[str, Any]) -> None:
    """A zero, a null and a member that nobody knows are passed on; an upstream that refuses streaming gets no `stream`."""
    members = {**members, "temperature": 0, "stop": None, "new": {"a": [1.50, "\u2028"]}}
    request = parse_chat_request(body(**members))
    changed = {**request.body, **expected}
    assert json.loads(chat_body(request, model, ask)) == {name: v for name, v in changed.items() if v is not ...}
    assert request.body == json.loads(request.raw)


def test_a_body_too_deep_to_be_written_anew_is_the_clients_error_and_passes_where_it_need_not_be() -> None:
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    request = parse_chat_request(body(new=deep))
    assert chat_body(request, "m", WHOLE) is request.raw
    with pytest.raises(ClientError) as caught:
        chat_body(request, "other", WHOLE)
    assert caught.value.status == 400


# ---------------------------------------------------------------------------------------------- refusals

VERIFY = (
    "Your organization must be verified to stream this model. Please go to: "
    "https://platform.openai.com/settings/organization/general and click on Verify Organization."
)


def answer(status: int, value: Any) -> UpstreamError:
    return error_from_response(status, CIMultiDict(), json.dumps(value).encode(), (SECRET,))


def openai_error(message: str, **members: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **members}}


def openrouter_error(raw: Any, code: int = 400, **metadata: Any) -> dict[str, Any]:
    metadata = {"raw": raw if isinstance(raw, str) else json.dumps(raw), "provider_name": "OpenAI", **metadata}
    return {"error": {"message": "Provider returned error", "code": code, "metadata": metadata}, "user_id": "u"}


NO_STREAM = [
    # https://github.com/RooCodeInc/Roo-Code/issues/6868
    (400, openai_error(VERIFY, param="stream", code="unsupported_value")),
    (400, openai_error(VERIFY)),
    # https://github.com/BeehiveInnovations/pal-mcp-server/issues/134
    (400, openrouter_error(openai_error(VERIFY, param="stream", code="unsupported_value"))),
    (400, openrouter_error(VERIFY)),
    (
        400,
        openai_error(
            "Unsupported value: 'stream' does not support true with this model. Only the default (false) value is supported.",
            param="stream",
            code="unsupported_value",
        ),
    ),
    (400, openai_error("Unsupported value: 'stream' does not support true with this model.")),
    (400, openai_error("This model does not support streaming.")),
    (400, openai_error("Streaming is not supported for this model.")),
    (400, openai_error("stream is not yet supported")),
    (400, openai_error("This model doesn't support streaming responses")),
    (400, openai_error("The model is unsupported for streaming")),
    (501, {"detail": "Streaming not supported"}),
    (400, {"error": "streaming is disabled on this server"}),
    (422, {"detail": [{"loc": ["body", "stream"], "msg": "stream must be false", "type": "value_error"}]}),
    (405, {"message": "Streaming is not allowed for your plan."}),
]
NO_STREAM_OPTIONS = [
    # https://github.com/QuantumNous/new-api/issues/418, https://github.com/BerriAI/litellm/issues/23847
    (400, openai_error("Unknown parameter: 'stream_options'.", param="stream_options", code="unknown_parameter")),
    (400, openai_error("Unrecognized request argument supplied: stream_options")),
    (400, openai_error("Unknown parameter.", param="stream_options")),
    (
        422,
        {
            "detail": [
                {"type": "extra_forbidden", "loc": ["body", "stream_options"], "msg": "Extra inputs are not permitted"}
            ]
        },
    ),
    (
        422,
        {
            "object": "error",
            "message": {
                "detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options"], "msg": "Extra inputs"}]
            },
            "type": "invalid_request_error",
            "code": None,
        },
    ),
    (
        400,
        {
            "object": "error",
            "message": "stream_options: Extra inputs are not permitted",
            "type": "BadRequestError",
            "code": 400,
        },
    ),
    (400, openai_error("property 'include_usage' is unsupported")),
    (400, openrouter_error("Unknown field: stream_options")),
]
ORDINARY = [
    (400, openai_error("Invalid value for 'temperature'.", param="temperature")),
    (
        400,
        openai_error(
            "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
            param="messages",
            code="context_length_exceeded",
        ),
    ),
    (400, openai_error("Unsupported parameter: 'max_tokens' is not supported with this model.", param="max_tokens")),
    (404, openai_error("The model `stream-7b` does not exist or you do not have access to it.", code="model_not_found")),
    # What is refused are bytes of a kind that is called a stream.
    (400, {"error": {"code": 400, "message": "Unsupported MIME type: application/octet-stream", "status": "INVALID_ARGUMENT"}}),
    (415, {"message": "Content-Type 'application/octet-stream' is not supported"}),
    # A policy that speaks of streaming.
    (
        400,
        openai_error(
            "Your prompt asks how to stream pirated matches, which is not permitted by our usage policy.",
            code="content_policy_violation",
        ),
    ),
    # OpenRouter quotes the user's own words: https://openrouter.ai/docs/api-reference/errors
    (
        403,
        openrouter_error(
            "", 403, reasons=["violence"], flagged_input="why is streaming not supported on my TV, and what is stream_options"
        ),
    ),
    # The contrary is asked for.
    (400, openai_error("This model only support stream mode, please enable the stream parameter to access the model.")),
    (400, openai_error("Requests with max_tokens > 4096 must have stream=true")),
    (400, openai_error("Streaming is required for operations that may take longer than 10 minutes.")),
    # Not about the request at all.
    (429, openai_error("Rate limit reached: streaming is not allowed until 12:00.", code="rate_limit_exceeded")),
    (401, openai_error("Incorrect API key: streaming is not permitted.", code="invalid_api_key")),
    (500, openai_error("Streaming is not supported.", param="stream")),
    (503, openai_error("stream_options")),
]  # fmt: skip


@pytest.mark.parametrize(("status", "value"), NO_STREAM)
def test_a_refusal_to_stream_is_recognised_in_whatever_words(status: int, value: Any) -> None:
    assert refusal(answer(status, value)) is Refusal.STREAM


@pytest.mark.parametrize(("status", "value"), NO_STREAM_OPTIONS)
def test_a_refusal_of_stream_options_is_recognised_in_whatever_words(status: int, value: Any) -> None:
    assert refusal(answer(status, value)) is Refusal.STREAM_OPTIONS


@pytest.mark.parametrize(("status", "value"), ORDINARY)
def test_an_ordinary_error_is_no_refusal_to_stream_though_it_may_hold_the_word(status: int, value: Any) -> None:
    """What is taken for a refusal is remembered of the target, for everybody."""
    assert refusal(answer(status, value)) is None


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("status", "value", "message", "kind", "param", "code"),
    [
        (400, openai_error("no", param="p", code="c"), "no", "invalid_request_error", "p", "c"),
        (429, {"error": {"message": "slow", "code": 429}}, "slow", "upstream_error", None, 429),
        (400, {"error": "no", "code": 7}, "no", "upstream_error", None, 7),
        (400, {"message": "no", "type": "bad", "code": "x"}, "no", "bad", None, "x"),
        (400, {"object": "error", "message": "no", "type": "Bad", "param": None, "code": 400}, "no", "Bad", None, 400),
        (400, {"message": "no"}, "no", "upstream_error", None, None),
        (404, {"detail": "Not Found"}, "Not Found", "upstream_error", None, None),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "bad"}, {"msg": "bad"}]}, "n: bad; bad", "upstream_error", None, None),
        (422, {"detail": ["a", "b"]}, "a; b", "upstream_error", None, None),
        (400, [{"error": {"code": 400, "message": "no", "status": "INVALID"}}], "no", "upstream_error", None, 400),
        (500, {"error": {"message": ""}}, "The upstream answered 500 without a message.", "upstream_error", None, None),
        (500, {"error": {"message": {"a": 1}}}, '{"a":1}', "upstream_error", None, None),
        (500, {"error": {"message": "m", "code": 1.5, "type": 3, "param": 4}}, "m", "upstream_error", None, None),
        (500, {"error": {}}, 'The upstream answered 500: {"error": {}}', "upstream_error", None, "upstream_500"),
        (500, [], "The upstream answered 500: []", "upstream_error", None, "upstream_500"),
        (500, "oops", 'The upstream answered 500: "oops"', "upstream_error", None, "upstream_500"),
    ],
)  # fmt: skip
def test_an_error_is_told_in_the_upstreams_own_words(
    status: int, value: Any, message: str, kind: str, param: str | None, code: Any
) -> None:
    error = answer(status, value)
    assert (error.status, error.message, error.kind, error.param, error.code) == (status, message, kind, param, code)
    assert error.envelope()["error"].keys() >= {"message", "type", "param", "code"}
    json.dumps(error.envelope())


@pytest.mark.parametrize(
    ("data", "content_type", "message"),
    [
        (b"", "text/plain", "The upstream answered 502."),
        (b"Bad\n  gateway", "text/plain", "The upstream answered 502: Bad gateway"),
        (b"<html><title>502\n Bad Gateway</title>", "text/html", "The upstream answered 502: an HTML page, “502 Bad Gateway”"),
        (b"<!DOCTYPE html><h1>Sign in</h1>", "", "The upstream answered 502: an HTML page"),
        (b"<TITLE lang=x></TITLE>", "text/html", "The upstream answered 502: an HTML page"),
        (b"\xff\xfe", "", "The upstream answered 502: \ufffd\ufffd"),
        (b"x" * 5000, "", "The upstream answered 502: " + "x" * 300),
        (b'{"error": {"message": "cut o', "application/json", 'The upstream answered 502: {"error": {"message": "cut o'),
    ],
)  # fmt: skip
def test_what_is_no_json_is_told_in_brief_and_keeps_its_status(data: bytes, content_type: str, message: str) -> None:
    """A login page stays an error: https://github.com/inference-gateway/inference-gateway/issues/578."""
    error = error_from_response(502, CIMultiDict({"content-type": content_type, "retry-after": "3"}), data, ())
    assert (error.status, error.code, error.message, error.retry_after) == (502, "upstream_502", message, "3")


@pytest.mark.parametrize("status", [301, 302, 307, 399, 600, 100])
def test_a_status_that_is_no_error_is_a_bad_answer(status: int) -> None:
    error = error_from_response(status, CIMultiDict({"Location": "http://elsewhere"}), b"", ())
    assert (error.status, error.code) == (502, "bad_upstream_answer")


def test_an_error_keeps_what_its_upstream_added_and_when_to_come_again() -> None:
    value = openai_error("no", metadata={"a": [1]}, innererror={"code": "x"})
    error = error_from_response(429, CIMultiDict({"retry-after": "20"}), json.dumps(value).encode(), ())
    assert error.retry_after == "20"
    assert error.envelope() == value


# ---------------------------------------------------------------------------------------------- what kind of trouble

AZURE = (
    "The response was filtered due to the prompt triggering Azure OpenAI's content management policy. Please modify your "
    "prompt and retry."
)
VLLM = "This model's maximum context length is 131072 tokens. However, you requested 156632 tokens."
FLAGGED = "Invalid prompt: your prompt was flagged as potentially violating our usage policy."
QUOTA = "You exceeded your current quota, please check your plan and billing details."
TOO_LARGE = "Request too large for model `m` on tokens per minute (TPM): Limit 6000, Requested 12328"
GEMINI = "The input token count (1200293) exceeds the maximum number of tokens allowed (1048576)."


def vllm_error(message: str) -> dict[str, Any]:
    return {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400}


def anthropic_error(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}


def google_error(code: int, message: str, status: str) -> list[dict[str, Any]]:
    return [{"error": {"code": code, "message": message, "status": status}}]


TROUBLES: dict[Trouble, list[tuple[int, Any]]] = {
    Trouble.CONTEXT: [
        (400, openai_error("Too long.", param="messages", code="context_length_exceeded")),
        (400, vllm_error(VLLM)),
        (400, vllm_error("You passed 1015 input tokens. However, the model's context length is only 1024 tokens.")),
        (400, {"error": {"message": "This endpoint's maximum context length is 16384 tokens.", "code": 400}}),
        (400, openrouter_error(vllm_error(VLLM))),
        (400, openrouter_error(openai_error("Too long.", code="context_length_exceeded"))),
        (400, openrouter_error(VLLM)),
        (400, {"error": {"code": 400, "message": "too big", "type": "exceed_context_size_error", "n_ctx": 8192}}),
        (500, {"error": {"code": 500, "message": "too big", "type": "exceed_context_size_error", "n_ctx": 8192}}),
        (400, {"error": "the request exceeds the available context size, try increasing it"}),
        (400, anthropic_error("prompt is too long: 219898 tokens > 200000 maximum")),
        (400, anthropic_error("input length and `max_tokens` exceed context limit: 198981 + 21333 > 200000")),
        (400, google_error(400, GEMINI, "INVALID_ARGUMENT")),
        (400, openai_error(json.dumps(google_error(400, GEMINI, "INVALID_ARGUMENT")[0], indent=2))),
        (400, openai_error("OpenrouterException - " + json.dumps(openai_error(VLLM)))),
        (400, openai_error("Input tokens exceed the configured limit of 272000 tokens.")),
        (400, openai_error("Your input exceeds the context window of this model.")),
        (400, {"message": "The input (9000 tokens) is longer than the model's context length (8192 tokens)."}),
        (400, {"message": "Prompt contains 40000 tokens, too large for model with 32768 maximum context length"}),
        (400, {"message": "Input is too long for requested model."}),
        (400, {"error": "the model is loaded with context length of only 32768 tokens, which is not enough."}),
        (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096."}),
    ],
    Trouble.POLICY: [
        (400, openai_error(AZURE, param="prompt", code="content_filter")),
        (400, openai_error("No.", innererror={"code": "ResponsibleAIPolicyViolation", "content_filter_result": {}})),
        (400, openai_error("No.", provider_specific_fields={"innererror": {"code": "ResponsibleAIPolicyViolation"}})),
        (400, openai_error(AZURE)),
        (400, openai_error("Your request was rejected as a result of our safety system.")),
        (400, openai_error("No.", code="content_policy_violation")),
        (400, openai_error("No.", type="user_error", code="moderation_blocked")),
        (400, openai_error(FLAGGED, code="invalid_prompt")),
        (400, {"error": {"code": "421", "message": "Moderation Block", "type": "content_filter"}}),
        (403, openrouter_error("", 403, reasons=["violence"], flagged_input="how do I")),
        (403, {"error": {"code": 403, "message": "Your chosen model requires moderation and your input was flagged"}}),
        (400, openrouter_error(openai_error("No.", code="content_filter"))),
        (400, {"error": {"message": "Content Exists Risk", "code": "invalid_request_error"}}),
        (400, {"error": {"message": "Inappropriate.", "code": "data_inspection_failed"}}),
    ],
    Trouble.CREDENTIAL: [
        (401, openai_error("Incorrect API key provided.", code="invalid_api_key")),
        (402, {"error": {"code": 402, "message": "Insufficient credits"}}),
        (403, anthropic_error("Not allowed.", "permission_error")),
        (403, openai_error("flagged", code="unsupported_country_region_territory")),
        (429, openai_error(QUOTA, type="insufficient_quota", code="insufficient_quota")),
        (429, openai_error(QUOTA, type="insufficient_quota")),
        (400, openai_error("Billing hard limit has been reached", code="billing_hard_limit_reached")),
        (400, anthropic_error("Your credit balance is too low to access the Anthropic API.")),
        (400, google_error(400, "API key not valid. Please pass a valid API key.", "INVALID_ARGUMENT")),
    ],
    Trouble.MISSING: [
        (404, openai_error("no")),
        (403, openai_error("Project does not have access to model `m`", code="model_not_found")),
    ],
    Trouble.LIMITED: [
        (429, openai_error("Rate limit reached.", code="rate_limit_exceeded")),
        (429, google_error(429, QUOTA, "RESOURCE_EXHAUSTED")),
        (429, openai_error(f"{VLLM} Too many requests.")),
        (413, openai_error(TOO_LARGE, type="tokens", code="rate_limit_exceeded")),
    ],
    Trouble.OVERLOADED: [(503, "busy"), (529, anthropic_error("Overloaded", "overloaded_error"))],
    Trouble.BROKEN: [(500, openai_error("no")), (502, "<html>"), (504, {}), (408, openai_error("no")), (501, [])],
    Trouble.REQUEST: [
        (400, openai_error("Invalid value for 'temperature'.")),
        (413, anthropic_error("Request exceeds the maximum size", "request_too_large")),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "bad"}]}),
        (409, openai_error("no")),
        (400, anthropic_error("max_tokens: 21333 > 4096, which is the maximum allowed number of output tokens")),
        (400, openai_error("Invalid 'user': string too long. Expected a string with maximum length 64.")),
        # The user's own words are not the provider's.
        (400, openai_error(f'Invalid type for messages[0]: "{FLAGGED}" is not an object')),
        (400, openai_error(f"Invalid type for messages[0]: 'it wasn't allowed. {AZURE}' is not an object")),
        (400, openai_error(f"Invalid type for messages[0]: “{VLLM}” is not an object")),
        (400, openai_error(f'Invalid value: "and it goes on for long {"x" * 300} {FLAGGED}')),
        (400, openai_error("Failed to parse the body: " + "x" * 400 + VLLM)),
        (400, openai_error('Invalid arguments: {"message": "no", "code": "content_filter"}')),
        (400, openai_error("Unknown parameter: 'content_filter'.", param="content_filter", code="unknown_parameter")),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("trouble", "status", "value"),
    [(trouble, status, value) for trouble, cases in TROUBLES.items() for status, value in cases],
)
def test_the_kind_of_trouble_is_told_by_code_then_by_words_then_by_status(
    trouble: Trouble, status: int, value: Any
) -> None:
    assert answer(status, value).trouble is trouble


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        ({"code": "context_length_exceeded"}, Trouble.CONTEXT),
        ({"code": 400, "message": VLLM}, Trouble.CONTEXT),
        ({"type": "exceed_context_size_error", "code": 500}, Trouble.CONTEXT),
        ({"code": "content_filter"}, Trouble.POLICY),
        ({"code": 403, "metadata": {"reasons": ["x"], "flagged_input": "x"}}, Trouble.POLICY),
        ({"type": "insufficient_quota"}, Trouble.CREDENTIAL),
        ({"type": "overloaded_error"}, Trouble.OVERLOADED),
        ({"type": "rate_limit_error"}, Trouble.LIMITED),
        ({"code": 502}, Trouble.BROKEN),
        ({}, Trouble.BROKEN),
        ({"message": FLAGGED}, Trouble.BROKEN),  # words are believed only of a 4xx
    ],
)
def test_an_error_in_a_stream_has_its_kind_of_trouble_too(error: dict[str, Any], trouble: Trouble) -> None:
    found = error_in_success({"error": {"message": "no", **error}}, ())
    assert found is not None
    assert found.trouble is trouble


@pytest.mark.parametrize(
    "value",
    [
        openai_error(f"Incorrect API key provided: {SECRET}."),
        openai_error("no", param=SECRET, code=SECRET, type=SECRET),
        openai_error("no", metadata={"headers": {"Authorization": f"Bearer {SECRET}"}, SECRET: 1}),
        {"error": f"key {SECRET}"},
        {"detail": [{"loc": [SECRET], "msg": SECRET}]},
        {"unknown": SECRET},
        f"{SECRET} is wrong",
        # At the place where a long text is cut off.
        *("x" * (300 - cut) + SECRET for cut in range(1, len(SECRET), 5)),
    ],
)
def test_our_credentials_are_never_told(value: Any) -> None:
    """Some upstreams quote the key in their errors, in whole."""
    for data in (json.dumps(value).encode(), str(value).encode()):
        error = error_from_response(400, CIMultiDict(), data, (SECRET, "pw"))
        assert SECRET[:8] not in json.dumps(error.envelope())
        assert SECRET[:8] not in str(error)
    if isinstance(value, dict) and (found := error_in_success(value, (SECRET,))) is not None:
        assert SECRET[:8] not in json.dumps(found.envelope())


def test_what_is_too_short_to_be_a_secret_does_not_blot_the_text() -> None:
    assert scrub("a key is a key", ("a", "", "key")) == "a key is a key"
    assert scrub("a1b2 and a1b2", ("a1b2",)) == "[redacted] and [redacted]"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"code": 429}, 429),
        ({"code": "503"}, 503),
        ({"code": 200, "status": 418}, 418),
        ({"status_code": 500}, 500),
        ({"code": 400, "status": "RESOURCE_EXHAUSTED"}, 400),
        ({"status": "RESOURCE_EXHAUSTED"}, 429),
        ({"type": "rate_limit_error"}, 429),
        ({"code": "insufficient_quota"}, 429),
        ({"code": "invalid_api_key", "type": "invalid_request_error"}, 401),
        ({"type": "authentication_error"}, 401),
        ({"type": "permission_error"}, 403),
        ({"code": "model_not_found", "type": "invalid_request_error"}, 404),
        ({"code": "context_length_exceeded", "type": "invalid_request_error"}, 400),
        ({"code": "content_filter"}, 400),
        ({"type": "invalid_request_error"}, 400),
        ({"type": "overloaded_error"}, 503),
        ({"code": "timeout"}, 504),
        ({"type": "server_error"}, 502),
        ({"code": 40303}, 502),
        ({"code": True}, 502),
        ({}, 502),
    ],
)
def test_an_error_under_a_status_of_200_has_the_status_it_names_or_stands_for(
    error: dict[str, Any], status: int
) -> None:
    """https://github.com/preloop/preloop/issues/121"""
    found = error_in_success({"error": {"message": "no", **error}}, ())
    assert found is not None
    assert found.status == status


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"choices": []}, None),
        ({"choices": [], "error": None}, None),
        ({"choices": [], "error": {}}, None),
        ({"choices": [], "message": "hm"}, None),
        ({"choices": [], "error": {"message": "no"}}, "no"),
        ({"choices": [], "error": "no"}, "no"),
        ({"object": "error", "message": "no", "choices": []}, "no"),
        ({"message": "no"}, "no"),
        ({"detail": "no"}, "no"),
        ({}, None),
        ({"data": [1]}, None),
    ],
)
def test_a_body_with_status_200_is_an_error_when_it_says_so(value: dict[str, Any], message: str | None) -> None:
    found = error_in_success(value, ())
    assert (found and found.message) == message
