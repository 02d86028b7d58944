"""The config file and the environment: every problem is told at once, by place, and no secret with it."""

from __future__ import annotations

import base64
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.addresses import is_loopback, redact_url
from proxy.config import load, with_server, with_upstreams, without_cache
from proxy.errors import ConfigError
from proxy.settings import (
    CacheSettings,
    ModelSettings,
    PriceSettings,
    Settings,
    TargetSettings,
    UpstreamSettings,
    matches,
    parse_content_keys,
)
from tests.conftest import examples

SECRET = "sk-very-secret-0123456789"
UPSTREAM = '[[upstream]]\nname = "a"\nbase_url = "http://localhost:8000/v1"\n'


def loaded(directory: Path, text: str, environ: dict[str, str] | None = None) -> Settings:
    path = directory / "c.toml"
    path.write_text(text, "utf-8")
    return load(path, environ or {})


def problems(directory: Path, text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(directory, text, environ)
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert SECRET not in str(caught.value)
    return [problem.replace(str(directory) + "/", "") for problem in caught.value.problems]


def test_nothing_at_all_is_a_whole_configuration() -> None:
    settings = load(None, {})
    assert settings == Settings()
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8100)
    assert (settings.streaming.max_retries, settings.streaming.idle_timeout_s) == (3, 60)
    assert settings.upstream == ()


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    text = f"""
        [server]
        port = 9000
        cors_origins = ["https://a.example"]
        [store]
        path = "/tmp/x.db"
        [streaming]
        idle_timeout_s = 5
        force_non_streaming = true
        {UPSTREAM}
        api_key_env = "KEY"
        models = ["gpt-*"]
        stream = "never"
        prefill = "prefix"
        [[model]]
        name = "fast"
        targets = ["a/gpt-1", {{ target = " a/b/c ", weight = 3, context_tokens = 128000 }}, {{ target = "a/d" }}]
        delivery = "whole"
        recovery = "continue"
        coalesce = false
        [[model]]
        name = "plain"
        targets = ["a/x"]
    """
    settings = loaded(tmp_path, text, {"KEY": f" {SECRET}\n"})
    assert (settings.server.port, settings.server.cors_origins) == (9000, ("https://a.example",))
    assert settings.store.path == Path("/tmp/x.db")
    assert (settings.streaming.idle_timeout_s, settings.streaming.force_non_streaming) == (5, True)
    assert (settings.upstream[0].models, settings.upstream[0].stream) == (("gpt-*",), "never")
    assert settings.upstream[0].prefill == "prefix"
    targets = TargetSettings("a/gpt-1"), TargetSettings("a/b/c", 3, 128_000), TargetSettings("a/d")
    assert settings.model == (
        ModelSettings("fast", targets, recovery="continue", delivery="whole", coalesce=False),
        ModelSettings("plain", (TargetSettings("a/x"),)),
    )
    assert dict(settings.secrets) == {"a": SECRET}


def test_all_problems_are_told_at_once_with_line_and_key_and_the_nearest_name(tmp_path: Path) -> None:
    text = """foo = 1
[server]
hots = "x"
port = "many"

[[upstream]]
name = "a"
base_url = "ftp://x"
[[upstream]]
name = "a"
base_url = "http://x"
straem = "auto"
[[model]]
name = "m"
targets = ["aa/x", "y"]
[streming]
x = 1
"""
    environ = {"HEADWATER_STREAMING__MAX_RETRYS": "1", "HEADWATER_STREAMING__IDLE_TIMEOUT_S": "long"}
    expected = [
        ("c.toml:1: foo: unknown key",),
        ("c.toml:3: server.hots: unknown key", "did you mean host?"),
        ("c.toml:4: server.port: ", "valid integer"),
        ("c.toml:8: upstream[0].base_url: ", "must be a URL"),
        ("c.toml:10: upstream[1].name: ", "'a' already"),
        ("c.toml:12: upstream[1].straem: unknown key", "did you mean stream?"),
        ("c.toml:15: model[0].targets[0]: ", "'aa/x': no upstream is named 'aa'; did you mean a?"),
        ("c.toml:15: model[0].targets[1]: ", "'y' must be written upstream/model"),
        ("c.toml:16: streming: unknown key", "did you mean streaming?"),
        ("environment variable HEADWATER_STREAMING__IDLE_TIMEOUT_S: ", "valid number"),
        ("environment variable HEADWATER_STREAMING__MAX_RETRYS: ", "did you mean HEADWATER_STREAMING__MAX_RETRIES?"),
    ]
    found = problems(tmp_path, text, environ)
    assert len(found) == len(expected)
    for start, *words in expected:
        [problem] = [
            problem for problem in found if problem.startswith(start) and all(word in problem for word in words)
        ]
        found.remove(problem)


