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
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast
from urllib.parse import urlsplit

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from proxy.addresses import environment_proxy, is_base_url, is_loopback, wrong_with_proxy
from proxy.chat import Recovery
from proxy.errors import ConfigError

_ENV_PREFIX = "HEADWATER_"
_MAX_SOCKET_PATH_BYTES = 107  # unix(7): sun_path has 108, with the zero at its end

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
SecondsOrOff = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]

_KeyPath = tuple[str | int, ...]
"""Where a value stands: `("model", 0, "targets", 1, "weight")`."""


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
    circuit_failures: Annotated[int, Field(ge=1)] = 5
    circuit_cooldown_s: Seconds = 10
    recovery: Recovery = "exact"
    recovery_timeout_s: Seconds = 30
    coalesce: bool = True
    coalesce_max_temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2
    resume_window_s: SecondsOrOff = 0
    resume_max_mb: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 256
    max_answer_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class UpstreamSettings(_Section):
    """One upstream. `prefill` says how it is made to go on with an answer that it, or another one, has begun.

    `auto`: the beginning as the last message, an assistant's, which llama.cpp goes on with
    (https://github.com/ggml-org/llama.cpp/pull/13608) and Claude refuses since 4.6
    (https://platform.claude.com/docs/en/about-claude/models/whats-new-claude-4-6#prefill-removal).

    `prefix`: this message with `"prefix": true`. Mistral refuses it otherwise, and begins its answer with that very
    beginning (https://docs.mistral.ai/guides/prefix, https://docs.mistral.ai/api); DeepSeek wants its base URL to end
    in /beta for it (https://api-docs.deepseek.com/guides/chat_prefix_completion).

    `continue_final_message`: the body with `"continue_final_message": true, "add_generation_prompt": false`. Without
    these vLLM and SGLang refuse nothing, but take the message for a whole one and begin another; vLLM does not take
    the first alone, as the second is true by default
    (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html,
    https://github.com/vllm-project/vllm/pull/8942, https://github.com/sgl-project/sglang/pull/4226).
    """

    name: Name
    base_url: str = field(repr=False)
    dialect: Literal["openai"] = "openai"
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    api_key_file: Path | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    stream: Literal["auto", "always", "never"] = "auto"
    prefill: Literal["auto", "prefix", "continue_final_message", "never"] = "auto"
    proxy: Annotated[str, Field(min_length=1)] | None = field(default=None, repr=False)
    unix_socket: Path | None = None
    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None


@dataclass(frozen=True, slots=True)
class TargetSettings(_Section):
    """One of the targets of a model: `target` is written upstream/model. A plain string stands for one without the rest."""

    target: str
    weight: Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)] | None = None
    context_tokens: Annotated[int, Field(gt=0)] | None = None


def _as_target(value: Any) -> Any:
    """What stands for a target, as a table."""
    if isinstance(value, str):
        return {"target": value}
    if not isinstance(value, dict | TargetSettings):
        raise PydanticCustomError("target", 'must be "upstream/model", or a table with that as its target')
    return value


@dataclass(frozen=True, slots=True)
class ModelSettings(_Section):
    """An alias. Where `recovery` or `coalesce` is None, it is as [streaming] says."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    targets: Annotated[tuple[Annotated[TargetSettings, BeforeValidator(_as_target)], ...], Field(min_length=1)]
    recovery: Recovery | None = None
    delivery: Literal["stream", "whole"] = "stream"
    coalesce: bool | None = None


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

_TABLES: Mapping[tuple[str, ...], type] = {
    (): Settings,
    ("server",): ServerSettings,
    ("store",): StoreSettings,
    ("streaming",): StreamingSettings,
}
_LISTS_OF_TABLES: Mapping[tuple[str, ...], type] = {
    ("upstream",): UpstreamSettings,
    ("model",): ModelSettings,
    ("model", "targets"): TargetSettings,
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


def matches(pattern: str, model: str) -> bool:
    """Whether a model's name fits a pattern of `models`: `*` any text, `?` any character, case counts."""
    return fnmatchcase(model, pattern)


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
        required = {known.name for known in fields(table) if known.default is known.default_factory is MISSING}
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
