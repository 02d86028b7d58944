"""The operator's face of organisations, teams and virtual keys.

    GET, POST   /admin/organisations       GET, PATCH  /admin/organisations/{id}
    GET, POST   /admin/teams               GET, PATCH  /admin/teams/{id}          POST  …/suspend, …/resume
    GET, POST   /admin/keys                GET, PATCH  /admin/keys/{id}           POST  …/suspend, …/resume, …/revoke

Lists are in the order of ids: `?limit=` (100, at most 1000) of those behind `?after=`; `?organisation=` and `?team=` narrow them.
The text of a key is in the answer to the POST that made it, and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeVar

from aiohttp import web

from proxy.errors import ConfigError, ProxyError
from proxy.server import accountforms as forms
from proxy.server.downstream import json_response
from proxy.server.queries import check_names, page_size
from proxy.server.state import STATE
from proxy.store.account_rows import Organisation, Team, VirtualKey
from proxy.store.accounts import Accounts
from proxy.wire.requests import parse_object

F = TypeVar("F")
R = TypeVar("R", Organisation, Team, VirtualKey)


async def list_organisations(request: web.Request) -> web.StreamResponse:
    """GET /admin/organisations: all there are."""
    accounts = await accounts_now(request)
    limit, after, _ = _range(request)
    return _list(*accounts.organisations(limit, after))


async def create_organisation(request: web.Request) -> web.StreamResponse:
    """POST /admin/organisations: make one, of `id` and `name`."""
    accounts = await accounts_now(request)
    form = await form_of(request, forms.NewOrganisation)
    return json_response(_view(await accounts.create(forms.organisation(form, time.time()))), 201)


async def get_organisation(request: web.Request) -> web.StreamResponse:
    """GET /admin/organisations/{id}: one of them."""
    return json_response(_view((await accounts_now(request)).organisation(_id(request))))


async def change_organisation(request: web.Request) -> web.StreamResponse:
    """PATCH /admin/organisations/{id}: change it. What is left out stays."""
    return await _changed(request, Organisation, **await form_of(request, forms.OrganisationChanges))


async def list_teams(request: web.Request) -> web.StreamResponse:
    """GET /admin/teams: all there are."""
    accounts = await accounts_now(request)
    limit, after, organisation = _range(request, "organisation")
    return _list(*accounts.teams(limit, after, organisation=organisation))


async def create_team(request: web.Request) -> web.StreamResponse:
    """POST /admin/teams: make one, of `id` and `name`, `organisation`, `models`, limits, budgets, terms of credit."""
    accounts = await accounts_now(request)
    form = await form_of(request, forms.NewTeam)
    return json_response(_view(await accounts.create(forms.team(form, time.time()))), 201)


async def get_team(request: web.Request) -> web.StreamResponse:
    """GET /admin/teams/{id}: one of them."""
    return json_response(_view((await accounts_now(request)).team(_id(request))))


async def change_team(request: web.Request) -> web.StreamResponse:
    """PATCH /admin/teams/{id}: change it. What is left out stays; null takes a limit away."""
    return await _changed(request, Team, **forms.changes(await form_of(request, forms.TeamChanges)))


async def suspend_team(request: web.Request) -> web.StreamResponse:
    """POST /admin/teams/{id}/suspend: its keys are good for nothing until it is resumed. What runs may end."""
    return await _changed(request, Team, is_suspended=True)


async def resume_team(request: web.Request) -> web.StreamResponse:
    """POST /admin/teams/{id}/resume: its keys are good again."""
    return await _changed(request, Team, is_suspended=False)


async def list_keys(request: web.Request) -> web.StreamResponse:
    """GET /admin/keys: all there are. Those that were revoked too."""
    accounts = await accounts_now(request)
    limit, after, team = _range(request, "team")
    return _list(*accounts.keys(limit, after, team=team))


async def create_key(request: web.Request) -> web.StreamResponse:
    """POST /admin/keys: make one. The answer holds the key, this once."""
    accounts = await accounts_now(request)
    form = await form_of(request, forms.NewKey)
    try:
        key, text = await accounts.create_key(**forms.key(form), now=time.time())
    except ConfigError as error:
        raise ProxyError(500, "key_secret_unusable", f"No key can be made: {error}.") from None
    response = json_response({**_view(key), "key": text}, 201)
    response.headers["Cache-Control"] = "no-store"
    return response


async def get_key(request: web.Request) -> web.StreamResponse:
    """GET /admin/keys/{id}: one of them."""
    return json_response(_view((await accounts_now(request)).key(_id(request))))


async def change_key(request: web.Request) -> web.StreamResponse:
    """PATCH /admin/keys/{id}: change it. What is left out stays; null takes a limit, or the end of its time, away."""
    return await _changed(request, VirtualKey, **forms.changes(await form_of(request, forms.KeyChanges)))


async def suspend_key(request: web.Request) -> web.StreamResponse:
    """POST /admin/keys/{id}/suspend: it is good for nothing until it is resumed."""
    return await _changed(request, VirtualKey, is_suspended=True)


async def resume_key(request: web.Request) -> web.StreamResponse:
    """POST /admin/keys/{id}/resume: it is good again."""
    return await _changed(request, VirtualKey, is_suspended=False)


async def revoke_key(request: web.Request) -> web.StreamResponse:
    """POST /admin/keys/{id}/revoke: it is good for nothing any more, for ever."""
    return json_response(_view(await (await accounts_now(request)).revoke(_id(request), time.time())))


def routes() -> list[web.RouteDef]:
    """All of these."""
    return [
        web.get("/admin/organisations", list_organisations),
        web.post("/admin/organisations", create_organisation),
        web.get("/admin/organisations/{id}", get_organisation),
        web.patch("/admin/organisations/{id}", change_organisation),
        web.get("/admin/teams", list_teams),
        web.post("/admin/teams", create_team),
        web.get("/admin/teams/{id}", get_team),
        web.patch("/admin/teams/{id}", change_team),
        web.post("/admin/teams/{id}/suspend", suspend_team),
        web.post("/admin/teams/{id}/resume", resume_team),
        web.get("/admin/keys", list_keys),
        web.post("/admin/keys", create_key),
        web.get("/admin/keys/{id}", get_key),
        web.patch("/admin/keys/{id}", change_key),
        web.post("/admin/keys/{id}/suspend", suspend_key),
        web.post("/admin/keys/{id}/resume", resume_key),
        web.post("/admin/keys/{id}/revoke", revoke_key),
    ]


async def accounts_now(request: web.Request) -> Accounts:
    """All there are now, whoever made them."""
    accounts = request.app[STATE].accounts
    await accounts.refresh()
    return accounts


async def form_of(request: web.Request, form: type[F]) -> F:
    """The form that a request's body fills in. ClientError 400."""
    return forms.filled(form, parse_object(await request.read()))


async def _changed(request: web.Request, kind: type[R], **changes: Any) -> web.StreamResponse:
    """The row that the path names, with these changes."""
    return json_response(_view(await (await accounts_now(request)).change(kind, _id(request), **changes)))


def _id(request: web.Request) -> str:
    return request.match_info["id"]


def _range(request: web.Request, narrows: str = "") -> tuple[int, str, str | None]:
    """What of a list is wanted: how much, what it comes behind, and the value of what narrows it."""
    given = request.query
    check_names(given, ("limit", "after", narrows))
    return page_size(given, most_digits=9), given.get("after", ""), given.get(narrows)


def _list(found: Sequence[Organisation | Team | VirtualKey], total: int) -> web.Response:
    return json_response({"object": "list", "data": [_view(row) for row in found], "total": total})


def _view(row: Organisation | Team | VirtualKey) -> dict[str, Any]:
    """A row as it may be seen: nothing of it lets anybody in."""
    view = forms.shown(row)
    if isinstance(row, VirtualKey):
        view["status"] = row.status(time.time())
        del view["hash"], view["secret"]
    return view
