"""Two halves of an answer from two streams: never a character twice, none missing, and nothing that was not said."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy.wire.chunks import assemble
from proxy.wire.normal import Expected, Normalizer
from proxy.wire.splice import Diverged, Said, Splice, said
from tests.conftest import examples

Part = tuple[str, str]
"""A member of a delta, and a piece of its text."""

OLD = {"id": "c-old", "object": "chat.completion.chunk", "created": 7, "model": "m-old"}
NEW = {"id": "c-new", "object": "chat.completion.chunk", "created": 8, "model": "m-new"}
LONG = "Forty words would do, but these are enough."  # more than 32 characters
BEGUN = Said("c-old", 7, {"content": LONG})


def event(envelope: dict[str, Any], *choices: dict[str, Any], **members: Any) -> bytes:
    return b"data: " + json.dumps({**envelope, "choices": list(choices), **members}).encode() + b"\n\n"


def delta(_finish: str | None = None, /, **members: Any) -> dict[str, Any]:
    return {"index": 0, "delta": members, "finish_reason": _finish}


def stream(envelope: dict[str, Any], parts: list[Part], finish: str | None = "stop") -> list[bytes]:
    """The events of an answer: role, text, finish."""
    choices = [delta(role="assistant", content=""), *(delta(**{name: text}) for name, text in parts)]
    return [event(envelope, choice) for choice in choices + ([delta(finish)] if finish else [])]


def new(*contents: str, finish: str | None = None) -> list[bytes]:
    return stream(NEW, [("content", text) for text in contents], finish)


def values(out: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in out.split(b"\n\n") if line]


def texts(out: bytes, name: str = "content") -> list[str]:
    return [choice["delta"][name] for value in values(out) for choice in value["choices"] if choice["delta"].get(name)]


def spoken(parts: list[Part]) -> Said:
    found = said(stream(OLD, parts, None))
    assert found is not None
    return found


def cut(draw: Callable[..., Any], items: Any) -> list[Any]:
    """A text or list in pieces, none of them empty."""
    edges = sorted({0, len(items), *draw(st.lists(st.integers(0, len(items)), max_size=8))})
    return [items[start:end] for start, end in pairwise(edges)]


# ---------------------------------------------------------------------------------------------- the whole answer again

TEXT = st.text(max_size=40) | st.text("ab \n", max_size=40) | st.text('"\\é\u0301👩\u200d🇩🇪\u2028', max_size=20)
ANSWERS = st.lists(
    st.tuples(st.sampled_from(["reasoning_content", "content", "refusal"]), TEXT), unique_by=lambda p: p[0]
)


@st.composite
def breaks(draw: st.DrawFn) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """An answer, the events of it that were sent, and the segments in which the same text comes again, cut otherwise."""
    answer = draw(ANSWERS)
    whole, again = (
        stream(envelope, [(name, piece) for name, text in answer for piece in cut(draw, text)])
        for envelope in (OLD, NEW)
    )
    return whole, whole[: draw(st.integers(1, len(whole) - 1))], [b"".join(some) for some in cut(draw, again)]


@given(breaks())
@examples(300)
def test_both_halves_together_say_what_the_whole_answer_says(
    case: tuple[list[bytes], list[bytes], list[bytes]],
) -> None:
    whole, sent, again = case
    before = said([b"".join(sent[:1]), b"".join(sent[1:])])
    assert before is not None
    splice = Splice(before, is_continuation=False)
    out = [*sent, *map(splice.feed, again)]
    assert splice.is_caught_up
    assert assemble(out) == {**assemble(whole), "model": "m-new"}
    assert not any(
        choice["delta"].get("role") for value in values(b"".join(out[len(sent) :])) for choice in value["choices"]
    )
    normalizer = Normalizer(Expected(fallback_id="x", created=0, model="x"), 1 << 20)
    assert normalizer.feed(b"".join(out)) == b"".join(out)
    assert normalizer.is_finished


@given(st.data())
@examples(200)
def test_of_another_text_nothing_is_sent(data: st.DataObject) -> None:
    text = data.draw(TEXT.filter(bool))
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters().filter(lambda sign: sign != text[at]))
    splice = Splice(spoken([("content", text)]), is_continuation=False)
    out = b""
    with pytest.raises(Diverged):
        for one in new(*cut(data.draw, text[:at] + other + data.draw(TEXT)), finish="stop"):
            out += splice.feed(one)
    assert out == b""


EXACT = Said("c-old", 7, {"reasoning": "Hm", "content": "Hello"})


@pytest.mark.parametrize(
    "choices",
    [
        [delta(content="Help")],
        [delta(reasoning="Hmm")],  # reasoning may not grow while content has more to repeat
        [delta(reasoning="Hm", content="Hel", refusal="No")],
        [delta(content="Hello, you")],  # nor content while reasoning has
        [delta("stop", reasoning="Hm", content="Hell")],
        [delta("content_filter")],
        [delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}])],
        [delta(audio={"id": "a"})],
        [delta(content=["Hello"])],
        [delta(content="H"), {**delta(content="H"), "index": 1}],
        [{**delta(content="H"), "index": 1}],
        [{"index": 0, "finish_reason": None}],
        ["H"],
    ],
)
def test_what_is_no_repetition_diverges(choices: list[Any]) -> None:
    with pytest.raises(Diverged):
        Splice(EXACT, is_continuation=False).feed(event(NEW, *choices))


@pytest.mark.parametrize(
    "raw",
    [
        *(b"data: {", b"data: [1]", b"data: [DONE]", b": ping", b'data: {"id":1}', b'data: {"choices":{}}', b"\xff"),
        b'data: {"choices":[],"x":"\xff"}',
        b'data: {"x":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'data: {"choices":[],"x":["\\ud83d",' + b"[" * 5000 + b"]" * 5000 + b"]}",
        b'data: {"choices":[],"x":["\\ud83d",NaN]}',
        b'data: {"choices":[],"x":' + b"[" * 1010 + b"]" * 1010 + b"}",
    ],
)
@pytest.mark.parametrize("is_continuation", [False, True])
def test_an_event_that_cannot_be_understood_diverges(raw: bytes, is_continuation: bool) -> None:
    splice = Splice(Said("c-old", 7, {"content": "a"}), is_continuation=is_continuation)
    splice.feed(event(NEW, delta(content="ab")))
    with pytest.raises(Diverged):
        splice.feed(raw + b"\n\n")


@given(
    st.binary(max_size=30) | st.builds(lambda tail: b'data: {"choices":[' + tail, st.binary(max_size=30)), st.booleans()
)
@examples(200)
def test_nothing_but_diverged_is_ever_raised(raw: bytes, is_continuation: bool) -> None:
    said([raw])
    with suppress(Diverged):
        Splice(EXACT, is_continuation=is_continuation).feed(raw)


def test_a_delta_that_goes_beyond_is_cut_and_later_ones_pass_with_the_old_name() -> None:
    """Log probabilities of a delta that was cut go: they are those of other tokens. All else that is unknown stays."""
    splice = Splice(EXACT, is_continuation=False)
    probable = {"logprobs": {"content": [1, 2]}, "x_choice": 3}
    assert splice.feed(event(NEW, prompt_filter_results=[1]) + event(NEW, delta(role="assistant"), x_first=1)) == b""
    assert splice.feed(event(NEW, delta(reasoning="Hm"), usage={"prompt_tokens": 1})) == b""
    was_caught_up = splice.is_caught_up
    out = splice.feed(event(NEW, {**delta(content="Hello, you", reasoning=None), **probable}, x_chunk=4))
    assert (was_caught_up, splice.is_caught_up) == (False, True)
    out += splice.feed(
        event(NEW, {**delta(content="!"), **probable}) + event(NEW, delta("stop")) + event(NEW, usage={})
    )
    ours = {**NEW, "id": "c-old", "created": 7}
    assert values(out) == [
        {**ours, "choices": [{**delta(content=", you"), **probable, "logprobs": None}], "x_chunk": 4},
        {**ours, "choices": [{**delta(content="!"), **probable}]},
        {**ours, "choices": [delta("stop")]},
        {**ours, "choices": [], "usage": {}},
    ]


def test_a_call_or_the_end_may_come_with_the_last_of_the_repetition() -> None:
    for more in ({"tool_calls": [{"index": 0}]}, {}):
        out = Splice(EXACT, is_continuation=False).feed(
            event(NEW, delta("stop", reasoning="Hm", content="Hello", **more))
        )
        assert values(out)[0]["choices"] == [delta("stop", **more)]


@pytest.mark.parametrize("is_continuation", [False, True])
def test_an_error_passes_as_it_came(is_continuation: bool) -> None:
    error = b'data: {"error": {"message": "no"}}\n\n'
    assert Splice(EXACT, is_continuation=is_continuation).feed(error) == error


def test_half_an_emoji_stays_half_an_emoji() -> None:
    """Some upstreams cut between two UTF-16 units; who reads in UTF-16, as browsers do, gets it whole again."""
    before = spoken([("content", "a\ud83d")])
    splice = Splice(before, is_continuation=False)
    assert texts(b"".join(map(splice.feed, new("a", "\ud83d", "\ude00", "b")))) == ["\ude00", "b"]
    with pytest.raises(Diverged):
        Splice(before, is_continuation=False).feed(new("a😀")[1])


# ---------------------------------------------------------------------------------------------- what was said


def test_what_was_said_is_gathered_by_member() -> None:
    parts = [("reasoning_content", "H"), ("content", "a"), ("content", "b"), ("refusal", "")]
    sent = event(OLD) + b"".join(stream(OLD, parts, None)) + event(OLD, delta(content=None, tool_calls=[]))
    assert said([sent]) == Said("c-old", 7, {"reasoning_content": "H", "content": "ab"})
    assert said(stream(OLD, [], None)) == Said("c-old", 7, {})


@pytest.mark.parametrize(
    "last",
    [
        event(OLD, delta("stop")),
        event(OLD, delta(tool_calls=[{"index": 0}])),
        event(OLD, delta(function_call={"name": "f"})),
        event(OLD, delta(audio={"id": "a"})),
        event(OLD, delta(content=[{"type": "text"}])),
        event(OLD, delta(images=[1])),
        event(OLD, {**delta(content="a"), "index": 1}),
        event(OLD, delta(content="a"), delta(content="b")),
        event(OLD, error={"message": "no"}),
        b"data: [DONE]\n\n",
        b"data: {\n\n",
    ],
)
def test_an_answer_that_is_more_than_text_or_at_its_end_is_not_spliced(last: bytes) -> None:
    assert said([*stream(OLD, [("content", "a")], None), last]) is None


@pytest.mark.parametrize("sent", [[], [event(OLD)], [event({**OLD, "id": None}, delta(role="assistant"))]])
def test_an_answer_that_has_not_begun_is_not_spliced(sent: list[bytes]) -> None:
    assert said(sent) is None


# ---------------------------------------------------------------------------------------------- continuations


@pytest.mark.parametrize(
    ("before", "after", "sent"),
    [
        ("Hello", [" you", "!"], [" you", "!"]),
        ("Hello", ["Hello", " you"], ["Hello", " you"]),  # too short to be known for a repetition
        ("Hello ", [" you"], ["you"]),
        ("Hello ", ["you"], ["you"]),
        ("a.\n\n", ["\n", "\nB"], ["B"]),
        ("a.\n\n", ["\n", "B", "\n"], ["B", "\n"]),
        ("a. \n", ["\n", "B"], ["\n", "B"]),  # only what it ends with in the same order
        ("a.\n", ["\n\nB"], ["\nB"]),
        ("a.  ", [" B", " ", "C"], ["B", " ", "C"]),
        ("", ["", " B"], [" B"]),
        (LONG, [LONG[:9], LONG[9:], " More"], [" More"]),
        (LONG, [LONG + " More"], [" More"]),
        (LONG + "\n\n", [LONG + "\n", "\n", "More"], ["More"]),
        (LONG + "\n", [LONG + " More"], [" More"]),
        (LONG, [LONG[:9], LONG[9:20], "!"], [LONG[:9], LONG[9:20], "!"]),
        (LONG, [LONG[:9], LONG[9:20]], [LONG[:9], LONG[9:20]]),  # the finish comes while it is held
        (LONG, [LONG], []),
        (LONG[:31], [LONG[:31]], [LONG[:31]]),
        (LONG[:32].rstrip() + "x", [LONG[:32].rstrip() + "x"], []),
        (LONG + " ", [" " + LONG], [LONG]),
    ],
)
def test_a_continuation_follows_and_a_repetition_is_noticed(before: str, after: list[str], sent: list[str]) -> None:
    splice = Splice(spoken([("content", before)]), is_continuation=True)
    was_caught_up = splice.is_caught_up
    out = b"".join(map(splice.feed, new(*after, finish="length")))
    assert (was_caught_up, splice.is_caught_up) == (False, True)
    assert texts(out) == sent
    assert len(values(out)) == len(sent) + 1
    assert values(out)[-1] == {**NEW, "id": "c-old", "created": 7, "choices": [delta("length")]}


@given(st.data())
@examples(200)
def test_however_it_is_cut_a_continuation_is_the_text_behind_what_was_said(data: st.DataObject) -> None:
    """Whether the model goes on or starts over: the answer is what was said, and what comes behind it."""
    before = data.draw(TEXT) + data.draw(st.sampled_from(["", LONG])) + data.draw(st.sampled_from(["", " ", "\n\n"]))
    rest = data.draw(TEXT)
    beginning = before.rstrip()
    blank = before[len(beginning) :]
    starts_over = len(beginning) >= 32 and data.draw(st.booleans())
    assume(starts_over or len(beginning) < 32 or not (blank + rest).startswith(beginning))
    after = (beginning if starts_over else "") + blank + rest
    sent = stream(OLD, [("content", before)], None)
    splice = Splice(spoken([("content", before)]), is_continuation=True)
    segments = [b"".join(some) for some in cut(data.draw, new(*cut(data.draw, after), finish="stop"))]
    out = [*sent, *map(splice.feed, segments)]
    assert assemble(out)["choices"][0]["message"]["content"] == before + rest
    normalizer = Normalizer(Expected(fallback_id="x", created=0, model="x"), 1 << 20)
    assert normalizer.feed(b"".join(out)) == b"".join(out)


def test_what_is_held_keeps_its_log_probabilities_and_what_is_cut_loses_them() -> None:
    def probable(text: str) -> bytes:
        return event(NEW, {**delta(content=text), "logprobs": {"content": [text]}})

    for texts_in, kept in (((LONG[:5], LONG[5:7], "!"), [LONG[:5], LONG[5:7], "!"]), ((LONG, "\n!"), [None])):
        splice = Splice(Said("c-old", 7, {"content": LONG + "\n"}), is_continuation=True)
        out = values(b"".join(map(splice.feed, map(probable, texts_in))))
        found = [value["choices"][0]["logprobs"] for value in out]
        assert found == [entry and {"content": [entry]} for entry in kept]


def test_reasoning_that_is_told_twice_over_is_repeated_once() -> None:
    """OpenRouter says each piece in a list as well (https://openrouter.ai/docs/use-cases/reasoning-tokens)."""
    details = [{"type": "reasoning.text", "text": "Hm"}]
    found = said([event(OLD, delta(reasoning="Hm", reasoning_details=details))])
    assert found is not None
    assert found.texts == {"reasoning": "Hm"}
    splice = Splice(found, is_continuation=False)
    out = splice.feed(event(NEW, delta(reasoning="H", reasoning_details=details)))
    out += splice.feed(event(NEW, delta(reasoning="m, yes", reasoning_details=details)))
    assert [value["choices"][0]["delta"] for value in values(out)] == [{"reasoning": ", yes"}]
    assert said([event(OLD, delta(reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}]))]) is None