def test_a_wrong_item_of_a_list_hides_no_other_and_all_keep_their_places(tmp_path: Path) -> None:
    text = """[[upstream]]
name = "no-url"
[[upstream]]
name = "a"
base_url = "ftp://x"
models = [3]
api_key_env = "UNSET"
[[model]]
name = "none-is-good"
targets = [3, { weight = 1 }]
recovery = "on"
[[model]]
name = "m"
targets = [{ targt = "a/x" }, 3, "aa/x", { target = "a/x", wieght = 0 }, { target = "a/y", weight = 0 }, "a/x"]
[[model]]
name = "m"
targets = [{ target = "a/x", context_tokens = 1.5 }, ""]
coalesce = "perhaps"
[[model]]
name = "m"
targets = [{ target = "aa/y", wieght = 2 }]
"""
    a_target = 'must be "upstream/model", or a table with that as its target'
    assert sorted(problems(tmp_path, text)) == sorted(
        [
            "c.toml:1: upstream[0].base_url: field required",
            "c.toml:5: upstream[1].base_url: must be a URL like https://api.openai.com/v1",
            "c.toml:6: upstream[1].models[0]: input should be a valid string",
            "c.toml:3: upstream[1]: upstream 'a': environment variable UNSET is not set",
            f"c.toml:10: model[0].targets[0]: {a_target}",
            "c.toml:10: model[0].targets[1].target: field required",
            "c.toml:11: model[0].recovery: input should be 'exact', 'continue' or 'off'",
            "c.toml:14: model[1].targets[0].target: field required",
            "c.toml:14: model[1].targets[0].targt: unknown key; did you mean target?",
            f"c.toml:14: model[1].targets[1]: {a_target}",
            "c.toml:14: model[1].targets[2]: 'aa/x': no upstream is named 'aa'; did you mean a?",
            "c.toml:14: model[1].targets[3].wieght: unknown key; did you mean weight?",
            "c.toml:14: model[1].targets[4].weight: input should be greater than 0",
            "c.toml:14: model[1].targets[5]: 'a/x' is a target of this model already",
            "c.toml:16: model[2].name: another model is named 'm' already",
            "c.toml:17: model[2].targets[0].context_tokens: input should be a valid integer, got a number with a fractional part",
            "c.toml:17: model[2].targets[1]: '' must be written upstream/model",
            "c.toml:18: model[2].coalesce: input should be a valid boolean, unable to interpret input",
            "c.toml:20: model[3].name: another model is named 'm' already",
            "c.toml:21: model[3].targets[0].wieght: unknown key; did you mean weight?",
            "c.toml:21: model[3].targets[0]: 'aa/y': no upstream is named 'aa'; did you mean a?",
        ]
    )


