"""What the proxy is told, as frozen objects; proxy/config.py reads them from the config file and the environment.

To add a field: add it to its dataclass here with its default, and to the reference file (`config/headwater.toml`) with what
it does, its unit, and when not to use it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from proxy.chat import CacheTier, Recovery

_MAX_PACE = 1_000_000


def _no_boolean(value: Any) -> Any:
    """Anything but true and false, which would be taken for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "must be a number")
    return value


IsNumber = BeforeValidator(_no_boolean)

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False), IsNumber]
SecondsOrOff = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False), IsNumber]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
UsdPerMillion = Annotated[Decimal, Field(ge=0, le=10_000, decimal_places=6)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


def _as_path(value: Any) -> Any:
    """The path that a text names. An empty one would be the directory the command is run in."""
    if isinstance(value, Path):
        return value
    if isinstance(value, str) and (text := value.strip()) and "\0" not in text:
        return Path(text)
    raise PydanticCustomError("path", "must be a path")


FilePath = Annotated[Path, BeforeValidator(_as_path)]


class _Section:
    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", str_strip_whitespace=True)


@dataclass(frozen=True, slots=True)
class ServerSettings(_Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535), IsNumber] = 8100
    max_body_mb: Annotated[float, Field(gt=0, le=1024), IsNumber] = 32
    drain_s: SecondsOrOff = 30
    cors_origins: tuple[str, ...] = ()
    access_log: bool = True
    log_format: Literal["text", "json"] = "text"


@dataclass(frozen=True, slots=True)
class AuthSettings(_Section):
    """`open`: whoever reaches the port is served. `keys`: who presents a virtual key is."""

    mode: Literal["open", "keys"] = "open"
    admin_key_env: Variable = "HEADWATER_ADMIN_KEY"
    key_secret_env: Variable = "HEADWATER_KEY_SECRET"


@dataclass(frozen=True, slots=True)
class StoreSettings(_Section):
    path: FilePath = Path("var/headwater.db")

    @property
    def cache_path(self) -> Path:
        """The file of the cached answers, beside the other."""
        return self.path.with_name(f"{self.path.stem}-cache{self.path.suffix}")

    @property
    def key_secret_path(self) -> Path:
        """The file of the secret by which virtual keys are hashed, where the environment holds none."""
        return self.path.with_name(f"{self.path.stem}-keys.secret")


@dataclass(frozen=True, slots=True)
class LedgerSettings(_Section):
    """`calls`: of which calls a row is written: of all, or of those that somebody pays for.

    `content`: what is kept of prompts and answers: nothing, a hash of each, or all of it."""

    calls: Literal["all", "paid"] = "all"
    keep_calls_days: Annotated[float, Field(ge=0, le=36_500, allow_inf_nan=False), IsNumber] = 0
    job_timeout_h: Annotated[float, Field(ge=0, le=87_600, allow_inf_nan=False), IsNumber] = 24
    content: Literal["off", "hash", "full"] = "off"
    content_keys_env: Variable = "HEADWATER_CONTENT_KEYS"


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
    max_retries: Annotated[int, Field(ge=0, le=20), IsNumber] = 3
    circuit_failures: Annotated[int, Field(ge=1), IsNumber] = 5
    circuit_cooldown_s: Seconds = 10
    recovery: Recovery = "exact"
    recovery_timeout_s: Seconds = 30
    coalesce: bool = True
    coalesce_max_temperature: Annotated[float, Field(ge=0, allow_inf_nan=False), IsNumber] = 2
    resume_window_s: SecondsOrOff = 0
    resume_max_mb: Annotated[float, Field(gt=0, allow_inf_nan=False), IsNumber] = 256
    max_answer_bytes: Annotated[int, Field(ge=1024), IsNumber] = 64 * 1024 * 1024


def _as_pace(value: Any) -> Any:
    """How fast an answer from the cache is said: a word, or pieces a second."""
    if value in ("none", "recorded"):
        return value
    try:
        if 0 < (number := float(value)) <= _MAX_PACE and not isinstance(value, bool):
            return number
    except (TypeError, ValueError):
        pass
    raise PydanticCustomError("pace", f'must be "none", "recorded", or a number of pieces a second, up to {_MAX_PACE}')


@dataclass(frozen=True, slots=True)
class CacheSettings(_Section):
    exact: bool = True
    semantic: bool = True
    ttl_s: Annotated[float, Field(ge=0, allow_inf_nan=False), IsNumber] = 86_400
    max_entries: Annotated[int, Field(ge=1, le=10_000_000), IsNumber] = 100_000
    max_mb: Annotated[float, Field(gt=0, allow_inf_nan=False), IsNumber] = 1024
    memory_mb: Annotated[float, Field(ge=0, allow_inf_nan=False), IsNumber] = 64
    max_temperature: Annotated[float, Field(ge=0, allow_inf_nan=False), IsNumber] = 2
    pace: Annotated[Literal["none", "recorded"] | float, BeforeValidator(_as_pace)] = "none"
    embedder: str = "minilm"
    max_error_rate: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False), IsNumber] = 0.02
    verify_rate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), IsNumber] = 0.02
    lookup_budget_ms: Annotated[float, Field(ge=0, le=60_000, allow_inf_nan=False), IsNumber] = 100
    semantic_max_turns: Annotated[int, Field(ge=1, le=1000), IsNumber] = 1
    semantic_max_characters: Annotated[int, Field(ge=1, le=8_000), IsNumber] = 1000


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
    api_key_env: Variable | None = None
    api_key_file: FilePath | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    stream: Literal["auto", "always", "never"] = "auto"
    prefill: Literal["auto", "prefix", "continue_final_message", "never"] = "auto"
    proxy: Annotated[str, Field(min_length=1)] | None = field(default=None, repr=False)
    unix_socket: FilePath | None = None
    ca_file: FilePath | None = None
    client_cert_file: FilePath | None = None
    client_key_file: FilePath | None = None


