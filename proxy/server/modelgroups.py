"""Model groups: names for models that administrators make while the proxy runs, and what a tenant may know of one.

    GET, POST   /admin/model-groups        GET, PATCH  /admin/model-groups/{name}      POST  …/activate, …/deactivate
    GET         /api/model-groups/{name}/resolve

Lists are as those of the accounts. A `/` in a name may be written as it is, or as `%2F`. A group is asked for like an alias of
the config, which goes first where both have a name.

`resolve` tells a tenant the targets by their names. The same are in `GET /v1/models`, and in each answer's header
`x-headwater-target`: who may ask for a group may know whom it asks. Whoever may not is told what is told of a group that
never was. What stays hidden is where the upstreams are, what they cost, and which teams there are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Required

from aiohttp import web
from pydantic import BeforeValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from proxy.chat import CacheTier, Recovery
from proxy.errors import ClientError
from proxy.policy.routing import Routes
from proxy.server.accounts import accounts_now, form_of
from proxy.server.auth import may_ask
from proxy.server.downstream import json_response
from proxy.server.middleware import VISIT
from proxy.server.queries import check_names, page_size
from proxy.server.state import STATE, State
from proxy.store.account_rows import GroupTarget, ModelGroup, missing
from proxy.store.accounts import Accounts

_log = logging.getLogger(__name__)

_STRICT = ConfigDict(extra="forbid", strict=True)

# What a request may ask for, and a terminal, a log or a header can hold. One that begins with a dot could be no path.
_Name = Annotated[
    str, Field(max_length=256, pattern=r"^[^\s.\x00-\x1f\x7f-\x9f]([^\x00-\x1f\x7f-\x9f]*[^\s\x00-\x1f\x7f-\x9f])?$")
]


def _as_model(value: Any) -> Any:
    """What stands for a model of a group, as an object."""
    return {"model": value} if isinstance(value, str) else value


@with_config(_STRICT)
class _Model(TypedDict, total=False):
    model: Required[_Name]
    priority: Annotated[int, Field(ge=0, le=1000)]
    weight: Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)] | None
    context_tokens: Annotated[int, Field(gt=0, le=10**12)] | None


_Models = Annotated[
    list[Annotated[_Model, BeforeValidator(_as_model, json_schema_input_type=_Model | str)]],
    Field(min_length=1, max_length=50),
]


@with_config(_STRICT)
class _Settings(TypedDict, total=False):
    recovery: Recovery | None
    delivery: Literal["stream", "whole"]
    coalesce: bool | None
    cache: CacheTier | None
    cache_ttl_s: Annotated[float, Field(ge=0, le=10**11, allow_inf_nan=False)] | None
    team_ids: Annotated[list[str], Field(min_length=1, max_length=1000)] | None


@with_config(_STRICT)
class GroupChanges(_Settings, total=False):
    models: _Models


@with_config(_STRICT)
class NewGroup(_Settings, total=False):
    name: Required[_Name]
    models: Required[_Models]


# ------------------------------------------------------------------ for administrators


async def list_groups(request: web.Request) -> web.StreamResponse:
    """GET /admin/model-groups?limit=&after=: all of them, also those that are out of use."""
    given = request.query
    check_names(given, ("limit", "after"))
    accounts = await accounts_now(request)
    found, total = accounts.model_groups(page_size(given, most_digits=9), given.get("after", ""))
    routes = request.app[STATE].routes
    return json_response({"object": "list", "data": [_view(group, routes) for group in found], "total": total})


async def create_group(request: web.Request) -> web.StreamResponse:
    """POST /admin/model-groups: `name`, `models`, `team_ids`, and what a [[model]] of the config has."""
    state = request.app[STATE]
    accounts = await accounts_now(request)
    form = await form_of(request, NewGroup)
    name = form["name"]
    if any(model.name == name for model in state.settings.model):
        raise ClientError(
            409, "model_group_exists", f"The config has a model '{name}', which goes first.", param="name"
        )
    fields = _fields(form, state)
    group = ModelGroup(name, fields.pop("targets"), time.time(), **fields)
    return json_response(_view(await accounts.create(group), state.routes), 201)


async def get_group(request: web.Request) -> web.StreamResponse:
    """GET /admin/model-groups/{name}: one of them."""
    accounts = await accounts_now(request)
    return json_response(_view(accounts.model_group(_name(request)), request.app[STATE].routes))


async def change_group(request: web.Request) -> web.StreamResponse:
    """PATCH /admin/model-groups/{name}: what is left out stays; `models` are all it has from now on."""
    form = await form_of(request, GroupChanges)
    return await _changed(request, **_fields(form, request.app[STATE]))


async def activate_group(request: web.Request) -> web.StreamResponse:
    """POST /admin/model-groups/{name}/activate: its name is good again."""
    return await _changed(request, is_active=True)


async def deactivate_group(request: web.Request) -> web.StreamResponse:
    """POST /admin/model-groups/{name}/deactivate: its name stands for nothing until it is activated. What runs may end."""
    return await _changed(request, is_active=False)


# ------------------------------------------------------------------ for tenants


async def resolve(request: web.Request) -> web.StreamResponse:
    """GET /api/model-groups/{name}/resolve: whom a group, or an alias of the config, asks, in the order in which it does.

    `models` has the same with what is known of each; those in a row that have a weight take turns by it.
    """
    check_names(request.query, ())
    name = _name(request)
    route = request.app[STATE].routes.aliases.get(name)
    if route is None or not may_ask(request[VISIT].identity, name):
        raise missing(ModelGroup, name)
    first, *others = map(str, route.targets)
    models = [
        {"model": str(target), "weight": weight, "context_tokens": route.contexts.get(target)}
        for target, weight in zip(route.targets, route.weights, strict=True)
    ]
    return json_response({"model_group": name, "primary_model": first, "fallbacks": others, "models": models})


def routes() -> list[web.RouteDef]:
    """All of these."""
    return [
        web.get("/admin/model-groups", list_groups),
        web.post("/admin/model-groups", create_group),
        web.post("/admin/model-groups/{name:.+}/activate", activate_group),
        web.post("/admin/model-groups/{name:.+}/deactivate", deactivate_group),
        web.get("/admin/model-groups/{name:.+}", get_group),
        web.patch("/admin/model-groups/{name:.+}", change_group),
        web.get("/api/model-groups/{name:.+}/resolve", resolve),
    ]


# ------------------------------------------------------------------ where names lead


def follow_groups(accounts: Accounts, routes: Routes) -> None:
    """Let the routes know the groups, now and whenever one changes. What cannot be used is a warning, once."""
    told: set[tuple[str, str]] = set()

    def take(groups: Iterable[ModelGroup]) -> None:
        for group in groups:
            routes.set_group(group.id, group.settings if group.is_active else None)
            for words in routes.group_problems(group.id):
                if (group.id, words) not in told:
                    told.add((group.id, words))
                    _log.warning("the model group '%s': %s", group.id, words)

    accounts.follow_groups(take)


async def _changed(request: web.Request, **changes: Any) -> web.StreamResponse:
    """The group that the path names, with these changes."""
    group = await request.app[STATE].accounts.change(ModelGroup, _name(request), **changes)
    return json_response(_view(group, request.app[STATE].routes))


def _name(request: web.Request) -> str:
    return request.match_info["name"]


def _fields(form: GroupChanges | NewGroup, state: State) -> dict[str, Any]:
    """What a form says, as the fields of a ModelGroup. ClientError 400 for models that cannot be asked."""
    fields: dict[str, Any] = dict(form)
    fields.pop("name", None)
    if "models" in form:
        del fields["models"]
        fields["targets"] = _targets(form["models"], {upstream.name for upstream in state.settings.upstream})
    if "team_ids" in form:
        teams = fields.pop("team_ids")
        fields["teams"] = None if teams is None else tuple(teams)
    return fields


def _targets(models: Sequence[_Model], upstreams: Collection[str]) -> tuple[GroupTarget, ...]:
    """The targets in the order in which they are asked: by priority and, where that is the same, as they are given.

    One without a priority comes behind the one before it, or takes turns with it where both have a weight.
    """
    found: list[GroupTarget] = []
    for model in models:
        target = GroupTarget(model["model"], 0, model.get("weight"), model.get("context_tokens"))
        upstream, _, rest = target.target.partition("/")
        if not rest:
            raise _wrong(f"'{target.target}' must be written upstream/model.")
        if upstream not in upstreams:
            raise _wrong(f"'{target.target}': no upstream is named '{upstream}'.")
        if any(target.target == other.target for other in found):
            raise _wrong(f"'{target.target}' is named twice.")
        before = found[-1] if found else None
        priority = 0 if before is None else before.priority + (before.weight is None or target.weight is None)
        found.append(target._replace(priority=model.get("priority", priority)))
    found.sort(key=lambda target: target.priority)
    for one, other in pairwise(found):
        if one.priority != other.priority and one.weight is not None and other.weight is not None:
            words = f"'{one.target}' and '{other.target}' take turns by their weights, and must have the same priority."
            raise _wrong(words)
    return tuple(found)


def _wrong(words: str) -> ClientError:
    return ClientError(400, "invalid_value", words, param="models")


def _view(group: ModelGroup, routes: Routes) -> dict[str, Any]:
    """A group as an administrator sees it. `problems` says what of it this proxy cannot use, and why."""
    return {
        "name": group.id,
        "models": [
            {
                "model": target.target,
                "priority": target.priority,
                "weight": target.weight,
                "context_tokens": target.context_tokens,
            }
            for target in group.targets
        ],
        "delivery": group.delivery,
        "recovery": group.recovery,
        "coalesce": group.coalesce,
        "cache": group.cache,
        "cache_ttl_s": group.cache_ttl_s,
        "team_ids": group.teams,
        "is_active": group.is_active,
        "created_at": group.created_at,
        "problems": routes.group_problems(group.id),
    }
