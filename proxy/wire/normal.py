"""Two lanes from what an upstream streams to the form that every client can read.

*Normal form* of a chat stream: every event is one line `data: ` + JSON + blank line, with no `id`, `event` or `retry`
line and no comment in it; `id`, `object`, `created`, `model`, `choices` with `index` are present; the role stands in
the first delta of each choice and nowhere else; a tool call's id and name are said once and its index is its own;
usage is there only when asked for, and last. The closing `[DONE]` is not this module's business: it is sent by whoever
knows that the answer is whole.

The *fast lane* recognises an event without parsing it. Upstreams send hundreds of events that differ in one string:
once an event was parsed and found normal, its bytes before and behind that string are a `Lane`, and any event that
has them is normal too and goes out as the very bytes that came in. Every other event takes the *slow lane*:
parsed, mended, encoded again (and, if nothing was mended, also passed on as it came).

What is mended, and who sends it so:
- a missing or empty id or model, and `choices: []` before them: Azure's first event, which carries the prompt's
  content-filter results (https://github.com/langfuse/langfuse/issues/2833);
- a choice with no delta: Azure's late content-filter event (https://github.com/langchain-ai/langchain/issues/18977);
- a role in every delta: Ollama (https://github.com/ollama/ollama/issues/7626); the official SDK adds the strings up;
- tool calls without an index, all on index 0, or with arguments on another index than their head
  (https://github.com/ai-dynamo/dynamo/issues/4723); `tool_calls: []` (https://github.com/vercel/ai/issues/20537);
- usage on every chunk, cumulative (https://github.com/tensorzero/tensorzero/issues/5481): the largest counts, the last
  place is its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from proxy.chat import Usage
from proxy.wire.encoding import dumps, loads
from proxy.wire.lane import Lane, is_utf8, string_rest
from proxy.wire.sse import EventSplitter, data_event, parse_event
from proxy.wire.usage import read_usage

_MAX_LANES = 4
_MAX_DONE_BYTES = 32
# An upstream whose every event differs (a new id each time) is not worth learning from.
_PATIENCE = 64

_text_member = re.compile(rb'"(?:content|reasoning_content|reasoning|arguments)": ?"')


@dataclass(slots=True)
class _ChoiceState:
    """What was already said of one choice."""

    has_role: bool = False
    is_finished: bool = False
    has_content: bool = False
    call_ids: dict[str, int] = field(default_factory=dict)  # id -> index sent down
    call_names: dict[int, str] = field(default_factory=dict)  # index sent down -> name
    call_routes: dict[int, int] = field(default_factory=dict)  # index as it came -> index sent down
    last_call: int = -1


@dataclass(frozen=True, slots=True)
class Expected:
    """What a stream is read with: what the client asked for, and what to fill in where the upstream is silent."""

    fallback_id: str
    created: int
    model: str
    choices: int = 1
    wants_running_usage: bool = False


class Normalizer:
    """Turns the bytes of one upstream's chat stream into events in normal form.

    Feed it reads; it returns the bytes to send down, whole events only. What it saw stands in its attributes.
    Raises EventTooLarge when one event outgrows `max_event_bytes`.
    """

    __slots__ = (
        "_choices",
        "_created",
        "_expected",
        "_finished",
        "_id",
        "_lanes",
        "_learned",
        "_model",
        "_parsed",
        "_silent",
        "_splitter",
        "_usage_at",
        "_usage_chunk",
        "_waiting",
        "error",
        "finish_reason",
        "is_done",
        "is_ending",
        "is_finished",
        "is_meaningful",
        "lane",
        "malformed",
        "usage",
    )

    def __init__(self, expected: Expected, max_event_bytes: int) -> None:
        self._expected = expected
        self._splitter = EventSplitter(max_event_bytes)
        self._lanes: list[Lane] = []
        self.lane: Lane | None = None
        """What a whole read may be checked with, instead of being fed: only where the next byte begins an event."""
        self._learned = 0
        self._choices: dict[int, _ChoiceState] = {}
        self._finished = 0
        self._waiting: list[dict[str, Any]] = []
        self._id: str | None = None
        self._created: int | None = None
        self._model: str | None = None
        self._usage_chunk: dict[str, Any] | None = None
        self._usage_at = 0
        self.usage: Usage | None = None
        """What the upstream said last, or most."""
        self.finish_reason: str | None = None
        """Why it ended, as the first choice that did says."""
        self.error: dict[str, Any] | None = None
        """The data of an error event: nothing after it is read."""
        self.malformed = 0
        self._parsed = 0
        self._silent = 0
        self.is_ending = False
        """Whether one of `error`, `is_done` and `is_finished` is so."""
        self.is_done = False
        self.is_finished = False
        """Whether every choice that is expected, or has begun, has its finish reason."""
        self.is_meaningful = False
        """Whether anything was seen that a reader of the answer would miss: text, reasoning, a call, an end."""

    @property
    def id(self) -> str:
        """The answer's id, as its events have it; known from the first one that is sent."""
        return self._id or self._expected.fallback_id

    @property
    def model(self) -> str | None:
        """How the upstream calls the model; None where it has not said."""
        return self._model

    @property
    def events(self) -> int:
        """How many events were read, those that could not be understood not counted."""
        return self._parsed + sum(lane.events for lane in self._lanes)

    @property
    def says_more(self) -> bool:
        """Whether anything of the answer came behind the last usage, which then is not that of the whole."""
        return self.events - self._silent > self._usage_at

    @property
    def has_finish(self) -> bool:
        """Whether every choice that has begun has its finish reason; an upstream may give fewer than were asked."""
        return 0 < self._finished == len(self._choices)

    def feed(self, data: bytes) -> bytes:
        """The events that `data` completes, in normal form."""
        if self.lane is not None and self.lane.passes(data):
            return data
        segment = self._feed_any(data)
        self.lane = self._lanes[0] if self._lanes and self._splitter.is_between_events else None
        return segment

    def _feed_any(self, data: bytes) -> bytes:
        events = self._splitter.feed(data)
        out: list[bytes] = []
        is_verbatim = self._splitter.was_exact
        for event in events:
            if self.is_done or self.error is not None:
                is_verbatim = False
                break
            for lane in self._lanes:
                if lane.fits(event):
                    out.append(event)
                    break
            else:
                is_verbatim = self._mend(event, out) and is_verbatim
        if is_verbatim:
            return data
        if not out:
            return b""
        out.append(b"")
        return b"\n\n".join(out)

    def finish(self) -> bytes:
        """What the end of the input completes: a last event without its blank line, events still waiting for an id."""
        out: list[bytes] = []
        for event in self._splitter.finish():
            if not self.is_done and self.error is None:
                self._mend(event, out)
        self._release(out)
        out.append(b"")
        return b"\n\n".join(out) if len(out) > 1 else b""

    def usage_event(self, estimate: Usage | None) -> bytes:
        """The closing usage event: the upstream's own or, where it said none of the whole, one made of `estimate`."""
        chunk = None if self.says_more else self._usage_chunk
        if chunk is None:
            if estimate is None:
                return b""
            chunk = {"choices": [], "usage": estimate.as_json()}
        return data_event(dumps(self._fill_in(chunk)))

    def replace_usage(self, usage: Usage) -> None:
        """Let the closing event say this instead."""
        if self._usage_chunk is not None:
            self._usage_chunk["usage"] = usage.as_json()

    def _mend(self, raw: bytes, out: list[bytes]) -> bool:
        """Append to `out` what is to be sent for one event; true when that is the event as it came and nothing else."""
        is_one_line = raw.startswith(b"data: ") and b"\n" not in raw
        kind, data = (b"", raw[6:]) if is_one_line else parse_event(raw)
        if data is None:
            return False
        if len(data) < _MAX_DONE_BYTES and data.strip() == b"[DONE]":
            self.is_done = self.is_ending = True
            self._forget_lanes(0)
            self._release(out)
            return False
        is_sound = data.isascii() or is_utf8(data)
        chunk = _parse_object(data if is_sound else data.decode("utf-8", "replace").encode())
        if chunk is None:
            self.malformed += 1
            return False
        self._parsed += 1
        kind_of_object = chunk.get("object")
        if chunk.get("error") or kind_of_object == "error" or (kind == b"error" and "choices" not in chunk):
            self.error = chunk
            self.is_ending = True
            self._forget_lanes(0)
            return False
        has_changed = self._mend_choices(chunk) or not is_sound
        self._silent += not _says_anything(chunk)
        if chunk.get("usage") is not None or "x_groq" in chunk:
            is_left, has_lost = self._take_usage(chunk)
            if not is_left:
                return False
            has_changed = has_changed or has_lost
        if self._id is None and not chunk["choices"] and not chunk.get("id"):
            self._waiting.append(chunk)
            return False
        is_known = (
            kind_of_object == "chat.completion.chunk"
            and type(chunk.get("created")) is int
            and self._id == chunk.get("id")
            and self._model == chunk.get("model")
            and self._created == chunk["created"]
        )
        if not is_known:
            has_changed = self._needs_filling(chunk) or has_changed
            self._fill_in(chunk)
        is_next = not self._waiting
        self._release(out)
        if has_changed or not is_one_line:
            out.append(b"data: " + dumps(chunk))
            return False
        out.append(raw)
        self._learn(raw, chunk)
        return is_next

    def _release(self, out: list[bytes]) -> None:
        """Send what waited for an id, now that there is one (or there will be none)."""
        if self._waiting:
            out.extend(b"data: " + dumps(self._fill_in(chunk)) for chunk in self._waiting)
            self._waiting = []

    def _needs_filling(self, chunk: dict[str, Any]) -> bool:
        names = (chunk.get("id"), chunk.get("model"))
        return not (
            all(isinstance(name, str) and name for name in names)
            and isinstance(chunk.get("created"), int)
            and chunk.get("object") == "chat.completion.chunk"
        )

    def _fill_in(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """The chunk with its envelope complete; what the upstream did say is kept and remembered for the others."""
        if not isinstance(chunk.get("id"), str) or not chunk["id"]:
            chunk["id"] = self._id or self._expected.fallback_id
        if not isinstance(chunk.get("created"), int):
            chunk["created"] = self._created or self._expected.created
        if not isinstance(chunk.get("model"), str) or not chunk["model"]:
            chunk["model"] = self._model or self._expected.model
        chunk["object"] = "chat.completion.chunk"
        self._id, self._created, self._model = chunk["id"], chunk["created"], chunk["model"]
        return chunk

    def _take_usage(self, chunk: dict[str, Any]) -> tuple[bool, bool]:
        """Take the usage out of a chunk that has some; whether anything is left to be sent, and whether it has changed."""
        usage = chunk.get("usage")
        has_changed = False
        if usage is not None and read_usage({"usage": usage}) is None:
            del chunk["usage"]
            usage = None
            has_changed = True
            if chunk.keys() <= _ENVELOPE and not chunk["choices"]:
                return False, True
        most = self._note_usage(chunk)
        if usage is None:
            return True, has_changed
        has_choices = bool(chunk["choices"])
        if most is not None:
            told = usage if read_usage({"usage": usage}) == most else usage | most.as_json()
            self._usage_chunk = {**(_envelope(chunk) if has_choices else chunk), "choices": [], "usage": told}
        if not has_choices:
            return False, True
        if not self._expected.wants_running_usage:
            # A null beside the choices is how OpenAI says "later", and stays.
            del chunk["usage"]
            has_changed = True
        return True, has_changed

    def _note_usage(self, chunk: dict[str, Any]) -> Usage | None:
        """Remember the most that was said of the usage until now, and give that; None where this chunk adds nothing to it.

        Some say the prompt's tokens at the beginning and the answer's at the end.
        """
        usage, known = read_usage(chunk), self.usage
        if usage is None:
            return None
        self._usage_at = self.events - self._silent
        self.usage = most = usage.at_least(known)
        return most if most == usage or most != known else None

    def _mend_choices(self, chunk: dict[str, Any]) -> bool:
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            chunk["choices"] = []
            return True
        has_changed = False
        if not all(isinstance(choice, dict) for choice in choices):
            choices = chunk["choices"] = [choice for choice in choices if isinstance(choice, dict)]
            has_changed = True
        for position, choice in enumerate(choices):
            index = choice.get("index")
            if not isinstance(index, int):
                choice["index"] = index = position
                has_changed = True
            state = self._choices.get(index)
            if state is None:
                state = self._choices[index] = _ChoiceState()
            if self._mend_choice(choice, state):
                has_changed = True
        if self._finished:
            self.is_finished = self._finished == len(self._choices) >= self._expected.choices
            self.is_ending = self.is_ending or self.is_finished
        return has_changed

    def _mend_choice(self, choice: dict[str, Any], state: _ChoiceState) -> bool:
        has_changed = False
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            message = choice.pop("message", None)
            # A whole message inside a stream is the answer itself, or at the end a repetition of it.
            delta = message if isinstance(message, dict) and not state.has_content else {}
            choice["delta"] = delta
            has_changed = True
        if not state.has_role:
            state.has_role = True
            if not delta.get("role"):
                choice["delta"] = delta = {**delta, "role": "assistant"}
                has_changed = True
        elif "role" in delta:
            del delta["role"]
            has_changed = True
        if "tool_calls" in delta:
            has_changed = self._mend_tool_calls(delta, state) or has_changed
        if choice.get("finish_reason") is not None:
            if state.is_finished or choice["finish_reason"] == "":
                choice["finish_reason"] = None
                has_changed = True
            else:
                state.is_finished = True
                self._finished += 1
                if self.finish_reason is None:
                    self.finish_reason = str(choice["finish_reason"])
                self.is_meaningful = True
        if not state.has_content:
            for name, value in delta.items():
                if value and name != "role":
                    state.has_content = self.is_meaningful = True
                    break
        return has_changed

    def _mend_tool_calls(self, delta: dict[str, Any], state: _ChoiceState) -> bool:
        given = delta["tool_calls"]
        calls = [call for call in given if isinstance(call, dict)] if isinstance(given, list) else []
        if not calls:
            del delta["tool_calls"]
            return True
        delta["tool_calls"] = calls
        has_changed = len(calls) != len(given)
        for call in calls:
            has_changed = self._mend_tool_call(call, state) or has_changed
        return has_changed

    def _mend_tool_call(self, call: dict[str, Any], state: _ChoiceState) -> bool:
        given = call.get("index")
        has_changed = False
        for member, kind in (("id", str), ("function", dict)):
            if member in call and not isinstance(call[member], kind):
                del call[member]
                has_changed = True
        call_id, function = call.get("id"), call.get("function", {})
        name = function.get("name")
        routed = state.call_routes.get(given) if isinstance(given, int) else None
        if call_id and call_id in state.call_ids:
            index, is_new = state.call_ids[call_id], False
        elif call_id:
            index, is_new = _free_index(given, state), True
        elif routed is not None and (not name or name == state.call_names.get(routed)):
            index, is_new = routed, False
        elif name or state.last_call < 0:
            index, is_new = _free_index(given, state), True
            call["id"] = call_id = f"call_{self._expected.fallback_id}_{index}"
            has_changed = True
        else:
            index, is_new = state.last_call, False
        if is_new:
            # Where every call says index 0, the shape of the last call's arguments would claim those of this one.
            self._forget_lanes(0)
            state.call_ids[str(call_id)] = index
            state.call_names[index] = name or ""
            if not call.get("type"):
                call["type"] = "function"
                has_changed = True
        else:
            if "id" in call:
                del call["id"]
                has_changed = True
            if "name" in function:
                if state.call_names[index] or not name:
                    del function["name"]
                    has_changed = True
                else:
                    state.call_names[index] = name
        if isinstance(given, int):
            state.call_routes[given] = index
        if given != index:
            call["index"] = index
            has_changed = True
        arguments = function.get("arguments", "")
        if not isinstance(arguments, str):
            function["arguments"] = "" if arguments is None else dumps(arguments).decode()
            has_changed = True
        state.last_call = index
        return has_changed

    def _forget_lanes(self, kept: int) -> None:
        self._parsed += sum(lane.events for lane in self._lanes[kept:])
        del self._lanes[kept:]

    def _learn(self, raw: bytes, chunk: dict[str, Any]) -> None:
        """Remember the shape of an event that was normal as it came and said nothing but more text."""
        is_hopeless = self._learned > _PATIENCE and self._learned * 2 > self.events
        if not self.is_meaningful or is_hopeless or not _is_plain(chunk):
            return
        for member in _text_member.finditer(raw):
            rest = string_rest(raw, member.end())
            if rest is not None and rest.end() > member.end() + 1:
                self._learned += 1
                self._lanes.insert(0, Lane(raw[: member.end()], raw[rest.end() :]))
                self._forget_lanes(_MAX_LANES)
                return


def renaming(old: str, new: str) -> Callable[[bytes], bytes]:
    """What puts another id into events in normal form."""
    # A quote within a string is escaped, so only a member and its value look like this; both spacings are in use.
    name, value = dumps(old), b'"id":' + dumps(new)
    dense, spaced = b'"id":' + name, b'"id": ' + name
    return lambda segment: segment.replace(dense, value).replace(spaced, value)


def _parse_object(data: bytes) -> dict[str, Any] | None:
    try:
        value = loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _says_anything(chunk: dict[str, Any]) -> bool:
    """Whether it is a part of the answer itself, and more than its beginning or its end."""
    return any(value and name != "role" for choice in chunk["choices"] for name, value in choice["delta"].items())


def _envelope(chunk: dict[str, Any]) -> dict[str, Any]:
    return {name: chunk.get(name) for name in ("id", "object", "created", "model")}


def _free_index(given: Any, state: _ChoiceState) -> int:
    if isinstance(given, int) and given >= 0 and given not in state.call_names:
        return given
    return max(state.call_names, default=-1) + 1


_ENVELOPE = frozenset(("id", "object", "created", "model", "choices"))
_PLAIN_DELTA = frozenset(("content", "reasoning_content", "reasoning", "tool_calls", "refusal"))
_PLAIN_CALL = frozenset(("index", "function", "type"))


def _is_plain(chunk: dict[str, Any]) -> bool:
    """Whether another chunk like this one, with another text, changes nothing that must be known before the end."""
    if chunk.get("usage") is not None or len(chunk["choices"]) != 1:
        return False
    choice = chunk["choices"][0]
    if choice.get("finish_reason") is not None or not choice["delta"].keys() <= _PLAIN_DELTA:
        return False
    calls = choice["delta"].get("tool_calls") or []
    return all(
        isinstance(call, dict)
        and call.keys() <= _PLAIN_CALL
        and isinstance(call.get("function"), dict)
        and call["function"].keys() <= {"arguments"}
        for call in calls
    )