def test_targets_may_be_written_as_tables_of_their_own(tmp_path: Path) -> None:
    text = UPSTREAM + '[[model]]\nname = "m"\n[[model.targets]]\ntarget = "a/x"\nweight = 0.5\n'
    assert loaded(tmp_path, text).model[0].targets == (TargetSettings("a/x", 0.5),)
    assert problems(tmp_path, text + "weigth = 1\n") == [
        "c.toml:4: model[0].targets[0].weigth: unknown key; did you mean weight?"
    ]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[streaming]\nidle_timeout_s = nan\n", "c.toml:2: streaming.idle_timeout_s"),
        ("[streaming]\nidle_timeout_s = inf\n", "c.toml:2: streaming.idle_timeout_s"),
        ("[streaming]\nfirst_token_timeout_s = 0\n", "c.toml:2: streaming.first_token_timeout_s"),
        ("[streaming]\nheartbeat_interval_s = -1\n", "c.toml:2: streaming.heartbeat_interval_s"),
        ("[streaming]\nmax_retries = 2.5\n", "c.toml:2: streaming.max_retries"),
        ("[streaming]\nmax_answer_bytes = 1\n", "c.toml:2: streaming.max_answer_bytes"),
        ('[streaming]\nrecovery = "on"\n', "c.toml:2: streaming.recovery"),
        ("[streaming]\nrecovery_timeout_s = 0\n", "c.toml:2: streaming.recovery_timeout_s"),
        ("[streaming]\ncoalesce_max_temperature = -0.1\n", "c.toml:2: streaming.coalesce_max_temperature"),
        ("[streaming]\nresume_window_s = -1\n", "c.toml:2: streaming.resume_window_s"),
        ("[streaming]\nresume_max_mb = 0\n", "c.toml:2: streaming.resume_max_mb"),
        ("[streaming]\ncircuit_failures = 0\n", "c.toml:2: streaming.circuit_failures"),
        ("[streaming]\ncircuit_cooldown_s = 0\n", "c.toml:2: streaming.circuit_cooldown_s"),
        ("[server]\n\nport = 70_000\n", "c.toml:3: server.port"),
        ('[server]\nlog_format = "xml"\n', "c.toml:2: server.log_format"),
        ('[store]\npath = " "\n', "c.toml:2: store.path: must be a path"),
        ("[store]\npath = 3\n", "c.toml:2: store.path: must be a path"),
        ("[ledger]\nkeep_calls_days = true\n", "c.toml:2: ledger.keep_calls_days: must be a number"),
        ("[server]\nport = true\n", "c.toml:2: server.port: must be a number"),
        ("server = 3\n", "c.toml:1: server"),
        ('upstream = ["x"]\n', "c.toml:1: upstream[0]"),
        ('[[upstream]]\nname = "a"\n', "c.toml:1: upstream[0].base_url"),
        (UPSTREAM + "models = []\n", "c.toml:4: upstream[0].models"),
        (UPSTREAM + 'stream = "sometimes"\n', "c.toml:4: upstream[0].stream"),
        (UPSTREAM + 'prefill = "always"\n', "c.toml:4: upstream[0].prefill"),
        (UPSTREAM.replace('"a"', '"a/b"'), "c.toml:2: upstream[0].name"),
        (UPSTREAM + UPSTREAM.replace('"a"', '"b c"'), "c.toml:5: upstream[1].name"),
        (UPSTREAM + '[[model]]\nname = "m"\ntargets = []\n', "c.toml:6: model[0].targets"),
        (UPSTREAM + '[[model]]\nname = "m"\ntargets = ["a/"]\n', "c.toml:6: model[0].targets[0]"),
        (UPSTREAM + '[[model]]\nname = "m"\ntargets = "a/x"\n', "c.toml:6: model[0].targets"),
        (UPSTREAM + '[[model]]\nname = "m"\ntargets = ["a/x"]\ndelivery = "all"\n', "c.toml:7: model[0].delivery"),
        (UPSTREAM + '[model]\nname = "m"\ntargets = ["a/x"]\n', "c.toml:4: model"),
        (UPSTREAM + 'api_key_env = "K"\napi_key_file = "/dev/null"\n', "c.toml:1: upstream[0]"),
        (UPSTREAM + 'api_key_env = "UNSET"\n', "c.toml:1: upstream[0]"),
        (UPSTREAM + 'api_key_env = "EMPTY"\n', "c.toml:1: upstream[0]"),
        (UPSTREAM + 'api_key_env = "ODD"\n', "c.toml:1: upstream[0]"),
        (UPSTREAM + 'api_key_file = "/nowhere/at/all"\n', "c.toml:1: upstream[0]"),
        (UPSTREAM + 'api_key_file = "/dev/null"\n', "c.toml:1: upstream[0]"),
        (UPSTREAM + 'api_key_file = "a\\u0000b"\n', "c.toml:4: upstream[0].api_key_file: must be a path"),
        (UPSTREAM + f'api_key = "{SECRET}"\n', "c.toml:4: upstream[0].api_key"),
        (UPSTREAM + f'api_key_env = "{SECRET}"\n', "c.toml:"),  # the key, where its name belongs
        (f'[secrets]\na = "{SECRET}"\n', "c.toml:1: secrets"),
        (f'[proxies]\na = "http://u:{SECRET}@x"\n', "c.toml:1: proxies"),
        (UPSTREAM + f'proxy = "u:{SECRET}@x:3128"\n', "c.toml:4: upstream[0].proxy"),
        (UPSTREAM + f'proxy = "socks5://u:{SECRET}@x"\n', "c.toml:4: upstream[0].proxy"),
        (UPSTREAM + f'proxy = "http://u:{SECRET}@x/path"\n', "c.toml:4: upstream[0].proxy"),
        (UPSTREAM + f'proxy = "http://u:{SECRET}@x:0"\n', "c.toml:4: upstream[0].proxy"),
        (UPSTREAM + f'proxy = "http://u:{SECRET}@x:y"\n', "c.toml:4: upstream[0].proxy"),
        (UPSTREAM + f'proxy = "http://u:{SECRET}@"\n', "c.toml:4: upstream[0].proxy"),
        (UPSTREAM + 'proxy = ""\n', "c.toml:4: upstream[0].proxy"),
        (UPSTREAM + 'proxy = "http://x"\nunix_socket = "/run/x"\n', "c.toml:1: upstream[0]: has both"),
        (UPSTREAM + f'unix_socket = "/{"x" * 107}"\n', "c.toml:4: upstream[0].unix_socket"),
        (UPSTREAM + 'ca_file = "/x"\n', "c.toml:4: upstream[0].ca_file: is of no use with a base_url of http://"),
        (UPSTREAM + 'client_cert_file = "/x"\n', "c.toml:4: upstream[0].client_cert_file: is of no use"),
        (UPSTREAM.replace("http", "https") + 'client_key_file = "/x"\n', "c.toml:4: upstream[0].client_key_file"),
        ("[server\n", "c.toml: is not valid TOML"),
        (f'key = "{SECRET}\n', "c.toml: is not valid TOML"),
    ],
)
def test_what_cannot_be_meant_is_told_by_its_place_and_without_its_secret(
    tmp_path: Path, text: str, place: str
) -> None:
    found = problems(tmp_path, text, {"K": "k", "EMPTY": " ", "ODD": SECRET + "\u2026"})
    assert any(problem.startswith(place) for problem in found), found


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://x/v1",
        "https://",
        "http:///v1",
        "http://[::1/v1",
        "http://localhost:port/v1",
        "http://x:99999",
    ],
)
def test_a_base_url_that_cannot_be_asked_is_told_at_the_start(tmp_path: Path, url: str) -> None:
    [problem] = problems(tmp_path, f'[[upstream]]\nname = "a"\nbase_url = "{url}"\n')
    assert problem.startswith("c.toml:3: upstream[0].base_url: must be a URL")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.toml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load(path, {})
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load(tmp_path / "bytes.toml", {})


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("HEADWATER_SERVER__PORT", "9001", "server.port", 9001),
        ("HEADWATER_STREAMING__HEARTBEAT_INTERVAL_S", "20", "streaming.heartbeat_interval_s", 20),
        ("HEADWATER_STREAMING__ENABLE_FALLBACK", "false", "streaming.enable_fallback", False),
        ("HEADWATER_SERVER__CORS_ORIGINS", "https://a, https://b,", "server.cors_origins", ("https://a", "https://b")),
        ("HEADWATER_SERVER__CORS_ORIGINS", "", "server.cors_origins", ()),
        ("HEADWATER_STORE__PATH", "/tmp/y.db", "store.path", Path("/tmp/y.db")),
        ("FORCE_NON_STREAMING", "1", "streaming.force_non_streaming", True),
        ("FORCE_NON_STREAMING", "true", "streaming.force_non_streaming", True),
        ("FORCE_NON_STREAMING", "False", "streaming.force_non_streaming", False),
    ],
)
def test_the_environment_overrides_the_file(
    tmp_path: Path, variable: str, value: str, field: str, expected: Any
) -> None:
    text = (
        '[server]\nport = 1\ncors_origins = ["x"]\n[streaming]\nheartbeat_interval_s = 1\nforce_non_streaming = true\n'
    )
    section, name = field.split(".")
    assert getattr(getattr(loaded(tmp_path, text, {variable: value}), section), name) == expected
    assert getattr(getattr(load(None, {variable: value}), section), name) == expected


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FORCE_NON_STREAMING", "maybe"),
        ("HEADWATER_SERVER__PORT", "70000"),
        ("HEADWATER_STORE__PATH", ""),
        ("HEADWATER_SERVER__HOST", "0.0.0.0"),
        ("HEADWATER_SERVER__NOTHING", "1"),
        ("HEADWATER_UPSTREAM__NAME", "1"),
    ],
)
def test_a_problem_of_the_environment_names_the_variable(tmp_path: Path, variable: str, value: str) -> None:
    for found in (problems(tmp_path, "[server]\naccess_log = true\n", {variable: value}),):
        assert len(found) == 1
        assert f"environment variable {variable}" in found[0]


