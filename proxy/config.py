"""How the config file and the environment become settings, and what is wrong with them.

`load` reads TOML (`config/headwater.toml` documents every field), lets `HEADWATER_<SECTION>__<FIELD>` override it, and
reports every problem at once: file, line, key path, and the nearest known key.
"""

from __future__ import annotations

import copy
import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from proxy.addresses import environment_proxy, is_base_url, is_loopback, wrong_with_proxy
from proxy.errors import ConfigError
from proxy.settings import (
    AuthSettings,
    CacheSettings,
    ContentKey,
    LedgerSettings,
    ModelSettings,
    PriceSettings,
    ServerSettings,
    Settings,
    StoreSettings,
    StreamingSettings,
    TargetSettings,
    UpstreamSettings,
    parse_content_keys,
    wrong_with_embedder,
)

_ENV_PREFIX = "HEADWATER_"
# Whoever reaches the port may try admin keys, and whoever reads the database may try secrets.
_MIN_ADMIN_KEY, _MIN_KEY_SECRET = 16, 32

_MAX_SOCKET_PATH_BYTES = 107  # unix(7): sun_path has 108, with the zero at its end

_KeyPath = tuple[str | int, ...]
"""Where a value stands: `("model", 0, "targets", 1, "weight")`."""

_NOT_IN_FILES = {
    "secrets": "name an environment variable in api_key_env instead",
    "proxies": "set `proxy` of an upstream instead",
    "admin_key": "name an environment variable in auth.admin_key_env instead",
    "key_secret": "name an environment variable in auth.key_secret_env instead",
    "content_keys": "name an environment variable in ledger.content_keys_env instead",
}

_TABLES: Mapping[tuple[str, ...], type] = {
    (): Settings,
    ("server",): ServerSettings,
    ("auth",): AuthSettings,
    ("store",): StoreSettings,
    ("ledger",): LedgerSettings,
    ("streaming",): StreamingSettings,
    ("cache",): CacheSettings,
}

_LISTS_OF_TABLES: Mapping[tuple[str, ...], type] = {
    ("upstream",): UpstreamSettings,
    ("model",): ModelSettings,
    ("model", "targets"): TargetSettings,
    ("price",): PriceSettings,
}

_S = TypeVar("_S")

_adapter = TypeAdapter(Settings)


