"""Which target a name means."""

from __future__ import annotations

import pytest

from proxy.chat import Target
from proxy.errors import ClientError
from proxy.policy.routing import Routes
from proxy.settings import ModelSettings, Settings, UpstreamSettings


def make(*, models: dict[str, tuple[str, ...]] | None = None, **upstreams: tuple[str, ...]) -> Routes:
    """Routes for upstreams and their patterns, and aliases with their targets."""
    return Routes(
        Settings(
            upstream=tuple(UpstreamSettings(name, f"http://{name}", models=kinds) for name, kinds in upstreams.items()),
            model=tuple(ModelSettings(name, targets) for name, targets in (models or {}).items()),
        )
    )


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
    assert [str(target) for target in routes.resolve(name)] == targets
    assert routes.resolve(name) is routes.resolve(name)


def test_a_targets_model_may_hold_slashes() -> None:
    routes = make(a=("*",), models={"m": ("a/meta/llama",)})
    assert routes.resolve("m") == (Target("a", "meta/llama"),)


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
    assert routes.resolve("m") == (Target("a", "m"),)
    routes.set_listed("b", ("m",))
    assert routes.resolve("m") == (Target("b", "m"),)
    routes.set_listed("a", ("m",))
    assert routes.resolve("m") == (Target("a", "m"),)


def test_memory_is_bounded_when_clients_make_up_names() -> None:
    routes = make(a=("*",))
    for number in range(10_000):
        assert routes.resolve(f"name-{number}") == (Target("a", f"name-{number}"),)
    assert routes.resolve("name-0") == (Target("a", "name-0"),)


def test_a_request_without_a_model_goes_to_the_first_upstream() -> None:
    assert make(x=("a",), y=("*",)).default_upstream() == "x"
    with pytest.raises(ClientError, match="No upstream"):
        make().default_upstream()