def test_other_variables_are_none_of_our_business() -> None:
    environ = {
        "HEADWATER_KEY": "x",
        "HEADWATER": "y",
        "headwater_server__port": "1",
        "SERVER__PORT": "2",
        "PATH": "z",
    }
    assert load(None, environ) == Settings()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "[::1]", "localhost"])
def test_this_machine_alone_may_be_listened_to(tmp_path: Path, host: str) -> None:
    assert is_loopback(host)
    assert loaded(tmp_path, f'[server]\nhost = "{host}"\n').server.host == host


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.1.1", "example.com", "10.0.0.1", "localhost.example.com"]
)
def test_an_address_that_others_can_reach_is_refused(tmp_path: Path, host: str) -> None:
    """Callers are not authenticated: whoever reaches the port spends the owner's money."""
    assert not is_loopback(host)
    [problem] = problems(tmp_path, f'[server]\nport = 1\nhost = "{host}"\n')
    assert problem.startswith("c.toml:3: server.host: ")
    with pytest.raises(ConfigError):
        with_server(Settings(), host=host)
    assert with_server(Settings(), port=5).server.port == 5


def test_where_keys_are_needed_others_may_reach_it(tmp_path: Path) -> None:
    text = '[server]\nhost = "0.0.0.0"\n[auth]\nmode = "keys"\n'
    assert loaded(tmp_path, text).server.host == "0.0.0.0"
    assert loaded(tmp_path, '[server]\nhost = "::"\n', {"HEADWATER_AUTH__MODE": "keys"}).auth.mode == "keys"
    [problem] = problems(tmp_path, text, {"HEADWATER_AUTH__MODE": "open"})
    assert problem.startswith("c.toml:2: server.host: ")


