"""The config file and the environment, as frozen objects.

`load` reads TOML (`config/headwater.toml` documents every field), lets `HEADWATER_<SECTION>__<FIELD>` override it, and
reports every problem at once: file, line, key path, and the nearest known key. To add a field: add it to its
dataclass here with its default, and to the reference file with what it does, its unit, and when not to use it.
"""

from __future__ import annotations

import copy
import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from proxy.errors import ConfigError

_ENV_PREFIX = "HEADWATER_"
_MAX_SOCKET_PATH_BYTES = 107  # unix(7): sun_path has 108, with the zero at its end

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
SecondsOrOff = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class _Section:
    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", str_strip_whitespace=True)


@dataclass(frozen=True, slots=True)
class ServerSettings(_Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8100
    max_body_mb: Annotated[float, Field(gt=0, le=1024)] = 32
    drain_s: SecondsOrOff = 30
    cors_origins: tuple[str, ...] = ()
    access_log: bool = True
    log_format: Literal["text", "json"] = "text"


@dataclass(frozen=True, slots=True)
class StoreSettings(_Section):
    path: Path = Path("var/headwater.db")


@dataclass(frozen=True, slots=True)
class StreamingSettings(_Section):
    force_non_streaming: bool = False
    enable_fallback: bool = True
    detection_cache_s: SecondsOrOff = 300
    heartbeat_interval_s: SecondsOrOff = 15
    connect_timeout_s: Seconds = 5
    first_token_timeout_s: Seconds = 30
    idle_timeout_s: Seconds = 60
    whole_answer_timeout_s: Seconds = 600
    total_timeout_s: SecondsOrOff = 0
    send_timeout_s: Seconds = 300
    max_retries: Annotated[int, Field(ge=0, le=20)] = 3
    max_answer_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class UpstreamSettings(_Section):
    name: Name
    base_url: str = field(repr=False)
    dialect: Literal["openai"] = "openai"
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    api_key_file: Path | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    stream: Literal["auto", "always", "never"] = "auto"
    proxy: Annotated[str, Field(min_length=1)] | None = field(default=None, repr=False)
    unix_socket: Path | None = None
    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None


@dataclass(frozen=True, slots=True)
class ModelSettings(_Section):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    targets: Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Settings(_Section):
    """Everything the proxy is told. `secrets` maps an upstream's name to its API key, `proxies` to the URL of the outgoing
    proxy its connections go through, whoever named that; neither is ever printed."""

    server: ServerSettings = field(default_factory=ServerSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    streaming: StreamingSettings = field(default_factory=StreamingSettings)
    upstream: tuple[UpstreamSettings, ...] = ()
    model: tuple[ModelSettings, ...] = ()
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    proxies: Mapping[str, str] = field(default_factory=dict, repr=False)


_NOT_IN_FILES = {
    "secrets": "name an environment variable in api_key_env instead",
    "proxies": "set `proxy` of an upstream instead",
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
    for is_last_try in (False, True):
        try:
            settings = _adapter.validate_python(data)
            break
        except ValidationError as error:
            if is_last_try:
                raise ConfigError(problems) from None
            for problem in error.errors(include_url=False, include_context=False):
                words = _in_words(problem, problem["loc"])
                if (name := overridden.get(problem["loc"][:2])) is not None:
                    problems.append(f"environment variable {name}: {words}")
                else:
                    problems.append(_at(path, text, problem["loc"], words))
            # What is left when the wrong values are taken out may contradict itself too: that is told as well.
            data = _without(data, [problem["loc"] for problem in error.errors(include_url=False)])
    for key_path, words in _contradictions(settings):
        name = overridden.get(key_path[:2])
        problems.append(f"environment variable {name}: {words}" if name else _at(path, text, key_path, words))
    secrets: dict[str, str] = {}
    for position, upstream in enumerate(settings.upstream):
        try:
            if (secret := _secret(upstream, environ)) is not None:
                secrets[upstream.name] = secret
        except ConfigError as error:
            problems.append(_at(path, text, ("upstream", position), error.problems[0]))
    proxies = _proxies(settings.upstream, environ, problems)
    if problems:
        raise ConfigError(problems)
    return _with(settings, secrets=secrets, proxies=proxies)


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


def with_server(settings: Settings, **changes: Any) -> Settings:
    """The settings with some of the server's fields changed, as from the command line."""
    changed = _with(settings, server=_with(settings.server, **changes))
    problems = [_at(None, "", key_path, words) for key_path, words in _contradictions(changed)]
    if problems:
        raise ConfigError(problems)
    return changed


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def matches(pattern: str, model: str) -> bool:
    """Whether a model's name fits a pattern of `models`: `*` any text, `?` any character, case counts."""
    return fnmatchcase(model, pattern)


def redact_url(url: str) -> str:
    """The URL without the credentials and query it may carry, for people to read."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _with(section: _S, **changes: Any) -> _S:
    values = {known.name: getattr(section, known.name) for known in fields(cast(Any, section))}
    return type(section)(**(values | changes))


def _override(
    data: dict[str, Any], environ: Mapping[str, str], problems: list[str]
) -> dict[tuple[str | int, ...], str]:
    """Put the environment's values into `data`; says which variable each key came from."""
    sections: dict[str, type] = {"server": ServerSettings, "store": StoreSettings, "streaming": StreamingSettings}
    overridden: dict[tuple[str | int, ...], str] = {}

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


def _without(data: dict[str, Any], key_paths: list[tuple[str | int, ...]]) -> dict[str, Any]:
    """The data without the values at `key_paths`, or without the list item in which a required value is missing."""
    pruned = copy.deepcopy(data)
    lost_items: dict[str, set[int]] = {}
    for key_path in key_paths:
        place: Any = pruned
        for part in key_path[:-1]:
            place = place[cast(Any, part)] if isinstance(place, list) or part in place else {}
        if isinstance(place, dict) and key_path[-1] in place:
            del place[key_path[-1]]
        if len(key_path) > 1 and isinstance(key_path[1], int):
            required = {"name", "base_url", "targets"}
            if len(key_path) == 2 or key_path[2] in required:
                lost_items.setdefault(str(key_path[0]), set()).add(key_path[1])
    for section, positions in lost_items.items():
        pruned[section] = [item for position, item in enumerate(pruned[section]) if position not in positions]
    return pruned


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


def _proxies(
    upstreams: tuple[UpstreamSettings, ...], environ: Mapping[str, str], problems: list[str]
) -> dict[str, str]:
    """The URL of the outgoing proxy of each upstream that has one: its own `proxy`, or the one the environment names.

    Of a variable's two spellings the lower-case one counts first, and ALL_PROXY comes last, as in curl
    (https://curl.se/docs/manpage.html#ENVIRONMENT). A proxy that only the environment names is never used for this
    machine itself, as in Go (https://pkg.go.dev/golang.org/x/net/http/httpproxy#Config.ProxyFunc).
    """
    found: dict[str, str] = {}
    for upstream in upstreams:
        if upstream.proxy is not None:
            if upstream.proxy != "none":
                found[upstream.name] = upstream.proxy
            continue
        if upstream.unix_socket is not None or not _is_base_url(upstream.base_url):
            continue
        url = urlsplit(upstream.base_url)
        host = (url.hostname or "").rstrip(".")
        names = (f"{url.scheme}_proxy", f"{url.scheme}_PROXY".upper(), "all_proxy", "ALL_PROXY")
        name = next((name for name in names if environ.get(name, "").strip()), None)
        if name is None or is_loopback(host):
            continue
        port = url.port or (443 if url.scheme == "https" else 80)
        if _is_excepted(host, port, environ.get("no_proxy") or environ.get("NO_PROXY") or ""):
            continue
        proxy = environ[name].strip()
        # curl and Go read a bare host:port as http:// too.
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        found[upstream.name] = proxy
        if (words := _wrong_with_proxy(proxy)) is not None:
            problem = f"environment variable {name}: {words}"
            # It is one mistake, however many upstreams it concerns.
            if problem not in problems:
                problems.append(problem)
    return found


def _is_excepted(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY takes a host out: `*`, an address, a network in CIDR notation, or a name, which stands for all
    names below it too, whether `.` or `*.` comes before it or not. With a port it is about that port only.

    The forms are those of https://pkg.go.dev/golang.org/x/net/http/httpproxy#Config; that a leading dot makes no
    difference is curl's reading (https://github.com/curl/curl/blob/master/lib/noproxy.c). What is neither is passed over.
    """
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        match = re.fullmatch(r"(\[[^\]]*\]|[^:]*):(\d+)", entry)
        name = match[1] if match else entry
        if not name or (match and int(match[2]) != port):
            continue
        if name == "*":
            return True
        if address is None:
            name = name.removeprefix("*").strip(".")
            if name and (host == name or host.endswith(f".{name}")):
                return True
            continue
        try:
            if address in ip_network(name.strip("[]"), strict=False):
                return True
        except ValueError:
            continue
    return False


def _wrong_with_proxy(url: str) -> str | None:
    """What keeps a URL from being an outgoing proxy's, in words that do not repeat it: it may hold a password."""
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.scheme and parts.hostname) and parts.port != 0
    except ValueError:
        return "must be a URL like http://proxy.example.com:3128"
    if is_whole and parts.scheme not in ("http", "https"):
        return f"proxies of the kind {parts.scheme}:// are not supported: only http:// and https:// ones are"
    if not is_whole or parts.path not in ("", "/") or parts.query or parts.fragment:
        return "must be a URL like http://proxy.example.com:3128"
    return None


def _contradictions(settings: Settings) -> list[tuple[tuple[str | int, ...], str]]:
    """What is well-formed but cannot work."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    if not is_loopback(settings.server.host):
        found.append(
            (
                ("server", "host"),
                f"'{settings.server.host}' can be reached from other machines, and callers are not authenticated: "
                "listen on 127.0.0.1 and put nginx or Caddy in front",
            )
        )
    names = [upstream.name for upstream in settings.upstream]
    for position, upstream in enumerate(settings.upstream):
        if upstream.name in names[:position]:
            found.append((("upstream", position, "name"), f"another upstream is named '{upstream.name}' already"))
        if not _is_base_url(upstream.base_url):
            found.append((("upstream", position, "base_url"), "must be a URL like https://api.openai.com/v1"))
        if upstream.api_key_env and upstream.api_key_file:
            found.append((("upstream", position), "has both api_key_env and api_key_file: keep one"))
        found += [(("upstream", position, *key), words) for key, words in _wrong_ways(upstream)]
    aliases = [model.name for model in settings.model]
    for position, model in enumerate(settings.model):
        if model.name in aliases[:position]:
            found.append((("model", position, "name"), f"another model is named '{model.name}' already"))
        for target in model.targets:
            upstream_name, slash, upstream_model = target.partition("/")
            if not slash or not upstream_model:
                found.append((("model", position, "targets"), f"'{target}' must be written upstream/model"))
            elif settings.upstream and upstream_name not in names:
                words = f"'{target}': no upstream is named '{upstream_name}'{_nearest(upstream_name, names)}"
                found.append((("model", position, "targets"), words))
    return found


def _wrong_ways(upstream: UpstreamSettings) -> list[tuple[tuple[str, ...], str]]:
    """What cannot work in the way to an upstream."""
    found: list[tuple[tuple[str, ...], str]] = []
    if upstream.proxy not in (None, "none"):
        if upstream.unix_socket is not None:
            found.append(((), "has both proxy and unix_socket: keep one"))
        if (words := _wrong_with_proxy(upstream.proxy or "")) is not None:
            found.append((("proxy",), f'{words}, or "none"'))
    if upstream.unix_socket is not None and len(bytes(upstream.unix_socket)) > _MAX_SOCKET_PATH_BYTES:
        found.append((("unix_socket",), f"is longer than a socket's path can be, {_MAX_SOCKET_PATH_BYTES} bytes"))
    if upstream.client_key_file is not None and upstream.client_cert_file is None:
        found.append((("client_key_file",), "is of no use without client_cert_file"))
    if _is_base_url(upstream.base_url) and urlsplit(upstream.base_url).scheme == "http":
        found += [
            ((name,), "is of no use with a base_url of http://, where nothing is encrypted")
            for name in ("ca_file", "client_cert_file", "client_key_file")
            if getattr(upstream, name) is not None
        ]
    return found


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        return is_whole and not parts.query and not parts.fragment
    except ValueError:
        return False


def _in_words(problem: Any, key_path: tuple[str | int, ...]) -> str:
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key{_nearest(str(key_path[-1]), _known_keys(key_path[:-1]))}"
    message = str(problem["msg"])
    return message[0].lower() + message[1:]


def _known_keys(key_path: tuple[str | int, ...]) -> list[str]:
    """The names of the fields at a place in the settings."""
    place: Any = Settings
    of_list = {"upstream": UpstreamSettings, "model": ModelSettings}
    of_table = {"server": ServerSettings, "store": StoreSettings, "streaming": StreamingSettings}
    if key_path:
        place = (of_list | of_table).get(str(key_path[0]), Settings)
    return [known.name for known in fields(cast(Any, place)) if known.name not in _NOT_IN_FILES]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _at(path: Path | None, text: str, key_path: tuple[str | int, ...], words: str) -> str:
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key_path).lstrip(".")
    if path is None:
        return f"{dotted}: {words}"
    line = _line_of(text, key_path)
    return f"{path}{f':{line}' if line else ''}: {dotted}: {words}"


def _line_of(text: str, key_path: tuple[str | int, ...]) -> int | None:
    """The line that holds a key, or else its table's heading: for plain `[table]`, `[[array]]`, `key = value` lines."""
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
