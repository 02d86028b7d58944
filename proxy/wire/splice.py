"""A stream that died midway and the answer to the same question, asked again, as one stream.

`said` gathers what the client already has. A `Splice` takes the new answer's events and lets through what follows:

- *exact*: the new answer is the whole answer once more. It is held back while it repeats what was said, word for word
  in every member of the delta, and goes on from there; where it differs there is no going on (`Diverged`).
- *continuation*: what was said was given to the model as the beginning of its answer, without its trailing white space
  (`str.rstrip`), which some APIs refuse
  (https://docs.claude.com/en/docs/build-with-claude/prompt-engineering/prefill-claudes-response). The new text follows;
  a model that ignores the beginning and starts over is noticed.

The client must not see a seam: what goes out has the first answer's id and created and no second role, in normal form
(see wire/normal.py). `model` is the new answer's, and says who goes on.

What was sent is the reference, code point by code point. Half of a surrogate pair, which some upstreams send, stays as
it came; there the two answers must have been cut alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.wire.sse import data_event

# Characters. So much of an answer does not come twice by chance; "The " does.
_MIN_REPETITION = 32

# A list that says the same as `reasoning` beside it (https://openrouter.ai/docs/use-cases/reasoning-tokens).
_DETAILS = "reasoning_details"

# What a model thought before it answered.
_REASONING = ("reasoning_content", "reasoning", _DETAILS)


@dataclass(frozen=True, slots=True)
class Said:
    """What a client has of an answer: the text of each member of the deltas (content, reasoning, refusal, …)."""

    id: str
    created: int
    texts: Mapping[str, str]


class Diverged(Exception):
    """The new answer cannot follow what was said. What was let through before is right; the splice is of no more use."""


def said(segments: Iterable[bytes]) -> Said | None:
    """What a stream in normal form has said. `segments` hold whole events; those without a choice say nothing.

    None when no other answer can be joined to it: nothing of the answer was sent yet, or it has a finish reason, an
    error, a second choice, or a delta that is more than text (tool calls, audio, images, lists). Costs about 1 ms per
    300 chunks.
    """
    first: dict[str, Any] | None = None
    parts: dict[str, list[str]] = {}
    for segment in segments:
        for event in segment.split(b"\n\n"):
            if not event:
                continue
            chunk = _read(event)
            if chunk is None or chunk.get("error"):
                return None
            if chunk.get("choices") == []:
                continue
            choice = _only_choice(chunk)
            if choice is None or choice.get("finish_reason") is not None:
                return None
            if first is None:
                first = chunk
            for name, value in choice["delta"].items():
                if not value or name == "role" or (name == _DETAILS and choice["delta"].get("reasoning")):
                    continue
                if not isinstance(value, str):
                    return None
                parts.setdefault(name, []).append(value)
    if first is None or not isinstance(first.get("id"), str) or not isinstance(first.get("created"), int):
        return None
    return Said(first["id"], first["created"], {name: "".join(texts) for name, texts in parts.items()})


class Splice:
    """Joins one new answer to what was said.

    In a continuation the new answer's reasoning is dropped when content had begun; when there was none, it is let
    through, for no model can be given its own unfinished thoughts. Time is linear in the text; what a continuation
    holds back is at most as long as what was said.
    """

    __slots__ = (
        "_at",
        "_blank",
        "_blank_at",
        "_created",
        "_drops_reasoning",
        "_held",
        "_id",
        "_is_continuation",
        "_left",
        "_texts",
        "is_caught_up",
    )

    def __init__(self, said: Said, *, is_continuation: bool) -> None:
        self._id = said.id
        self._created = said.created
        self._is_continuation = is_continuation
        self._texts = said.texts
        """What is held back while it is repeated."""
        self._blank = ""
        """White space that was sent, but not given to the model, and so may come again."""
        self._blank_at = 0
        self._drops_reasoning = False
        self._held: list[dict[str, Any]] = []
        """The chunks of a continuation that may yet turn out to be a repetition."""
        if is_continuation:
            content = said.texts.get("content", "")
            given = content.rstrip()
            self._texts = {"content": given} if len(given) >= _MIN_REPETITION else {}
            self._blank = content[len(given) :]
            self._drops_reasoning = bool(content)
        self._at = dict.fromkeys(self._texts, 0)
        """How many characters of each text were repeated."""
        self._left = sum(map(len, self._texts.values()))
        """How many characters are still to be repeated, or may be; in a continuation 0 as soon as it is known for one."""
        self.is_caught_up = not is_continuation and not self._left
        """Whether all that was said has been repeated or, in a continuation, the new text has begun."""

    def feed(self, segment: bytes) -> bytes:
        """What is to be sent now that these events came; b"" while nothing is new. An error event passes as it came.

        `segment` holds whole events in normal form, without `[DONE]`. Raises Diverged when the new answer differs from
        what was said, ends before it has repeated it, has a second choice, or cannot be understood.
        """
        out: list[bytes] = []
        for event in segment.split(b"\n\n"):
            if not event:
                continue
            chunk = _read(event)
            if chunk is None:
                raise Diverged("an event cannot be understood")
            if chunk.get("error"):
                out.append(event + b"\n\n")
                continue
            if chunk.get("choices") == []:
                if self.is_caught_up:
                    out.append(self._event(chunk))
                continue
            choice = _only_choice(chunk)
            if choice is None:
                raise Diverged("an event is not about the one choice")
            choice["delta"].pop("role", None)
            if self._is_continuation:
                self._continue(chunk, choice, out)
            elif self.is_caught_up or self._repeat(choice):
                out.append(self._event(chunk))
        return b"".join(out)

    def _repeat(self, choice: dict[str, Any]) -> bool:
        """Take from the whole answer's choice what was said; whether it says anything beyond."""
        delta = choice["delta"]
        if delta.get("reasoning"):
            # They are about all of the text, of which a part may have been said.
            delta.pop(_DETAILS, None)
        beyond = {name: rest for name, value in delta.items() if (rest := self._beyond(name, value))}
        self.is_caught_up = not self._left
        if not beyond and choice.get("finish_reason") is None:
            return False
        if not self.is_caught_up:
            raise Diverged(f"{next(iter(beyond), 'the finish reason')} came before everything was repeated")
        _cut(choice, beyond)
        return True

    def _beyond(self, name: str, value: Any) -> Any:
        """What a member of a delta says beyond what was said of it. Diverged when it says something else."""
        text = self._texts.get(name)
        if text is None or not isinstance(value, str):
            return value
        at = self._at[name]
        count = min(len(value), len(text) - at)
        if not text.startswith(value[:count], at):
            raise Diverged(f"{name} differs from what was said, at character {at} or soon after")
        self._at[name] = at + count
        self._left -= count
        return value[count:]

    def _continue(self, chunk: dict[str, Any], choice: dict[str, Any], out: list[bytes]) -> None:
        """Append to `out` what a continuation says, or hold it back while it may be a repetition."""
        delta = choice["delta"]
        if self._drops_reasoning and any(delta.get(name) for name in _REASONING):
            delta = {name: value for name, value in delta.items() if name not in _REASONING}
            _cut(choice, delta)
            if not _says_anything(choice):
                return
        if not self.is_caught_up:
            if not _says_anything(choice):
                return
            if self._left and self._is_undecided(choice):
                self._held.append(chunk)
                return
            self._left = 0
            self.is_caught_up = True
            if not _says_anything(choice):
                # A repetition that ends where its delta ends.
                return
        out.extend(self._event(told) for told in (*self._held, chunk) if self._follow(told["choices"][0]))
        self._held.clear()

    def _is_undecided(self, choice: dict[str, Any]) -> bool:
        """Whether a continuation may still be a repetition. Once it is known for one, only what follows is kept of it."""
        delta = choice["delta"]
        try:
            beyond = {**delta, "content": self._beyond("content", delta.get("content"))}
        except Diverged:
            return False
        if self._left:
            return choice.get("finish_reason") is None and not any(beyond.values())
        self._held.clear()
        _cut(choice, beyond)
        return False

    def _follow(self, choice: dict[str, Any]) -> bool:
        """Take from the new text's beginning the white space that was sent already; whether the event is to be sent."""
        delta = choice["delta"]
        content = delta.get("content")
        blank, at = self._blank, self._blank_at
        if at == len(blank) or not content or not isinstance(content, str):
            return True
        count = 0
        while count < len(content) and at + count < len(blank) and content[count] == blank[at + count]:
            count += 1
        self._blank_at = at + count if count == len(content) else len(blank)
        if count:
            _cut(choice, {**delta, "content": content[count:]})
        return _says_anything(choice)

    def _event(self, chunk: dict[str, Any]) -> bytes:
        chunk["id"] = self._id
        chunk["created"] = self._created
        return data_event(_written(chunk))