OWN_SECRETS: list[tuple[str, dict[str, str], str]] = [
    ("", {"HEADWATER_ADMIN_KEY": "short"}, "c.toml:1: auth.admin_key_env: environment variable HEADWATER_ADMIN_KEY"),
    ("", {"HEADWATER_ADMIN_KEY": "ä" * 16}, "c.toml:1: auth.admin_key_env: "),
    ("", {"HEADWATER_KEY_SECRET": "x" * 31}, "c.toml:1: auth.key_secret_env: "),
    (
        'admin_key_env = "MINE"',
        {"HEADWATER_ADMIN_KEY": SECRET},
        "c.toml:2: auth.admin_key_env: environment variable MINE is not",
    ),
    ('key_secret_env = "MINE"', {"MINE": " "}, "c.toml:2: auth.key_secret_env: environment variable MINE is not set"),
    ('admin_key = "x"', {}, "c.toml:2: auth.admin_key: unknown key; did you mean admin_key_env?"),
]


@pytest.mark.parametrize(("text", "environ", "expected"), OWN_SECRETS)
def test_a_secret_of_its_own_must_be_there_and_be_long(
    tmp_path: Path, text: str, environ: dict[str, str], expected: str
) -> None:
    [problem] = problems(tmp_path, f"[auth]\n{text}\n", environ)
    assert problem.startswith(expected)


def test_secrets_of_its_own_are_read_from_the_environment_and_not_printed(tmp_path: Path) -> None:
    assert loaded(tmp_path, "").admin_key is None
    settings = loaded(tmp_path, "", {"HEADWATER_ADMIN_KEY": f" {SECRET}\n", "HEADWATER_KEY_SECRET": SECRET * 2})
    assert (settings.admin_key, settings.key_secret) == (SECRET, SECRET * 2)
    assert with_server(settings, port=5).admin_key == SECRET
    assert SECRET not in repr(settings)
    text = f'admin_key = "{SECRET}"\n'
    [problem] = problems(tmp_path, text)
    assert problem == "c.toml:1: admin_key: unknown key; name an environment variable in auth.admin_key_env instead"


_CONTENT = "HEADWATER_CONTENT_KEYS"
_ONE, _TWO = (base64.b64encode(bytes([number]) * 32).decode() for number in (1, 2))


@pytest.mark.parametrize(
    ("text", "environ", "expected"),
    [
        ("", {_CONTENT: _ONE}, f"content_keys_env: environment variable {_CONTENT}: its part 1 is not a version"),
        ("", {_CONTENT: f"1:{_ONE},2:short"}, f"content_keys_env: environment variable {_CONTENT}: its part 2 is not"),
        ("", {_CONTENT: f"1:{_ONE},"}, f"content_keys_env: environment variable {_CONTENT}: its part 2 is not"),
        ("", {_CONTENT: f"0:{_ONE}"}, f"content_keys_env: environment variable {_CONTENT}: its part 1 is not"),
        (
            "",
            {_CONTENT: f"3:{_ONE},3:{_TWO}"},
            f"content_keys_env: environment variable {_CONTENT}: it holds version 3",
        ),
        (
            'content_keys_env = "MINE"',
            {_CONTENT: f"1:{_ONE}"},
            "content_keys_env: environment variable MINE is not set",
        ),
        (f'content_keys = "1:{_ONE}"', {}, "content_keys: unknown key; did you mean content_keys_env?"),
    ],
)
def test_keys_of_stored_content_must_be_well_formed(
    tmp_path: Path, text: str, environ: dict[str, str], expected: str
) -> None:
    [problem] = problems(tmp_path, f"[ledger]\n{text}\n", environ)
    assert problem.startswith(f"c.toml:{2 if text else 1}: ledger.{expected}")
    assert _ONE not in problem


def test_keys_of_stored_content_are_read_in_their_order_and_not_printed(tmp_path: Path) -> None:
    assert loaded(tmp_path, "").content_keys == ()
    keys = loaded(tmp_path, "", {_CONTENT: f" 7:{_TWO}, 1:{_ONE}\n"}).content_keys
    assert [(key.version, key.secret) for key in keys] == [(7, b"\2" * 32), (1, b"\1" * 32)]
    assert str(keys[0].secret) not in repr(keys)


@given(st.dictionaries(st.integers(1, 999_999_999), st.binary(min_size=32, max_size=32), min_size=1, max_size=4))
@examples(30)
def test_any_keys_of_stored_content_can_be_written_and_read(keys: dict[int, bytes]) -> None:
    text = ",".join(f"{version}:{base64.b64encode(secret).decode()}" for version, secret in keys.items())
    assert {key.version: key.secret for key in parse_content_keys(text)} == keys


