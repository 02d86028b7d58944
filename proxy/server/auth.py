"""Who asks: from a request's headers to an Identity, or to 401 and 403.

A client presents its key as `Authorization: Bearer …` (RFC 6750 §2.1), which OpenAI's programs send, `api-key` (Azure's,
https://learn.microsoft.com/azure/ai-services/openai/reference) or `x-api-key` (Anthropic's,
https://docs.anthropic.com/en/api/overview). None of these goes on to an upstream (wire/headers.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from proxy.addresses import host_of, is_loopback
from proxy.chat import LOCAL, Identity
from proxy.errors import ClientError
from proxy.policy.keys import allows, is_same
from proxy.settings import Settings
from proxy.store.account_rows import Team, missing
from proxy.store.accounts import Accounts

_CREDENTIALS = ("Authorization", "api-key", "x-api-key")
_HOW = "as 'Authorization: Bearer KEY', 'api-key: KEY' or 'x-api-key: KEY'"


class Auth:
    """Decides who may come in. One for each server."""

    def __init__(self, settings: Settings, accounts: Accounts) -> None:
        self.is_open = settings.auth.mode == "open"
        self._admin_key = settings.admin_key
        self._accounts = accounts

    def identify(self, headers: Mapping[str, str]) -> Identity:
        """Whose request this is. ClientError 401 without a good key, 403 with one that may not be used now."""
        if self.is_open:
            return LOCAL
        for key in _presented(headers):
            return self._accounts.identify(key, time.time())
        raise ClientError(401, "missing_api_key", f"No API key was sent: send it {_HOW}.")

    def admit_admin(self, headers: Mapping[str, str]) -> None:
        """Let an administrator in: who presents the admin key or, where there is none and no one needs a key, anybody here.

        ClientError 401 for all others, 403 where nobody can be one.
        """
        if self._admin_key is None:
            if self.is_open:
                _check_host(headers)
                return
            words = 'With auth.mode = "keys" this needs an admin key, and none is configured: see auth.admin_key_env.'
            raise ClientError(403, "no_admin_key", words)
        if not any(self._is_admin(key) for key in _presented(headers)):
            raise ClientError(401, "invalid_admin_key", f"This needs the admin key: send it {_HOW}.")

    def without_admin_key(self, headers: Mapping[str, str]) -> dict[str, str]:
        """What a client presents of credentials, but for the admin key."""
        given = {name: headers[name] for name in _CREDENTIALS if name in headers}
        return {name: value for name, value in given.items() if not any(map(self._is_admin, _presented({name: value})))}

    def _is_admin(self, key: str) -> bool:
        return self._admin_key is not None and is_same(key, self._admin_key)


def _check_host(headers: Mapping[str, str]) -> None:
    """ClientError 403 for a request that names this machine otherwise than a program on it does.

    A page may have its own name point here once it is loaded (DNS rebinding), and then reads what it likes: with a GET to what
    it takes for its own server a browser sends no `Origin` (https://fetch.spec.whatwg.org/#append-a-request-origin-header), and
    only `Host`, which RFC 9112 §3.2 requires, tells. Programs that send none are no browsers.
    """
    host = headers.get("Host")
    if host is not None and not is_loopback(host_of(f"http://{host}")):
        words = "Without an admin key this is served to localhost only, and by no other name: see auth.admin_key_env."
        raise ClientError(403, "host_not_allowed", words)


def caller_of(identity: Identity, headers: Mapping[str, str]) -> str:
    """Whose answers may be shared: the team's or, where no key is needed, those for whom the same was presented."""
    if identity.caller:
        return identity.caller
    for name in _CREDENTIALS:
        if (given := headers.get(name)) is not None:
            return f"{name}: {given}"
    return ""


def check_team(identity: Identity, team: str | None) -> None:
    """ClientError 404 for any team but the caller's own (None: none was named).

    Before anything is looked up, so nothing tells whether there is one.
    """
    if team is not None and team != identity.team:
        raise missing(Team, team)


def may_ask(identity: Identity, model: str) -> bool:
    """Whether a model may be asked for, by this very name."""
    if may_ask_any(identity):
        return True
    return model not in identity.barred and allows(identity.models, model) and allows(identity.team_models, model)


def may_ask_any(identity: Identity) -> bool:
    """Whether all models may be asked for."""
    return identity is LOCAL or ("*" in identity.models and "*" in identity.team_models and not identity.barred)


def check_model(identity: Identity, model: str) -> None:
    """ClientError 403 for a model that may not be asked for, whether it exists or not."""
    if not may_ask(identity, model):
        words = f"This API key may not be used for the model '{model}'."
        raise ClientError(403, "model_not_allowed", words, param="model")


def _presented(headers: Mapping[str, str]) -> Iterator[str]:
    """The keys in the headers, the one that counts first. Other schemes than Bearer are those of a server before us."""
    scheme, _, key = headers.get("Authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and (key := key.strip()):
        yield key
    for name in ("api-key", "x-api-key"):
        if key := headers.get(name, "").strip():
            yield key
