"""What the document at /openapi.json says of each route, besides what the route itself and its handler's docstring tell.

To add a route: give its handler a docstring that begins with the method and the path, and give it a line in `OPERATIONS`, under
both as the router writes them. Which key it needs, its path's parameters, and the errors that follow from these are found out
(openapi.py). A test fails for a route without a line, for a line without a route, and for an answer that is not as its line
says: another status, another code of an error, a member that is missing or is not spoken of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from proxy.server import accountforms as forms
from proxy.server import openai, shapes, streams

JSON, EVENTS, CSV, TEXT, ANYTHING = "application/json", "text/event-stream", "text/csv", "text/plain", "*/*"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is no error. `words` say what it is.

    `kinds` are the types of its JSON by media type; what is no JSON has `str`. Of a stream it is what each event holds, but for
    the last, `[DONE]`. None is no body.
    """

    words: str
    kinds: Mapping[str, Any] = field(default_factory=dict)
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    `query`, `headers` and `path` are TypedDicts of what may stand there (in a path: where it is no text), `body` one of what the
    body holds, and `example` a body that is good. `refuses` are errors of its own: by status, words with the codes in backticks.
    `speaker` is whose docstring says what it does, where the router's handler is not who answers.
    """

    answers: Mapping[int, Answer]
    query: type[Any] | None = None
    headers: type[Any] | None = None
    path: type[Any] | None = None
    body: type[Any] | None = None
    example: Mapping[str, Any] | None = None
    refuses: Mapping[int | str, str] = field(default_factory=dict)
    speaker: Callable[..., Any] | None = None


def ok(shape: Any, words: str = "So it is.", *headers: str) -> Mapping[int, Answer]:
    """200, with this in its JSON."""
    return {200: Answer(words, {JSON: shape}, headers)}


def made(shape: Any, words: str) -> Mapping[int, Answer]:
    """201, with what was made."""
    return {201: Answer(words, {JSON: shape})}


# ------------------------------------------------------------------ what may stand in queries and headers

Limit = Annotated[int, Field(ge=1, description="How many, 100 by default; of more than 1,000 only these come.")]
After = Annotated[str, Field(description="An id: what comes behind it in the list.")]


class Page(TypedDict, total=False):
    limit: Limit
    after: After


class TeamsPage(Page, total=False):
    organisation: Annotated[str, Field(description="Those of this organisation alone.")]


class KeysPage(Page, total=False):
    team: Annotated[str, Field(description="Those of this team alone.")]


class _CacheFilter(TypedDict, total=False):
    model: Annotated[str, Field(description="As it was asked for.")]
    namespace: str


class CachePage(_CacheFilter, total=False):
    limit: Limit
    before: Annotated[int, Field(ge=1, description="An id: what comes behind it in the list.")]


class CacheDeletion(_CacheFilter, total=False):
    all: Annotated[Literal["true"], Field(description="Really all there are.")]


class CacheEntryId(TypedDict):
    id: Annotated[int, Field(ge=0)]


class Whose(TypedDict, total=False):
    team: Annotated[str, Field(description='Whose question it would be, with auth.mode "keys": `local`\'s by default.')]


class Behind(TypedDict, total=False):
    after: Annotated[int, Field(ge=0, lt=10**9, description="How many events the client has.")]


LastEvent = TypedDict(
    "LastEvent",
    {"Last-Event-ID": Annotated[int, Field(ge=0, lt=10**9, description="As `after`, and stronger.")]},
    total=False,
)

Wishes = TypedDict(
    "Wishes",
    {
        "x-headwater-job": Annotated[str, Field(description="The job it belongs to.")],
        "x-headwater-purpose": Annotated[str, Field(description="What it is for, in a word of your own, for the ledger.")],
        "x-headwater-coalesce": Annotated[Literal["yes", "no"], Field(description="Whether to share answers in flight.")],
        "x-headwater-delivery": Annotated[Literal["whole", "stream"], Field(description="Late and whole, or at once.")],
        "x-headwater-cache": Annotated[Literal["semantic", "exact", "off"], Field(description="How to look it up.")],
        "x-headwater-namespace": Annotated[str, Field(max_length=128, description="A part of the cache of its own.")],
        "Cache-Control": Annotated[str, Field(description="`no-cache`, `no-store`, `max-age`, `only-if-cached`.")],
    },
    total=False,
)  # fmt: skip

# ------------------------------------------------------------------ errors that several have

NO_ORGANISATION = "There is no such organisation: `organisation_not_found`"
NO_TEAM = "There is no such team: `team_not_found`"
NO_KEY = "There is no such key: `key_not_found`"
NO_ENTRY = "There is no such entry: `not_found`"
REVOKED = "It was revoked, for ever: `key_revoked`"

# What any call may meet.
CALL: Mapping[int | str, str] = {
    400: "The request is wrong: `several_models`, `empty_array`",
    402: "The credits or a budget are spent: `insufficient_credits`, `budget_exceeded`",
    403: "This model is not for this key, or has no price: `model_not_allowed`, `price_unknown`",
    404: "`model_not_found`, `job_not_found`",
    409: "The job has ended: `job_ended`",
    429: "A limit of the key or the team: `rate_limit_exceeded`",
    "4XX": "An upstream refused it: its own status and words",
    "5XX": "An upstream failed, or none can be asked now: its own status and words, or 502, 503, 504",
}

TOLD = ("x-headwater-target", "x-headwater-attempts", "x-headwater-stream", "x-cache")

_CHAT = {"model": "demo-stream", "messages": [{"role": "user", "content": "Hello"}]}

# Addresses of ours that answer nothing but that another method is wanted: 405.
UNSPOKEN = frozenset({("*", "/v1/streams/{id}")})

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    # -------------------------------------------------------------- OpenAI's
    ("POST", openai.CHAT_PATH): Operation(
        {
            200: Answer(
                "The whole answer or, with `stream`, its chunks: an event each, and at last `[DONE]`.",
                {JSON: shapes.ChatCompletion, EVENTS: shapes.ChatChunk},
                TOLD,
            )
        },
        headers=Wishes,
        body=shapes.ChatRequest,
        example=_CHAT,
        refuses={**CALL, 504: "`only-if-cached`, and nothing is: `not_cached`; or an upstream was silent"},
        speaker=openai.chat_completions,
    ),
    ("GET", "/v1/streams/{id}"): Operation(
        {
            200: Answer("The events behind those.", {EVENTS: shapes.ChatChunk}),
            204: Answer("There are none: the client has all."),
        },
        query=Behind,
        headers=LastEvent,
        refuses={
            404: "It is unknown, or not kept any more: `stream_not_found`",
            "4XX": CALL["4XX"],
            "5XX": CALL["5XX"],
        },
        speaker=streams.resume,
    ),
    ("GET", "/v1/models"): Operation(ok(shapes.Models)),
    ("GET", "/v1/models/{model}"): Operation(ok(shapes.Model), refuses={404: "`model_not_found`"}),
    ("*", "/v1/{rest}"): Operation(
        {200: Answer("What the upstream says, as it says it.", {ANYTHING: Any}, ("x-headwater-target",))},
        body=shapes.NamesAModel,
        example={"model": "demo-embeddings", "input": "Hello"},
        refuses={**CALL, 403: f"{CALL[403]}; or the request names no model, and needs to: `model_required`"},
    ),
    # -------------------------------------------------------------- the proxy itself
    ("GET", "/health"): Operation(ok(shapes.Health)),
    ("GET", "/ready"): Operation({**ok(shapes.Readiness), 503: Answer("It is stopping.", {JSON: shapes.Readiness})}),
    ("GET", "/openapi.json"): Operation(ok(dict[str, Any], "This document.")),
    ("GET", "/metrics"): Operation(
        {200: Answer("Prometheus' text, or OpenMetrics.", {TEXT: str, "application/openmetrics-text": str})}
    ),
    ("GET", "/admin/targets"): Operation(ok(shapes.Targets)),
    ("GET", "/admin/capabilities"): Operation(ok(shapes.Capabilities)),
    ("DELETE", "/admin/capabilities/{upstream}/{model}"): Operation(
        ok(shapes.ForgottenCapability), refuses={404: "Nothing is known of it: `not_found`"}
    ),
    # -------------------------------------------------------------- the cache
    ("GET", "/admin/cache"): Operation(ok(shapes.CacheFigures)),
    ("DELETE", "/admin/cache"): Operation(ok(shapes.DeletedMany), query=CacheDeletion),
    ("GET", "/admin/cache/entries"): Operation(ok(shapes.CacheEntries), query=CachePage),
    ("GET", "/admin/cache/entries/{id}"): Operation(
        ok(shapes.CacheEntryInFull), path=CacheEntryId, refuses={404: NO_ENTRY}
    ),
    ("DELETE", "/admin/cache/entries/{id}"): Operation(
        ok(shapes.DeletedEntry), path=CacheEntryId, refuses={404: NO_ENTRY}
    ),
    ("POST", "/admin/cache/explain"): Operation(
        ok(shapes.Explanation),
        query=Whose,
        headers=Wishes,
        body=shapes.ChatRequest,
        example=_CHAT,
        refuses={
            400: CALL[400],
            404: f"{NO_TEAM}; or no such model: `model_not_found`",
            503: "Its vector cannot be made: `no_vector`",
            504: "`only-if-cached`, and nothing is looked up: `not_cached`",
        },
    ),
    # -------------------------------------------------------------- organisations, teams, keys
    ("GET", "/admin/organisations"): Operation(ok(shapes.Organisations), query=Page),
    ("POST", "/admin/organisations"): Operation(
        made(shapes.Organisation, "It is there."),
        body=forms.NewOrganisation,
        example={"id": "acme", "name": "Acme"},
        refuses={409: "Its id is taken: `organisation_exists`"},
    ),
    ("GET", "/admin/organisations/{id}"): Operation(ok(shapes.Organisation), refuses={404: NO_ORGANISATION}),
    ("PATCH", "/admin/organisations/{id}"): Operation(
        ok(shapes.Organisation),
        body=forms.OrganisationChanges,
        example={"name": "Acme & Sons"},
        refuses={404: NO_ORGANISATION},
    ),
    ("GET", "/admin/teams"): Operation(ok(shapes.Teams), query=TeamsPage),
    ("POST", "/admin/teams"): Operation(
        made(shapes.Team, "It is there."),
        body=forms.NewTeam,
        example={"id": "research", "name": "Research", "models": ["gpt-4o*"], "requests_per_minute": 600},
        refuses={404: NO_ORGANISATION, 409: "Its id is taken: `team_exists`"},
    ),
    ("GET", "/admin/teams/{id}"): Operation(ok(shapes.Team), refuses={404: NO_TEAM}),
    ("PATCH", "/admin/teams/{id}"): Operation(
        ok(shapes.Team), body=forms.TeamChanges, example={"requests_per_minute": None}, refuses={404: NO_TEAM}
    ),
    ("POST", "/admin/teams/{id}/suspend"): Operation(ok(shapes.Team), refuses={404: NO_TEAM}),
    ("POST", "/admin/teams/{id}/resume"): Operation(ok(shapes.Team), refuses={404: NO_TEAM}),
    ("GET", "/admin/keys"): Operation(ok(shapes.Keys), query=KeysPage),
    ("POST", "/admin/keys"): Operation(
        made(shapes.NewlyMadeKey, "It is good at once."),
        body=forms.NewKey,
        example={"team": "local", "name": "nightly job", "models": ["gpt-4o-mini"], "parallel_calls": 4},
        refuses={404: NO_TEAM, 500: "The secret of the keys cannot be read: `key_secret_unusable`"},
    ),
    ("GET", "/admin/keys/{id}"): Operation(ok(shapes.Key), refuses={404: NO_KEY}),
    ("PATCH", "/admin/keys/{id}"): Operation(
        ok(shapes.Key), body=forms.KeyChanges, example={"expires_at": None}, refuses={404: NO_KEY, 409: REVOKED}
    ),
    ("POST", "/admin/keys/{id}/suspend"): Operation(ok(shapes.Key), refuses={404: NO_KEY, 409: REVOKED}),
    ("POST", "/admin/keys/{id}/resume"): Operation(ok(shapes.Key), refuses={404: NO_KEY, 409: REVOKED}),
    ("POST", "/admin/keys/{id}/revoke"): Operation(ok(shapes.Key), refuses={404: NO_KEY}),
}