def test_no_secret_is_printed(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(SECRET + "\n")
    text = f'[[upstream]]\nname = "a"\nbase_url = "http://user:{SECRET}@x/v1"\n'
    text += f'[[upstream]]\nname = "b"\nbase_url = "http://x/v1"\napi_key_file = "{tmp_path / "key"}"\n'
    text += f'proxy = "http://me:{SECRET}@proxy"\n'
    text += '[[upstream]]\nname = "c"\nbase_url = "http://x/v1"\napi_key_env = "KEY"\n'
    settings = loaded(tmp_path, text, {"KEY": SECRET})
    assert dict(settings.secrets) == {"b": SECRET, "c": SECRET}
    assert dict(settings.proxies) == {"b": f"http://me:{SECRET}@proxy"}
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)


REMOTE = "https://api.example.com/v1"
PROXY = "http://me:secret@proxy.example:3128"


def proxy_of(url: str, environ: dict[str, str], **fields: Any) -> str | None:
    settings = with_upstreams(Settings(), (UpstreamSettings("up", url, **fields),), environ)
    assert "me:secret" not in repr(settings)
    return settings.proxies.get("up")


@pytest.mark.parametrize(
    ("url", "environ", "expected"),
    [
        (REMOTE, {"HTTPS_PROXY": PROXY}, PROXY),
        (REMOTE, {"https_proxy": PROXY}, PROXY),
        (REMOTE, {"https_proxy": PROXY, "HTTPS_PROXY": "http://other", "ALL_PROXY": "http://other"}, PROXY),
        (REMOTE, {"https_proxy": " ", "HTTPS_PROXY": PROXY}, PROXY),
        (REMOTE, {"HTTP_PROXY": PROXY, "NO_PROXY": ""}, None),
        (REMOTE, {"ALL_PROXY": PROXY}, PROXY),
        (REMOTE, {"all_proxy": PROXY, "ALL_PROXY": "http://other"}, PROXY),
        (REMOTE, {"HTTPS_PROXY": "me:secret@proxy.example:3128"}, PROXY),
        (REMOTE, {"HTTPS_PROXY": "https://proxy.example"}, "https://proxy.example"),
        ("http://api.example.com/v1", {"HTTPS_PROXY": PROXY}, None),
        ("http://api.example.com/v1", {"http_proxy": PROXY}, PROXY),
        ("http://api.example.com/v1", {"HTTP_PROXY": PROXY, "ALL_PROXY": "socks5://other"}, PROXY),
        ("http://192.168.1.20:8000/v1", {"HTTP_PROXY": PROXY}, PROXY),
        ("http://localhost:11434/v1", {"ALL_PROXY": PROXY}, None),
        ("http://localhost.:11434/v1", {"ALL_PROXY": PROXY}, None),
        ("http://127.0.0.2:11434/v1", {"ALL_PROXY": PROXY}, None),
        ("https://[::1]:11434/v1", {"ALL_PROXY": PROXY}, None),
    ],
)
def test_the_environment_names_the_outgoing_proxy(url: str, environ: dict[str, str], expected: str | None) -> None:
    assert proxy_of(url, environ) == expected


def test_an_upstreams_own_proxy_goes_before_the_environments() -> None:
    environ = {"ALL_PROXY": "http://other"}
    assert proxy_of(REMOTE, environ, proxy=PROXY) == PROXY
    assert proxy_of("http://127.0.0.1/v1", environ, proxy=PROXY) == PROXY
    assert proxy_of(REMOTE, {"ALL_PROXY": "http://other", "NO_PROXY": "*"}, proxy=PROXY) == PROXY
    assert proxy_of(REMOTE, environ, proxy="none") is None
    assert proxy_of(REMOTE, environ, unix_socket=Path("/run/x")) is None
    assert proxy_of(REMOTE, environ, unix_socket=Path("/run/x"), proxy="none") is None