def _says_anything(choice: dict[str, Any]) -> bool:
    return choice.get("finish_reason") is not None or any(choice["delta"].values())


def _cut(choice: dict[str, Any], delta: dict[str, Any]) -> None:
    """Replace a choice's delta by what is left of it. The log probabilities are those of all tokens it had."""
    choice["delta"] = delta
    if "logprobs" in choice:
        choice["logprobs"] = None


def _only_choice(chunk: dict[str, Any]) -> dict[str, Any] | None:
    """The chunk's choice, when it has exactly one, with index 0 and a delta."""
    match chunk.get("choices"):
        case [{"index": 0, "delta": dict()}]:
            choice: dict[str, Any] = chunk["choices"][0]
            return choice
    return None


def _read(event: bytes) -> dict[str, Any] | None:
    """The chunk of an event in normal form. Unlike `encoding.loads` it leaves lone surrogates as they are."""
    if not event.startswith(b"data: "):
        return None
    data = event[6:]
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            chunk = json.loads(data.decode())
        except (ValueError, RecursionError):
            return None
    return chunk if isinstance(chunk, dict) else None


def _written(chunk: dict[str, Any]) -> bytes:
    """The chunk as JSON, with what orjson refuses to write (lone surrogates) escaped, as it must have come."""
    try:
        return orjson.dumps(chunk)
    except orjson.JSONEncodeError:
        try:
            return json.dumps(chunk, separators=(",", ":"), allow_nan=False).encode()
        except (ValueError, RecursionError):
            raise Diverged("an event cannot be written") from None
