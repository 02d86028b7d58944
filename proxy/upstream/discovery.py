"""What to put the proxy in front of, when nobody said: provider keys in the environment, then servers on this machine.

The ports are the ones those programs listen on by default: Ollama 11434
(https://docs.ollama.com/faq), LM Studio 1234 (https://lmstudio.ai/docs/app/api), llama.cpp's server 8080
(https://github.com/ggml-org/llama.cpp/tree/master/tools/server), vLLM 8000
(https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

import aiohttp

from proxy.settings import UpstreamSettings
from proxy.wire.encoding import loads

_PATIENCE_S = 0.3


class _Provider(NamedTuple):
    name: str
    base_url: str
    api_key_env: str


PROVIDERS = (
    _Provider("openai", "https://api.openai.com/v1", "OPENAI_API_KEY"),
    _Provider("openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    _Provider("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    _Provider("mistral", "https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    _Provider("deepseek", "https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    _Provider("together", "https://api.together.xyz/v1", "TOGETHER_API_KEY"),
    _Provider("xai", "https://api.x.ai/v1", "XAI_API_KEY"),
)

LOCAL_SERVERS = (("ollama", 11434), ("lmstudio", 1234), ("llamacpp", 8080), ("vllm", 8000))


def in_environment(environ: Mapping[str, str]) -> tuple[UpstreamSettings, ...]:
    """An upstream for every provider whose key is in the environment."""
    return tuple(
        UpstreamSettings(name=provider.name, base_url=provider.base_url, api_key_env=provider.api_key_env)
        for provider in PROVIDERS
        if environ.get(provider.api_key_env, "").strip()
    )


def from_url(url: str, environ: Mapping[str, str]) -> UpstreamSettings:
    """The upstream at `url`; where that is a known provider, with its key from the environment."""
    for provider in PROVIDERS:
        if url.rstrip("/") == provider.base_url:
            key = provider.api_key_env if environ.get(provider.api_key_env, "").strip() else None
            return UpstreamSettings(name=provider.name, base_url=provider.base_url, api_key_env=key)
    return UpstreamSettings(name="default", base_url=url.rstrip("/"))


async def on_this_machine(own_port: int) -> tuple[UpstreamSettings, ...]:
    """An upstream for every OpenAI-compatible server that answers on its usual port, within 0.3 s."""
    timeout = aiohttp.ClientTimeout(total=_PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        candidates = [(name, port) for name, port in LOCAL_SERVERS if port != own_port]
        found = await asyncio.gather(*(_lists_models(session, port) for _, port in candidates))
    return tuple(
        UpstreamSettings(name=name, base_url=f"http://127.0.0.1:{port}/v1")
        for (name, port), is_there in zip(candidates, found, strict=True)
        if is_there
    )


async def _lists_models(session: aiohttp.ClientSession, port: int) -> bool:
    try:
        async with session.get(f"http://127.0.0.1:{port}/v1/models", allow_redirects=False) as response:
            value = loads(await response.read())
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return False
    return response.status == 200 and isinstance(value, dict) and isinstance(value.get("data"), list)