def load(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """The settings in the file at `path` (None: no file), overridden by `environ`. ConfigError lists all problems."""
    problems: list[str] = []
    text = ""
    data: dict[str, Any] = {}
    if path is not None:
        try:
            text = path.read_text("utf-8")
            data = tomllib.loads(text)
        except OSError as error:
            raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError([f"{path}: is not valid TOML: {error}"]) from None
    overridden = _override(data, environ, problems)
    for key, instead in _NOT_IN_FILES.items():
        if key in data:
            problems.append(_at(path, text, (key,), f"unknown key; {instead}"))
            del data[key]
    settings = Settings()
    left: dict[_KeyPath, list[int]] = {}
    for is_last_try in (False, True):
        try:
            settings = _adapter.validate_python(data)
            break
        except ValidationError as error:
            if is_last_try:
                raise ConfigError(problems) from None
            wrong = {problem["loc"]: problem for problem in error.errors(include_url=False, include_context=False)}
            # A list whose items are all wrong is reported as too short as well: that is no mistake of its own.
            for place in [place for place in wrong if any(place in _above(key_path) for key_path in wrong)]:
                del wrong[place]
            for place, problem in wrong.items():
                words = _in_words(problem, place)
                if (name := overridden.get(place[:2])) is not None:
                    problems.append(f"environment variable {name}: {words}")
                else:
                    problems.append(_at(path, text, place, words))
            # What is left when the wrong values are taken out may contradict itself too: that is told as well.
            data, left = _without(data, list(wrong))
    for remaining_path, words in _contradictions(settings):
        key_path = _as_written(remaining_path, left)
        name = overridden.get(key_path[:2])
        problems.append(f"environment variable {name}: {words}" if name else _at(path, text, key_path, words))
    secrets: dict[str, str] = {}
    for position, upstream in enumerate(settings.upstream):
        try:
            if (secret := _secret(upstream, environ)) is not None:
                secrets[upstream.name] = secret
        except ConfigError as error:
            problems.append(_at(path, text, _as_written(("upstream", position), left), error.problems[0]))
    proxies = _proxies(settings.upstream, environ, problems)
    own: dict[str, str | None] = {}
    for name, key, least in (
        ("admin_key", "admin_key_env", _MIN_ADMIN_KEY),
        ("key_secret", "key_secret_env", _MIN_KEY_SECRET),
    ):
        try:
            own[name] = _own_secret(settings.auth, key, least, environ)
        except ConfigError as error:
            problems.append(_at(path, text, ("auth", key), error.problems[0]))
    content_keys: tuple[ContentKey, ...] = ()
    try:
        content_keys = _content_keys(settings.ledger, environ)
    except ConfigError as error:
        problems.append(_at(path, text, ("ledger", "content_keys_env"), error.problems[0]))
    if problems:
        raise ConfigError(problems)
    return _with(settings, secrets=secrets, proxies=proxies, content_keys=content_keys, **own)


def with_upstreams(settings: Settings, upstreams: tuple[UpstreamSettings, ...], environ: Mapping[str, str]) -> Settings:
    """The settings with `upstreams` instead of their own (for one named on the command line, or found)."""
    secrets = {}
    for upstream in upstreams:
        if (secret := _secret(upstream, environ)) is not None:
            secrets[upstream.name] = secret
    problems: list[str] = []
    changed = _with(settings, upstream=upstreams, secrets=secrets, proxies=_proxies(upstreams, environ, problems))
    problems += [_at(None, "", key_path, words) for key_path, words in _contradictions(changed)]
    if problems:
        raise ConfigError(problems)
    return changed


def without_cache(settings: Settings) -> Settings:
    """The settings with no answer kept or looked for, whatever a model says."""
    return _with(
        settings,
        cache=_with(settings.cache, exact=False, semantic=False),
        model=tuple(_with(model, cache=None) for model in settings.model),
    )


def with_server(settings: Settings, **changes: Any) -> Settings:
    """The settings with some of the server's fields changed, as from the command line."""
    changed = _with(settings, server=_with(settings.server, **changes))
    problems = [_at(None, "", key_path, words) for key_path, words in _contradictions(changed)]
    if problems:
        raise ConfigError(problems)
    return changed


def _with(section: _S, **changes: Any) -> _S:
    values = {known.name: getattr(section, known.name) for known in fields(cast(Any, section))}
    return type(section)(**(values | changes))


def _override(data: dict[str, Any], environ: Mapping[str, str], problems: list[str]) -> dict[_KeyPath, str]:
    """Put the environment's values into `data`; says which variable each key came from."""
    sections = {names[0]: table for names, table in _TABLES.items() if names}
    overridden: dict[_KeyPath, str] = {}

    def put(section: str, key: str, value: Any, name: str) -> None:
        table = data.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = value
            overridden[section, key] = name

    if "FORCE_NON_STREAMING" in environ:
        put("streaming", "force_non_streaming", environ["FORCE_NON_STREAMING"], "FORCE_NON_STREAMING")
    for name, value in environ.items():
        if not name.startswith(_ENV_PREFIX) or "__" not in name:
            continue
        section, _, key = name.removeprefix(_ENV_PREFIX).lower().partition("__")
        known = {known.name: known for known in fields(sections[section])} if section in sections else {}
        if key not in known:
            names = [f"{_ENV_PREFIX}{s}__{f.name}".upper() for s, cls in sections.items() for f in fields(cls)]
            problems.append(f"environment variable {name}: unknown field{_nearest(name, names)}")
            continue
        is_list = str(known[key].type).startswith("tuple")
        put(section, key, [part.strip() for part in value.split(",") if part.strip()] if is_list else value, name)
    return overridden


def _table_of(key_path: _KeyPath) -> tuple[_KeyPath, type]:
    """The table that a value stands in, or that is wrong itself as an item of its list: where it is, and its fields."""
    for length in range(len(key_path), 0, -1):
        names = _names(key_path[:length])
        if isinstance(key_path[length - 1], int):
            if (table := _LISTS_OF_TABLES.get(names)) is not None:
                return key_path[:length], table
        elif length < len(key_path) and (table := _TABLES.get(names)) is not None:
            return key_path[:length], table
    return (), Settings


def _above(key_path: _KeyPath) -> list[_KeyPath]:
    """The places that hold a value, from the outermost in."""
    return [key_path[:length] for length in range(len(key_path))]


def _names(key_path: _KeyPath) -> tuple[str, ...]:
    return tuple(part for part in key_path if isinstance(part, str))


def _without(data: dict[str, Any], key_paths: list[_KeyPath]) -> tuple[dict[str, Any], dict[_KeyPath, list[int]]]:
    """The data without the values at `key_paths`, or without the item of a list in which a required one is missing.

    Also, for each list that lost some, the positions at which the items that are left were written.
    """
    pruned = copy.deepcopy(data)
    lost: dict[_KeyPath, set[int]] = {}
    for key_path in key_paths:
        table_path, table = _table_of(key_path)
        key = key_path[len(table_path)] if len(key_path) > len(table_path) else None
        # What an entry of prices lacks cannot be told when some of it was wrong: it is as if all of it were required.
        required = {
            known.name
            for known in fields(table)
            if known.default is known.default_factory is MISSING or table is PriceSettings
        }
        if table_path and (key is None or key in required):
            lost.setdefault(table_path[:-1], set()).add(cast(int, table_path[-1]))
        else:
            _value_at(pruned, table_path).pop(key, None)
    left: dict[_KeyPath, list[int]] = {}
    while lost:
        list_path = max(lost, key=len)
        gone = lost.pop(list_path)
        place = _value_at(pruned, list_path)
        left[list_path] = [position for position in range(len(place)) if position not in gone]
        place[:] = [place[position] for position in left[list_path]]
        if not place and len(list_path) > 1:
            lost.setdefault(list_path[:-2], set()).add(cast(int, list_path[-2]))
    return pruned, left


def _value_at(data: dict[str, Any], key_path: _KeyPath) -> Any:
    place: Any = data
    for part in key_path:
        place = place[part]
    return place


def _as_written(key_path: _KeyPath, left: Mapping[_KeyPath, list[int]]) -> _KeyPath:
    """Where a value stood before its lists lost some of their items."""
    written: _KeyPath = ()
    for part in key_path:
        written += (left[written][part] if isinstance(part, int) and written in left else part,)
    return written


def _secret(upstream: UpstreamSettings, environ: Mapping[str, str]) -> str | None:
    secret: str | None = None
    if upstream.api_key_env is not None:
        secret = environ.get(upstream.api_key_env, "").strip()
        if not secret:
            raise ConfigError([f"upstream '{upstream.name}': environment variable {upstream.api_key_env} is not set"])
    elif upstream.api_key_file is not None:
        try:
            secret = upstream.api_key_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise ConfigError([f"upstream '{upstream.name}': {upstream.api_key_file} cannot be read"]) from None
        if not secret:
            raise ConfigError([f"upstream '{upstream.name}': {upstream.api_key_file} is empty"])
    if secret is not None and not (secret.isascii() and secret.isprintable()):
        raise ConfigError([f"upstream '{upstream.name}': its API key holds characters that no header can carry"])
    return secret


def _own_secret(section: AuthSettings | LedgerSettings, key: str, least: int, environ: Mapping[str, str]) -> str | None:
    """What the environment holds under the name in a section. A variable that was named on purpose must be there."""
    name = getattr(section, key)
    secret = environ.get(name, "").strip()
    if not secret:
        if name != getattr(type(section)(), key):
            raise ConfigError([f"environment variable {name} is not set"])
        return None
    if len(secret) < least:
        raise ConfigError([f"environment variable {name} must hold at least {least} characters"])
    if not (secret.isascii() and secret.isprintable()):
        raise ConfigError([f"environment variable {name} must hold plain printable characters only"])
    return secret


def _content_keys(ledger: LedgerSettings, environ: Mapping[str, str]) -> tuple[ContentKey, ...]:
    text = _own_secret(ledger, "content_keys_env", 1, environ)
    try:
        return () if text is None else parse_content_keys(text)
    except ValueError as problem:
        raise ConfigError([f"environment variable {ledger.content_keys_env}: {problem}"]) from None


def _proxies(
    upstreams: tuple[UpstreamSettings, ...], environ: Mapping[str, str], problems: list[str]
) -> dict[str, str]:
    """The URL of the outgoing proxy of each upstream that has one: its own `proxy`, or the one the environment names."""
    found: dict[str, str] = {}
    for upstream in upstreams:
        if upstream.proxy is not None:
            if upstream.proxy != "none":
                found[upstream.name] = upstream.proxy
            continue
        if upstream.unix_socket is not None or not is_base_url(upstream.base_url):
            continue
        if (named := environment_proxy(upstream.base_url, environ)) is None:
            continue
        variable, found[upstream.name] = named
        if (words := wrong_with_proxy(found[upstream.name])) is not None:
            problem = f"environment variable {variable}: {words}"
            # It is one mistake, however many upstreams it concerns.
            if problem not in problems:
                problems.append(problem)
    return found


def _contradictions(settings: Settings) -> list[tuple[_KeyPath, str]]:
    """What is well-formed but cannot work."""
    found: list[tuple[_KeyPath, str]] = []
    if settings.auth.mode == "open" and not is_loopback(settings.server.host):
        found.append(
            (
                ("server", "host"),
                f"'{settings.server.host}' can be reached from other machines, and callers are not authenticated: "
                'set auth.mode = "keys", or listen on 127.0.0.1 and put nginx or Caddy in front',
            )
        )
    names = [upstream.name for upstream in settings.upstream]
    found += [(("cache", key), words) for key, words in _wrong_with_cache(settings, names)]
    for position, upstream in enumerate(settings.upstream):
        if upstream.name in names[:position]:
            found.append((("upstream", position, "name"), f"another upstream is named '{upstream.name}' already"))
        if not is_base_url(upstream.base_url):
            found.append((("upstream", position, "base_url"), "must be a URL like https://api.openai.com/v1"))
        if upstream.api_key_env and upstream.api_key_file:
            found.append((("upstream", position), "has both api_key_env and api_key_file: keep one"))
        found += [(("upstream", position, *key), words) for key, words in _wrong_ways(upstream)]
    aliases = [model.name for model in settings.model]
    for position, model in enumerate(settings.model):
        if model.name in aliases[:position]:
            found.append((("model", position, "name"), f"another model is named '{model.name}' already"))
        targets = [entry.target for entry in model.targets]
        for number, target in enumerate(targets):
            key_path = ("model", position, "targets", number)
            upstream_name, slash, upstream_model = target.partition("/")
            if not slash or not upstream_model:
                found.append((key_path, f"'{target}' must be written upstream/model"))
            elif settings.upstream and upstream_name not in names:
                words = f"'{target}': no upstream is named '{upstream_name}'{_nearest(upstream_name, names)}"
                found.append((key_path, words))
            if target in targets[:number]:
                found.append((key_path, f"'{target}' is a target of this model already"))
    found += [
        (("price", position), words) for position, price in enumerate(settings.price) for words in _wrong_with(price)
    ]
    return found


def _wrong_with(price: PriceSettings) -> list[str]:
    """What an entry leaves out that it needs."""
    has_input, has_output = price.input_usd_per_million is not None, price.output_usd_per_million is not None
    if has_input is not has_output:
        return ["has only one of input_usd_per_million and output_usd_per_million: a price is both"]
    if not has_input and price.cached_input_usd_per_million is not None:
        return ["has cached_input_usd_per_million without input_usd_per_million and output_usd_per_million"]
    if not has_input and price.markup_percent is None:
        return ["says neither a price nor a markup"]
    return []


def _wrong_with_cache(settings: Settings, upstreams: list[str]) -> list[tuple[str, str]]:
    """What cannot work in the cache: the key, and words."""
    cache = settings.cache
    found: list[tuple[str, str]] = []
    if cache.semantic and not cache.exact:
        found.append(("semantic", "needs exact = true: what was asked word for word is found there first"))
    kind, _, target = cache.embedder.partition(":")
    upstream = target.partition("/")[0]
    if (words := wrong_with_embedder(cache.embedder)) is not None:
        found.append(("embedder", words))
    elif kind == "upstream" and settings.upstream and upstream not in upstreams:
        words = f"'{cache.embedder}': no upstream is named '{upstream}'{_nearest(upstream, upstreams)}"
        found.append(("embedder", words))
    return found


def _wrong_ways(upstream: UpstreamSettings) -> list[tuple[tuple[str, ...], str]]:
    """What cannot work in the way to an upstream."""
    found: list[tuple[tuple[str, ...], str]] = []
    if upstream.proxy not in (None, "none"):
        if upstream.unix_socket is not None:
            found.append(((), "has both proxy and unix_socket: keep one"))
        if (words := wrong_with_proxy(upstream.proxy or "")) is not None:
            found.append((("proxy",), f'{words}, or "none"'))
    if upstream.unix_socket is not None and len(bytes(upstream.unix_socket)) > _MAX_SOCKET_PATH_BYTES:
        found.append((("unix_socket",), f"is longer than a socket's path can be, {_MAX_SOCKET_PATH_BYTES} bytes"))
    if upstream.client_key_file is not None and upstream.client_cert_file is None:
        found.append((("client_key_file",), "is of no use without client_cert_file"))
    if is_base_url(upstream.base_url) and urlsplit(upstream.base_url).scheme == "http":
        found += [
            ((name,), "is of no use with a base_url of http://, where nothing is encrypted")
            for name in ("ca_file", "client_cert_file", "client_key_file")
            if getattr(upstream, name) is not None
        ]
    return found


def _in_words(problem: Any, key_path: _KeyPath) -> str:
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key{_nearest(str(key_path[-1]), _known_keys(key_path))}"
    message = str(problem["msg"])
    return message[0].lower() + message[1:]


def _known_keys(key_path: _KeyPath) -> list[str]:
    """The keys that may stand where this one does."""
    return [known.name for known in fields(_table_of(key_path)[1]) if known.name not in _NOT_IN_FILES]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _at(path: Path | None, text: str, key_path: _KeyPath, words: str) -> str:
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key_path).lstrip(".")
    if path is None:
        return f"{dotted}: {words}"
    line = _line_of(text, key_path)
    return f"{path}{f':{line}' if line else ''}: {dotted}: {words}"


def _line_of(text: str, key_path: _KeyPath) -> int | None:
    """The line that holds a key, or else its table's heading: for plain `[table]`, `[[array]]`, `key = value` lines.

    What is inside a value is where that begins.
    """
    section = str(key_path[0]) if key_path else ""
    wanted = key_path[1] if len(key_path) > 1 and isinstance(key_path[1], int) else 0
    keys = [part for part in key_path[1:] if isinstance(part, str)]
    heading = re.compile(r"\s*\[+\s*([A-Za-z0-9_-]+)\s*\]+")
    current, seen, best = "", -1, None
    for number, line in enumerate(text.split("\n"), 1):
        if match := heading.match(line):
            current = match.group(1)
            seen += current == section
            if current == section and (seen == wanted or not keys):
                best = number if best is None or seen == wanted else best
        else:
            is_in_place = current == section and seen == wanted if current else not keys
            key = keys[0] if keys else section
            if is_in_place and re.match(rf"\s*{re.escape(key)}\s*=", line):
                return number
    return best