def test_the_new_answers_reasoning_goes_when_content_had_begun() -> None:
    thoughts = delta(reasoning="Hm", reasoning_details=[{"text": "Hm"}])
    both = {**delta(content="!", reasoning="Hm"), "logprobs": {"content": [1]}}
    plain = {**delta(content="?", reasoning=None), "logprobs": {"content": [1]}}
    sent = [event(NEW, choice) for choice in (thoughts, both, plain, thoughts, delta("stop", reasoning="Hm"))]
    out = b"".join(map(Splice(BEGUN, is_continuation=True).feed, sent))
    assert [value["choices"][0] for value in values(out)] == [
        {**delta(content="!"), "logprobs": None},
        plain,
        delta("stop"),
    ]
    before = Splice(Said("c-old", 7, {"reasoning": "H"}), is_continuation=True)
    assert texts(before.feed(b"".join(sent)), "reasoning") == ["Hm", "Hm", "Hm", "Hm"]


@pytest.mark.parametrize("more", [{"tool_calls": [{"index": 0}]}, {"refusal": "No"}, {"content": [1]}])
def test_a_continuation_that_says_anything_else_is_no_repetition(more: dict[str, Any]) -> None:
    splice = Splice(BEGUN, is_continuation=True)
    assert splice.feed(event(NEW, delta(content=LONG[:4]))) == b""
    out = values(splice.feed(event(NEW, delta(**more)) + event(NEW, delta())))
    assert [value["choices"][0]["delta"] for value in out] == [{"content": LONG[:4]}, more, {}]


def test_a_second_choice_is_no_continuation() -> None:
    with pytest.raises(Diverged):
        Splice(BEGUN, is_continuation=True).feed(event(NEW, delta(content="a"), {**delta(content="b"), "index": 1}))