@pytest.mark.parametrize(
    ("host", "no_proxy", "is_excepted"),
    [
        ("api.example.com", "*", True),
        ("api.example.com", "other, *", True),
        ("api.example.com", "api.example.com", True),
        ("api.example.com", "API.Example.COM", True),
        ("API.example.com", "api.example.com", True),
        ("api.example.com.", "api.example.com", True),
        ("api.example.com", "example.com", True),
        ("api.example.com", ".example.com", True),
        ("api.example.com", "*.example.com", True),
        ("example.com", ".example.com", True),
        ("api.example.com", "a.org example.com b.org", True),
        ("api.example.com", "ample.com", False),
        ("api.example.com", "i.example.com", False),
        ("api.example.com", "api.example", False),
        ("api.example.com", ",, ,.,*.", False),
        ("api.example.com", "api.example.com:443", True),
        ("api.example.com", "example.com:8443", False),
        ("api.example.com:8443", "example.com:8443", True),
        ("api.example.com:8443", "example.com:443", False),
        ("api.example.com:8443", "*:8443", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.3/8", True),
        ("10.1.2.3", "10.0.0.0/16", False),
        ("10.1.2.3:8000", "10.1.2.3:8000", True),
        ("10.1.2.3:8000", "10.1.2.3:80", False),
        ("10.1.2.3", "2.3", False),
        ("10.1.2.3", "10.1.2.3/99, 10.1.2.x", False),
        ("api.example.com", "10.0.0.0/8", False),
        ("[2001:db8::1]", "2001:db8::1", True),
        ("[2001:db8::1]", "[2001:DB8::1]", True),
        ("[2001:db8::1]", "2001:db8::/32", True),
        ("[2001:db8::1]:8000", "[2001:db8::1]:8000", True),
        ("[2001:db8::1]:8000", "[2001:db8::1]:80", False),
        ("[2001:db8::1]", "10.0.0.0/8", False),
    ],
)
def test_no_proxy_takes_hosts_out(host: str, no_proxy: str, is_excepted: bool) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        found = proxy_of(f"https://{host}/v1", {"ALL_PROXY": PROXY, name: no_proxy})
        assert found == (None if is_excepted else PROXY)


def test_a_proxy_of_the_environment_that_cannot_be_used_is_told_once_and_only_where_it_is_used(tmp_path: Path) -> None:
    upstreams = "".join(f'[[upstream]]\nname = "{name}"\nbase_url = "{REMOTE}"\n' for name in "ab")
    environ = {"ALL_PROXY": f"socks5://me:{SECRET}@proxy.example", "HTTP_PROXY": f"http://me:{SECRET}@x/path"}
    assert problems(tmp_path, upstreams, environ) == [
        "environment variable ALL_PROXY: proxies of the kind socks5:// are not supported: only http:// and https:// ones are"
    ]
    with pytest.raises(ConfigError, match="environment variable HTTP_PROXY: must be a URL"):
        with_upstreams(Settings(), (UpstreamSettings("a", "http://x/v1"),), environ)
    assert loaded(tmp_path, UPSTREAM, environ).proxies == {}


def test_upstreams_from_elsewhere_take_the_place_of_those_in_the_file(tmp_path: Path) -> None:
    settings = loaded(tmp_path, UPSTREAM + 'api_key_env = "KEY"\n', {"KEY": SECRET})
    new = UpstreamSettings("b", "http://localhost:1/v1", api_key_env="OTHER")
    changed = with_upstreams(settings, (new,), {"OTHER": "sk-other"})
    assert changed.upstream == (new,)
    assert dict(changed.secrets) == {"b": "sk-other"}
    assert settings.upstream[0].name == "a"
    with pytest.raises(ConfigError, match="must be a URL"):
        with_upstreams(settings, (UpstreamSettings("b", "nonsense"),), {})
    with pytest.raises(ConfigError, match="OTHER is not set"):
        with_upstreams(settings, (new,), {})


@pytest.mark.parametrize(
    ("pattern", "model", "does_match"),
    [
        ("*", "a/b", True),
        ("gpt-*", "gpt-4", True),
        ("gpt-*", "GPT-4", False),
        ("o?", "o1", True),
        ("o?", "o10", False),
        ("a", "ab", False),
    ],
)
def test_a_pattern_is_a_name_with_stars(pattern: str, model: str, does_match: bool) -> None:
    assert matches(pattern, model) is does_match


def test_a_url_is_shown_without_what_is_secret_in_it() -> None:
    assert redact_url(f"https://user:{SECRET}@x.example:8000/v1?key={SECRET}#{SECRET}") == "https://x.example:8000/v1"


def test_the_cache_is_on_and_every_field_can_be_set(tmp_path: Path) -> None:
    assert load(None, {}).cache == CacheSettings()
    assert (CacheSettings().exact, CacheSettings().semantic, CacheSettings().embedder) == (True, True, "minilm")
    text = """
        [cache]
        exact = true
        semantic = false
        ttl_s = 0
        max_entries = 5
        max_mb = 0.5
        memory_mb = 0
        max_temperature = 0
        pace = 50
        embedder = "upstream:a/text-small"
        max_error_rate = 0
        verify_rate = 1
        lookup_budget_ms = 5
        semantic_max_turns = 3
        semantic_max_characters = 100
        [[model]]
        name = "m"
        targets = ["a/b"]
        cache = "semantic"
        cache_ttl_s = 0
    """
    settings = loaded(tmp_path, text + UPSTREAM)
    assert settings.cache == CacheSettings(True, False, 0, 5, 0.5, 0, 0, 50, "upstream:a/text-small", 0, 1, 5, 3, 100)
    assert (settings.model[0].cache, settings.model[0].cache_ttl_s) == ("semantic", 0)
    off = without_cache(settings)
    assert (off.cache.exact, off.cache.semantic, off.model[0].cache, off.model[0].name) == (False, False, None, "m")
    environ = {"HEADWATER_CACHE__PACE": "recorded", "HEADWATER_CACHE__SEMANTIC": "true", "HEADWATER_CACHE__TTL_S": "60"}
    overridden = loaded(tmp_path, text + UPSTREAM, environ).cache
    assert (overridden.pace, overridden.semantic, overridden.ttl_s) == ("recorded", True, 60)
    assert loaded(tmp_path, text + UPSTREAM, {"HEADWATER_CACHE__PACE": "2.5"}).cache.pace == 2.5


@pytest.mark.parametrize(
    ("line", "key", "words"),
    [
        *(
            (f"{key} = {value}", key, "")
            for key, value in [
                ("ttl_s", "-1"), ("ttl_s", "inf"), ("max_entries", "0"), ("max_entries", "1.5"), ("max_mb", "0"),
                ("memory_mb", "-1"), ("pace", "true"), ("pace", "[1]"),
                ("max_temperature", "nan"), ("pace", "0"), ("pace", '"fast"'), ("max_error_rate", "0.6"), ("verify_rate", "2"),
                ("lookup_budget_ms", "-1"), ("semantic_max_turns", "0"), ("semantic_max_characters", "0"), ("exact", '"perhaps"'),
            ]
        ),
        ('pace = "fast"', "pace", 'must be "none", "recorded", or a number of pieces a second'),
        ("exact = false", "semantic", "needs exact = true"),
        ('embedder = "mini"', "embedder", "'mini' is no embedder: it is 'minilm', 'onnx:' and a file, or 'upstream:'"),
        ('embedder = "onnx:"', "embedder", "'onnx:' is no embedder"),
        ('embedder = "upstream:a"', "embedder", "'upstream:a' is no embedder"),
        ('embedder = "upstream:aa/m"', "embedder", "no upstream is named 'aa'; did you mean a?"),
        ("ttl = 5", "ttl", "unknown key; did you mean ttl_s?"),
    ],
)  # fmt: skip
def test_what_a_cache_cannot_be_is_told(tmp_path: Path, line: str, key: str, words: str) -> None:
    told = problems(tmp_path, f"[cache]\n{line}\n{UPSTREAM}")
    assert all(problem.startswith("c.toml:") and f" cache.{key}: " in problem for problem in told)
    assert words in told[0]
    assert len(told) == 1


def test_prices_are_read_to_the_last_digit(tmp_path: Path) -> None:
    text = """
        [[price]]
        models = ["lab/*", "qwen"]
        input_usd_per_million = 0.1
        output_usd_per_million = 2
        cached_input_usd_per_million = 0.000001
        [[price]]
        models = ["*"]
        markup_percent = 12.5
    """
    assert loaded(tmp_path, text).price == (
        PriceSettings(("lab/*", "qwen"), Decimal("0.1"), Decimal(2), Decimal("0.000001")),
        PriceSettings(("*",), markup_percent=Decimal("12.5")),
    )


BOTH = "input_usd_per_million = 1\noutput_usd_per_million = 1\n"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("", "1: price[0]: says neither a price nor a markup"),
        ("input_usd_per_million = 1", "1: price[0]: has only one of input_usd_per_million and output_usd_per_million"),
        ("output_usd_per_million = 1", "1: price[0]: has only one of input_usd_per_million and output_usd_per_million"),
        ("cached_input_usd_per_million = 1\nmarkup_percent = 1", "1: price[0]: has cached_input_usd_per_million without"),
        (f"{BOTH}cached_input_usd_per_million = 0.0000001", "5: price[0].cached_input_usd_per_million: "),
        (f"{BOTH}cached_input_usd_per_million = -1", "5: price[0].cached_input_usd_per_million: "),
        (f"{BOTH}cached_input_usd_per_million = 10001", "5: price[0].cached_input_usd_per_million: "),
        ("input_usd_per_million = true\noutput_usd_per_million = 1", "3: price[0].input_usd_per_million: "),
        ("markup_percent = inf", "3: price[0].markup_percent: "),
        ("markup_percent = -5", "3: price[0].markup_percent: "),
        (f"{BOTH}markup = 5", "5: price[0].markup: unknown key; did you mean markup_percent?"),
    ],
)  # fmt: skip
def test_what_a_price_cannot_be_is_told_once(tmp_path: Path, lines: str, problem: str) -> None:
    (told,) = problems(tmp_path, f'[[price]]\nmodels = ["a"]\n{lines}')
    assert told.startswith(f"c.toml:{problem}")
