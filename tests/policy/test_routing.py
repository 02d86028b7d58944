"""Which targets a name means, and in which order they are asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.chat import CacheTier, Route, Target
from proxy.errors import ClientError
from proxy.policy.routing import Routes, draw
from proxy.settings import CacheSettings, ModelSettings, Settings, StreamingSettings, TargetSettings, UpstreamSettings
from tests.conftest import examples


def make(*, models: dict[str, tuple[str, ...]] | None = None, **upstreams: tuple[str, ...]) -> Routes:
    """Routes for upstreams and their patterns, and aliases with their targets."""
    return Routes(
        Settings(
            upstream=tuple(UpstreamSettings(name, f"http://{name}", models=kinds) for name, kinds in upstreams.items()),
            model=tuple(
                ModelSettings(name, tuple(TargetSettings(target) for target in targets))
                for name, targets in (models or {}).items()
            ),
        )
    )


def test_what_is_too_long_for_a_name_is_none() -> None:
    """Names are remembered, and told in headers, logs and metrics."""
    routes = make(a=("*",))
    assert routes.resolve("m" * 256).targets == (Target("a", "m" * 256),)
    with pytest.raises(ClientError) as refused:
        routes.resolve("m" * 257)
    assert (refused.value.code, len(refused.value.message) < 400) == ("model_not_found", True)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("fast", ["b/gpt-4o-mini", "a/llama"]),  # an alias, its targets in order
        ("a/llama", ["b/other"]),  # an alias wins, even one that is written like a target
        ("b/gpt-5", ["b/gpt-5"]),
        ("a/x/y", ["a/x/y"]),  # only the first part can be an upstream's name
        ("b/llama", ["a/b/llama"]),  # b may not serve it, so it is a name with a slash in it
        ("meta/llama-3", ["a/meta/llama-3"]),
        ("a/", ["a/a/"]),
        ("exact", ["c/exact"]),  # named in full by c, though a takes any name
        ("listed-by-c", ["c/listed-by-c"]),  # on c's own list, though a takes any name
        ("gpt-4o", ["a/gpt-4o"]),  # the first whose pattern fits
        ("GPT-4o", ["a/GPT-4o"]),
    ],
)
def test_a_name_is_an_alias_or_a_target_or_what_an_upstream_names_or_lists_or_takes(
    name: str, targets: list[str]
) -> None:
    routes = make(
        a=("*",),
        b=("gpt-*", "o?"),
        c=("exact", "listed-*"),
        models={"fast": ("b/gpt-4o-mini", "a/llama"), "a/llama": ("b/other",)},
    )
    routes.set_listed("c", ("listed-by-c", "not-allowed"))
    assert [str(target) for target in routes.resolve(name).targets] == targets
    assert routes.resolve(name) is routes.resolve(name)


def test_a_targets_model_may_hold_slashes() -> None:
    routes = make(a=("*",), models={"m": ("a/meta/llama",)})
    assert routes.resolve("m").targets == (Target("a", "meta/llama"),)


def test_a_route_says_what_its_model_says_and_the_rest_is_as_for_all() -> None:
    streaming = StreamingSettings(recovery="off", coalesce=False)
    told = (TargetSettings("a/x", 2, 8000), TargetSettings("a/y"))
    routes = Routes(
        Settings(
            streaming=streaming,
            cache=CacheSettings(ttl_s=60),
            upstream=(UpstreamSettings("a", "http://a"),),
            model=(
                ModelSettings("told", told, "continue", "whole", coalesce=True, cache="exact", cache_ttl_s=0),
                ModelSettings("quiet", (TargetSettings("a/x"),)),
            ),
        )
    )
    x, y = Target("a", "x"), Target("a", "y")
    assert routes.resolve("told") == Route((x, y), (2, None), {x: 8000}, "continue", True, True, "exact", 0, "a/x a/y")
    assert routes.resolve("quiet") == Route((x,), (None,), {}, "off", False, False, "semantic", 60, "a/x")
    assert routes.resolve("a/y") == Route((y,), (None,), {}, "off", False, False, "semantic", 60, "a/y")
    assert routes.aliases == {name: routes.resolve(name) for name in ("told", "quiet")}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-4o-mni", "Did you mean gpt-4o-mini"),
        ("chat-fats", "Did you mean chat-fast"),
        ("claud-3", "Did you mean claude-3"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_a_name_that_nobody_serves_is_refused_with_close_names(name: str, words: str) -> None:
    routes = make(a=("gpt-4o-mini", "gpt-5*"), b=("claude-*",), models={"chat-fast": ("a/gpt-4o-mini",)})
    routes.set_listed("b", ("claude-3", "secret-of-b"))
    with pytest.raises(ClientError) as caught:
        routes.resolve(name)
    error = caught.value
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert words in error.message
    assert ("Did you mean" in error.message) is bool(words)


def test_a_pattern_is_no_name_to_suggest_and_what_may_not_be_served_is_not_listed() -> None:
    routes = make(a=("gpt-4o-mini", "gpt-*", "o?", "[ab]"), models={"chat": ("a/gpt-1",)})
    routes.set_listed("a", ("gpt-9", "whisper"))
    assert routes.listed("a") == ("gpt-9",)
    assert routes.known_names() == ["chat", "gpt-4o-mini", "gpt-9"]
    assert routes.listed("nobody") == ()


def test_what_a_name_resolved_to_is_forgotten_when_a_list_changes() -> None:
    routes = make(a=("*",), b=("*",))
    assert routes.resolve("m").targets == (Target("a", "m"),)
    routes.set_listed("b", ("m",))
    assert routes.resolve("m").targets == (Target("b", "m"),)
    routes.set_listed("a", ("m",))
    assert routes.resolve("m").targets == (Target("a", "m"),)


def group(name: str, *targets: str, cache: CacheTier | None = None) -> ModelSettings:
    return ModelSettings(name, tuple(TargetSettings(target) for target in targets), cache=cache)


def test_a_group_is_an_alias_that_is_made_and_changed_behind_those_of_the_config() -> None:
    """Whatever its name was before: nothing's, a model's on an upstream's list, or a target's."""
    routes = make(a=("*",), b=("gpt-*",), models={"ours": ("a/x",)})
    routes.set_listed("a", ("listed",))
    before = {name: routes.resolve(name) for name in ("fast", "listed", "b/gpt-4")}
    for name in (*before, "ours"):
        routes.set_group(name, group(name, "b/gpt-5", "a/y"))
    for name in before:
        assert routes.resolve(name) == Route(
            *((Target("b", "gpt-5"), Target("a", "y")), (None, None), {}, "exact", False, True),
            *("semantic", 86_400, "b/gpt-5 a/y"),
        )
    assert routes.resolve("ours").targets == (Target("a", "x"),)
    assert list(routes.aliases) == ["ours", *before]
    assert [name for name in routes.aliases if routes.group_problems(name)] == ["ours"]
    routes.set_group("fast", group("fast", "a/z"))
    assert routes.resolve("fast").targets == (Target("a", "z"),)


def test_the_name_of_a_group_that_is_out_of_use_or_leads_nowhere_is_nothings_and_no_group_is_suggested() -> None:
    routes = make(a=("*", "closed"), b=("gpt-*",))
    routes.set_listed("a", ("closed", "gone", "other"))
    routes.set_group("closed", group("closed", "a/x"))
    routes.set_group("closed", None)
    routes.set_group("gone", group("gone", "c/x"))
    routes.set_group("half", group("half", "c/x", "b/y"))
    for name in ("closed", "gone"):
        with pytest.raises(ClientError, match=f"^The model '{name}' does not exist here.$"):
            routes.resolve(name)
    assert routes.resolve("half").targets == (Target("b", "y"),)
    assert [name for name in ("closed", "gone", "half") if routes.group_problems(name)] == ["gone", "half"]
    assert (routes.listed("a"), routes.known_names()) == (("other",), ["other"])


@pytest.mark.parametrize(
    ("cache", "wanted", "expected", "has_problem"),
    [
        (CacheSettings(), "semantic", "semantic", False),
        (CacheSettings(), "off", "off", False),
        (CacheSettings(), None, "semantic", False),
        (CacheSettings(semantic=False), "semantic", "exact", True),
        (CacheSettings(exact=False, semantic=False), "exact", "off", True),
        (CacheSettings(exact=False, semantic=False), None, "off", False),
    ],
)
def test_a_group_cannot_open_a_cache_that_the_config_keeps_closed(
    cache: CacheSettings, wanted: CacheTier | None, expected: CacheTier, *, has_problem: bool
) -> None:
    routes = Routes(Settings(cache=cache, upstream=(UpstreamSettings("a", "http://a"),)))
    routes.set_group("fast", group("fast", "a/x", cache=wanted))
    assert routes.resolve("fast").cache == expected
    assert bool(routes.group_problems("fast")) is has_problem


def test_memory_is_bounded_when_clients_make_up_names() -> None:
    routes = make(a=("*",))
    for number in range(10_000):
        assert routes.resolve(f"name-{number}").targets == (Target("a", f"name-{number}"),)
    assert routes.resolve("name-0").targets == (Target("a", "name-0"),)


def test_a_request_without_a_model_goes_to_the_first_upstream() -> None:
    assert make(x=("a",), y=("*",)).default_upstream() == "x"
    with pytest.raises(ClientError, match="No upstream"):
        make().default_upstream()


def route(*weights: float | None) -> Route:
    targets = tuple(Target("up", str(number)) for number in range(len(weights)))
    return Route(targets, weights, {}, "exact", False, True)


def playing(numbers: list[float]) -> Callable[[], float]:
    """Luck that gives these numbers, and fails when it is asked for more."""
    return iter(numbers).__next__


def groups(weights: tuple[float | None, ...]) -> list[list[int]]:
    """The places of targets in a row that have a weight, and each other place for itself."""
    return [
        list(places) for _, places in groupby(range(len(weights)), lambda place: "equal" if weights[place] else place)
    ]


LUCK = st.floats(0, 1, exclude_max=True)
WEIGHTS = st.lists(st.none() | st.floats(0, 1e6, exclude_min=True), min_size=1, max_size=8).map(tuple)


@examples(200)
@given(weights=WEIGHTS, luck=st.lists(LUCK, min_size=7, max_size=7))
def test_a_draw_moves_targets_only_among_those_in_a_row_that_have_a_weight(
    weights: tuple[float | None, ...], luck: list[float]
) -> None:
    given_order = route(*weights)
    order = draw(given_order, playing(luck))
    for places in groups(weights):
        assert {order[place] for place in places} == {given_order.targets[place] for place in places}
    assert len(order) == len(weights)
    assert order == draw(given_order, playing(luck)), "the same luck, the same order"
    if all(len(places) == 1 for places in groups(weights)):
        assert draw(given_order, playing([])) is given_order.targets


@examples(100)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_the_first_place_is_drawn_in_proportion_to_the_weights(weights: list[int]) -> None:
    """Over a grid of as many numbers as the weights add up to, each target is hit as often as its weight says."""
    total, rest = sum(weights), [0.0] * len(weights)
    firsts = [draw(route(*weights), playing([(step + 0.5) / total, *rest]))[0] for step in range(total)]
    assert Counter(firsts) == dict(zip(route(*weights).targets, weights, strict=True))


@examples(100)
@given(st.lists(st.floats(0.1, 9), min_size=2, max_size=6), st.lists(LUCK, min_size=5, max_size=5))
def test_the_places_behind_it_are_drawn_like_the_first_one_among_those_left(
    weights: list[float], luck: list[float]
) -> None:
    first, *others = draw(route(*weights), playing(luck))
    left = [place for place in range(len(weights)) if place != int(first.model)]
    again = draw(route(*(weights[place] for place in left)), playing(luck[1:]))
    assert others == [route(*weights).targets[left[int(target.model)]] for target in again]


@pytest.mark.parametrize(
    ("weights", "luck", "order"),
    [
        ((None, None), [], "01"),
        ((3,), [], "0"),
        ((3, None, 1), [], "012"),  # each alone: nothing to draw
        ((3, 1), [0.74], "01"),
        ((3, 1), [0.76], "10"),
        ((None, 3, 1, None), [0.76], "0213"),
        ((3, 1, None, 1, 1), [0.76, 0.0], "10234"),
        ((1, 1, 2), [0.5, 0.6], "210"),
        ((5e-324, 5e-324), [1 - 2**-53], "10"),  # a product that is rounded up to the sum
    ],
)
def test_a_draw(weights: tuple[float | None, ...], luck: list[float], order: str) -> None:
    assert "".join(target.model for target in draw(route(*weights), playing(luck))) == order