@dataclass(frozen=True, slots=True)
class TargetSettings(_Section):
    """One of the targets of a model: `target` is written upstream/model. A plain string stands for one without the rest."""

    target: str
    weight: Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False), IsNumber] | None = None
    context_tokens: Annotated[int, Field(gt=0), IsNumber] | None = None


def _as_target(value: Any) -> Any:
    """What stands for a target, as a table."""
    if isinstance(value, str):
        return {"target": value}
    if not isinstance(value, dict | TargetSettings):
        raise PydanticCustomError("target", 'must be "upstream/model", or a table with that as its target')
    return value


@dataclass(frozen=True, slots=True)
class ModelSettings(_Section):
    """An alias. Where `recovery` or `coalesce` is None, it is as [streaming] says; `cache` and `cache_ttl_s`, as [cache] does."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    targets: Annotated[tuple[Annotated[TargetSettings, BeforeValidator(_as_target)], ...], Field(min_length=1)]
    recovery: Recovery | None = None
    delivery: Literal["stream", "whole"] = "stream"
    coalesce: bool | None = None
    cache: CacheTier | None = None
    cache_ttl_s: Annotated[float, Field(ge=0, allow_inf_nan=False), IsNumber] | None = None


@dataclass(frozen=True, slots=True)
class PriceSettings(_Section):
    """What some models cost, and what is charged for them. None: as a later entry says, or else as is publicly known.

    Prices are US dollars for a million tokens. `models` are patterns of `matches`, for a model's name at its upstream or for
    `upstream/model`.
    """

    models: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    input_usd_per_million: UsdPerMillion | None = None
    output_usd_per_million: UsdPerMillion | None = None
    cached_input_usd_per_million: UsdPerMillion | None = None
    markup_percent: Annotated[Decimal, Field(ge=0, le=1000, decimal_places=4)] | None = None


@dataclass(frozen=True, slots=True)
class ContentKey:
    """A key by which stored prompts and answers are sealed, 32 bytes. What is sealed with it bears its version."""

    version: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Settings(_Section):
    """Everything the proxy is told. `secrets` maps an upstream's name to its API key, `proxies` to the URL of the outgoing
    proxy its connections go through, whoever named that; `admin_key` and `key_secret` are what the environment holds
    under the names in [auth]; `content_keys` are those under the name in [ledger], of which the first is for writing, and all
    are for reading. None of these is ever printed."""

    server: ServerSettings = field(default_factory=ServerSettings)
    auth: AuthSettings = field(default_factory=AuthSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    ledger: LedgerSettings = field(default_factory=LedgerSettings)
    streaming: StreamingSettings = field(default_factory=StreamingSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    upstream: tuple[UpstreamSettings, ...] = ()
    model: tuple[ModelSettings, ...] = ()
    price: tuple[PriceSettings, ...] = ()
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    proxies: Mapping[str, str] = field(default_factory=dict, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    key_secret: str | None = field(default=None, repr=False)
    content_keys: tuple[ContentKey, ...] = field(default=(), repr=False)

    @property
    def cache_tiers(self) -> frozenset[str]:
        """Which of "exact" and "semantic" some model's answers are cached by."""
        cache = self.cache
        tiers = {cache.exact and "exact", cache.semantic and "semantic", *(model.cache for model in self.model)}
        return frozenset({"exact", "semantic"} & tiers)


def matches(pattern: str, model: str) -> bool:
    """Whether a model's name fits a pattern of `models`: `*` any text, `?` any character, case counts."""
    return fnmatchcase(model, pattern)


def wrong_with_embedder(setting: str) -> str | None:
    """What is wrong with the name of an embedder in the settings; None when nothing is. Looks at nothing but the name."""
    kind, _, rest = setting.partition(":")
    match kind:
        case "minilm" if kind == setting:
            return None
        case "onnx" if rest:
            return None
        case "upstream" if all(rest.partition("/")):
            return None
    return (
        f"'{setting}' is no embedder: it is 'minilm', 'onnx:' and a file, or 'upstream:' and a target (upstream/model)"
    )


# A version is a number that SQLite and people can write; 32 bytes are 44 characters of base64 (RFC 4648 §4).
_CONTENT_KEY = re.compile(r"(?P<version>[1-9][0-9]{0,8}):(?P<secret>[A-Za-z0-9+/]{43}=)")


def parse_content_keys(text: str) -> tuple[ContentKey, ...]:
    """The keys in a text like `2:BASE64,1:BASE64`, in that order. ValueError says what is wrong, and nothing of a key."""
    keys: dict[int, ContentKey] = {}
    for position, part in enumerate(text.split(","), 1):
        match = _CONTENT_KEY.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"its part {position} is not a version, a colon and 32 bytes in base64")
        version = int(match["version"])
        if version in keys:
            raise ValueError(f"it holds version {version} twice")
        try:
            secret = base64.b64decode(match["secret"], validate=True)
        except binascii.Error:
            raise ValueError(f"its part {position} is not base64") from None
        keys[version] = ContentKey(version, secret)
    return tuple(keys.values())
