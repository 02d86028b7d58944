"""The command, as a process of its own: what it prints, what it exits with, and what it leaves behind.

Every process runs with warnings as errors, in a directory of its own, and without the provider keys of whoever runs
the tests. To start one takes a second of work: a command that says what is wrong, or what the settings are, and ends
before it opens or asks anything, is called here (`told`).
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiohttp
import pytest

from proxy.__main__ import main
from proxy.upstream.discovery import PROVIDERS
from tests.fakes.upstream import DONE, FakeUpstream, Received, Wire, answer, finish, refuse, role, stream, text
from tests.waiting import until

_LONG = 30
_ROOT = Path(__file__).parents[1]
_PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}
_NOT_FOR_THE_CHILD = (
    {provider.api_key_env for provider in PROVIDERS}
    | {"NOTIFY_SOCKET", "WATCHDOG_USEC"}
    | _PROXIES
    | {name.lower() for name in _PROXIES}
)


class Command:
    """A running `headwater`. Its standard output is read by `line` and `rest`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @property
    def _stdout(self) -> asyncio.StreamReader:
        assert self.process.stdout is not None
        return self.process.stdout

    async def line(self, beginning: str = "") -> str:
        """The next line that begins so, without its end."""
        async with asyncio.timeout(_LONG):
            while line := (await self._stdout.readline()).decode():
                if line.startswith(beginning):
                    return line.rstrip("\n")
        raise AssertionError(f"no line begins with {beginning!r}; stderr: {await self.stderr()}")

    async def rest(self) -> str:
        async with asyncio.timeout(_LONG):
            return (await self._stdout.read()).decode()

    async def stderr(self) -> str:
        assert self.process.stderr is not None
        async with asyncio.timeout(_LONG):
            return (await self.process.stderr.read()).decode()

    async def exit_code(self) -> int:
        async with asyncio.timeout(_LONG):
            return await self.process.wait()

    def has_open(self, path: Path) -> bool:
        links = Path(f"/proc/{self.process.pid}/fd").iterdir()
        return str(path) in [os.path.realpath(link) for link in links]

    async def base(self) -> str:
        """Where it listens, when it does."""
        return (await self.line("headwater listening on ")).removeprefix("headwater listening on ")


def _kept() -> dict[str, str]:
    """The environment, without what would be settings."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_FOR_THE_CHILD and not name.startswith("HEADWATER_")
    }


@asynccontextmanager
async def command(
    directory: Path, *arguments: str, out: Any = asyncio.subprocess.PIPE, **environ: str
) -> AsyncIterator[Command]:
    """`headwater ARGUMENTS` in `directory`; killed at the end of the block if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "proxy", *arguments),
        cwd=directory,
        env={
            **_kept(),
            "PYTHONPATH": str(_ROOT),
            "HEADWATER_STORE__PATH": str(directory / "headwater.db"),
            **environ,
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=out,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Command(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        # Read to their ends, or the pipes are still open when the event loop closes.
        async with asyncio.timeout(_LONG):
            await process.communicate()


async def run(directory: Path, *arguments: str, **environ: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command that ends by itself."""
    async with command(directory, *arguments, **environ) as running:
        async with asyncio.timeout(_LONG):
            out, error = await running.process.communicate()
        assert running.process.returncode is not None
        return running.process.returncode, out.decode(), error.decode()


Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """Exit code, standard output and standard error of a command, called in this process, in the test's directory."""

    def call(*arguments: str, **environ: str) -> tuple[int, str, str]:
        with patch.dict(os.environ, _kept() | environ, clear=True):
            try:
                code = main(arguments)
            except SystemExit as end:  # argparse's own
                code = int(end.code or 0)
        return code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    return call


async def ask(base: str, **members: Any) -> bytes:
    body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], **members}
    async with aiohttp.ClientSession() as client, client.post(f"{base}/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.read()


async def ended(pid: int) -> None:
    """Wait until a process, whoever's child it is, has ended."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    has_ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(watched, has_ended.set)
    try:
        async with asyncio.timeout(_LONG):
            await has_ended.wait()
    finally:
        loop.remove_reader(watched)
        os.close(watched)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


# ---------------------------------------------------------------------- serve


async def test_serve_says_where_it_listens_and_how_to_try_it(tmp_path: Path, upstream: FakeUpstream) -> None:
    async with command(tmp_path, "serve", "--upstream", upstream.url, "--port", "0") as running:
        first = await running.line()
        assert re.fullmatch(r"headwater listening on http://127\.0\.0\.1:\d+/v1", first)
        base = first.rpartition(" ")[2]
        assert await running.line() == f"  upstream default: {upstream.url}, models *, no API key (configured)"
        assert (await running.line()).startswith(f"try:  curl -N {base}/chat/completions ")

        assert (await ask(base, stream=True)).endswith(DONE)
        assert re.match(
            r"\S+Z call \S+ model=model-a target=default/model-a mode=relay status=ok", await running.line()
        )

        running.process.send_signal(signal.SIGTERM)
        assert await running.exit_code() == 0
        assert await running.stderr() == ""


async def test_the_curl_line_that_is_printed_works(tmp_path: Path, upstream: FakeUpstream) -> None:
    alias = '[[model]]\nname = "fast"\ntargets = ["up/model-a"]\n'
    (tmp_path / "h.toml").write_text(f'[[upstream]]\nname = "up"\nbase_url = "{upstream.url}"\n{alias}')
    async with command(tmp_path, "serve", "--config", "h.toml", "--port", "0") as running:
        line = (await running.line("try:  ")).removeprefix("try:  ")
        curl = await asyncio.create_subprocess_shell(
            line, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(_LONG):
            out, _ = await curl.communicate()
    assert curl.returncode == 0
    assert out.endswith(DONE)


async def test_the_config_file_is_found_in_the_directory_and_named_by_the_environment(
    tmp_path: Path, upstream: FakeUpstream, told: Told
) -> None:
    text_of_file = f'[server]\nport = 0\n[[upstream]]\nname = "found"\nbase_url = "{upstream.url}"\n'
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "headwater.toml").write_text(text_of_file)
    (tmp_path / "other.toml").write_text(text_of_file.replace("found", "named"))
    async with command(tmp_path, "serve") as running:
        assert (await running.line("  upstream")).startswith("  upstream found: ")
    assert "\n  upstream named: " in told("check", HEADWATER_CONFIG="other.toml")[1]
    assert "\n  upstream found: " in told("check", HEADWATER_CONFIG="")[1]


async def test_with_nothing_configured_there_is_something_to_try(tmp_path: Path) -> None:
    """The demo upstream, or a model server that happens to run on the machine the tests run on."""
    async with command(tmp_path, "serve", "--port", "0") as running:
        base = await running.base()
        origin = await running.line("  upstream ")
        if "found on this machine" in origin:
            pytest.skip("a model server runs on this machine")
        assert "nothing else was found, so this demo was started" in origin

        said = await ask(base, model="demo-stream", stream=True)
        assert b"Hello" in said
        assert said.endswith(DONE)
        assert (await ask(base, model="demo-json-only", stream=True)).endswith(DONE)
        assert (await ask(base, model="demo-refuses-stream", stream=True)).endswith(DONE)

        (child,) = children(running.process.pid)
        running.process.send_signal(signal.SIGINT)
        assert await running.exit_code() == 0
        await ended(child)


async def test_the_demo_ends_with_a_proxy_that_was_killed(tmp_path: Path) -> None:
    async with command(tmp_path, "serve", "--port", "0") as running:
        await running.base()
        if "demo" not in await running.line("  upstream "):
            pytest.skip("a model server runs on this machine")
        (child,) = children(running.process.pid)
        running.process.kill()
        await running.exit_code()
        await ended(child)


async def test_a_key_in_the_environment_is_enough(tmp_path: Path) -> None:
    async with command(tmp_path, "serve", "--port", "0", GROQ_API_KEY="gsk-very-secret") as running:
        line = await running.line("  upstream ")
    assert line == (
        "  upstream groq: https://api.groq.com/openai/v1, models * (found by its API key in the environment)"
    )


async def test_credentials_are_never_printed(tmp_path: Path, told: Told) -> None:
    """Not those in a URL, not a key, not on standard error when nobody answers."""
    secrets = ("user-name", "pass-word", "sk-very-secret")
    url = "http://user-name:pass-word@127.0.0.1:9/v1"
    (tmp_path / "h.toml").write_text(
        f'[[upstream]]\nname = "up"\nbase_url = "{url}"\n'
        '[[upstream]]\nname = "up2"\nbase_url = "http://127.0.0.1:9/v1"\napi_key_env = "UP_KEY"\n'
    )
    for arguments in (["--config", "h.toml"], ["--upstream", url]):
        async with command(tmp_path, "serve", *arguments, "--port", "0", UP_KEY="sk-very-secret") as running:
            base = await running.base()
            async with aiohttp.ClientSession() as client:
                body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}]}
                async with client.post(f"{base}/chat/completions", json=body) as response:
                    assert response.status == 502
                    said = await response.text()
                async with client.get(f"{base}/models") as response:
                    said += await response.text()
            running.process.send_signal(signal.SIGTERM)
            said += await running.rest() + await running.stderr()
        code, out, error = told("check", *arguments, UP_KEY="sk-very-secret")
        assert code == 0
        assert "127.0.0.1:9" in out
        for secret in secrets:
            assert secret not in said + out + error


def test_credentials_are_not_printed_with_what_is_wrong_about_them(told: Told) -> None:
    for url in ("http://user-name:pass-word@/v1", "http://user-name:pass-word@127.0.0.1:9/v1?key=query-key"):
        _, out, error = told("check", "--upstream", url)
        for secret in ("user-name", "pass-word", "query-key"):
            assert secret not in out + error


async def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path, upstream: FakeUpstream) -> None:
    code, out, error = await run(tmp_path, "serve", "--upstream", upstream.url, "--port", str(upstream.port))
    assert (code, out) == (2, "")
    assert error.startswith(f"headwater: server.port: 127.0.0.1:{upstream.port} cannot be listened on: ")
    assert error.endswith("ddress already in use\n")
    assert error.count("\n") == 1


async def test_a_database_that_cannot_be_used_is_said_in_one_line(tmp_path: Path, upstream: FakeUpstream) -> None:
    (tmp_path / "a-file").write_text("")
    code, out, error = await run(
        *(tmp_path, "serve", "--upstream", upstream.url, "--port", "0"),
        HEADWATER_STORE__PATH=str(tmp_path / "a-file" / "headwater.db"),
    )
    assert (code, out) == (2, "")
    assert error.startswith("headwater: ")
    assert "store.path" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("port", ["-1", "65536", "eighty", ""])
def test_a_bad_port_is_refused(told: Told, port: str) -> None:
    code, out, error = told("serve", "--upstream", "http://127.0.0.1:9/v1", f"--port={port}")
    assert (code, out) == (2, "")
    assert "--port" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [["serve", "--prot", "0"], ["dance"], [], ["check", "--port", "1"], ["keys"]])
def test_what_is_not_known_is_refused(told: Told, arguments: list[str]) -> None:
    code, out, error = told(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith("usage: headwater")


def test_an_address_that_others_can_reach_is_refused(told: Told) -> None:
    code, _, error = told("serve", "--upstream", "http://127.0.0.1:9/v1", "--host", "0.0.0.0", "--port", "0")
    assert code == 2
    assert "callers are not authenticated" in error


@pytest.mark.parametrize(
    "url", ["api.openai.com/v1", "ftp://127.0.0.1/v1", "http://", "http://[::1/v1", "http://a:b/v1"]
)
def test_an_upstream_that_is_no_url_is_refused(told: Told, url: str) -> None:
    code, out, error = told("check", "--upstream", url)
    assert (code, out) == (2, "")
    assert error.startswith("headwater: ")
    assert "Traceback" not in error


async def test_ctrl_c_ends_a_command_without_a_word(tmp_path: Path, upstream: FakeUpstream) -> None:
    async def interrupt(_: Received, wire: Wire) -> None:
        running.process.send_signal(signal.SIGINT)
        await wire.gone()

    upstream.plays(interrupt)
    async with command(tmp_path, "probe", "--upstream", upstream.url, "model-a") as running:
        assert await running.exit_code() == 130
        assert await running.stderr() == ""


@asynccontextmanager
async def opening(directory: Path) -> AsyncIterator[tuple[Command, sqlite3.Connection]]:
    """A command that waits for the database, and the connection that has locked that."""
    path = directory / "headwater.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.executescript("PRAGMA journal_mode=WAL; BEGIN IMMEDIATE;")
        async with command(directory, "keys", "list") as running:

            async def has_opened() -> bool:
                return running.has_open(path)

            await until(has_opened, bool)
            yield running, other


async def test_ctrl_c_ends_a_command_that_opens_the_database(tmp_path: Path) -> None:
    async with opening(tmp_path) as (running, other):
        running.process.send_signal(signal.SIGINT)
        other.execute("ROLLBACK")
        assert await running.exit_code() == 130
        assert await running.stderr() == ""


async def test_a_second_ctrl_c_ends_a_command_at_once(tmp_path: Path) -> None:
    """It waits for the database until the end of the test, and not for the 5 s after which it would give up."""
    async with opening(tmp_path) as (running, _):

        async def interrupt() -> int | None:
            with suppress(ProcessLookupError):
                running.process.send_signal(signal.SIGINT)
            return running.process.returncode

        assert await until(interrupt, lambda code: code is not None) == 130
        assert await running.stderr() == ""


async def test_the_version_is_printed(tmp_path: Path) -> None:
    code, out, _ = await run(tmp_path, "--version")
    assert code == 0
    assert re.fullmatch(r"headwater \d+\.\d+\S*\n", out)


# ---------------------------------------------------------------------- keys, teams


async def test_a_team_and_its_keys_are_made_from_the_shell(tmp_path: Path) -> None:
    assert (await run(tmp_path, "teams", "create", "alpha", "--model", "gpt-*"))[0] == 0
    code, key, error = await run(
        *(tmp_path, "keys", "create", "--team", "alpha", "--name", "ci", "--expires-in", "3"),
        HEADWATER_AUTH__MODE="keys",
    )
    assert code == 0
    assert re.fullmatch(r"sk-hw-[0-9A-Za-z]{39}\n", key), "a script can take it from there"
    assert error == "headwater: a key of the team alpha; this is the only time it is shown\n"
    code, listed, error = await run(tmp_path, "keys", "list", "--team", "alpha")
    assert (code, error) == (0, "")
    assert re.fullmatch(rf"KEY .*\n{key[:14]}  alpha  active  \d{{4}}-\d\d-\d\d \d\d:\d\dZ  \*       ci\n", listed)
    _, listed, _ = await run(tmp_path, "teams", "list")
    assert [line.split() for line in listed.splitlines()[1:]] == [
        ["alpha", "local", "active", "gpt-*", "alpha"],
        ["local", "local", "active", "*", "Local"],
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["keys", "create", "--team", "no"], "headwater: There is no team 'no'."),
        (["keys", "create", "--parallel-calls", "0"], "headwater: 'parallel_calls': "),
    ],
)
async def test_a_key_that_cannot_be_made_is_said_in_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    code, out, error = await run(tmp_path, *arguments)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(words)


# ---------------------------------------------------------------------- check


async def test_check_shows_what_the_settings_say(tmp_path: Path) -> None:
    (tmp_path / "h.toml").write_text(
        '[[upstream]]\nname = "up"\nbase_url = "https://up.example/v1"\napi_key_env = "UP_KEY"\nmodels = ["a-*", "b"]\n'
        '[[model]]\nname = "fast"\ntargets = ["up/a-1", "up/b"]\n'
    )
    code, out, error = await run(tmp_path, "check", "--config", "h.toml", UP_KEY="sk-secret")
    assert (code, error) == (0, "")
    assert out == (
        "headwater: the settings are good\n"
        "  upstream up: https://up.example/v1, models a-*, b\n"
        "  model fast -> up/a-1, up/b\n"
    )


def test_what_a_terminal_has_no_letters_for_is_written_otherwise(tmp_path: Path, told: Told) -> None:
    (tmp_path / "h.toml").write_text('[[model]]\nname = "schön"\ntargets = ["up/a"]\n', "utf-8")
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="ascii")) as terminal:
        assert told("check", "--config", "h.toml")[::2] == (0, "")
    terminal.seek(0)
    assert terminal.read().endswith("\n  model sch\\xf6n -> up/a\n")


def test_a_reader_that_has_seen_enough_is_no_trouble(told: Told) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, redirect_stdout(pipe):
        assert told("check") == (1, "", "")


def test_check_shows_the_way_to_each_upstream(tmp_path: Path, told: Told) -> None:
    (tmp_path / "h.toml").write_text(
        '[[upstream]]\nname = "far"\nbase_url = "https://up.example/v1"\n'
        '[[upstream]]\nname = "near"\nbase_url = "https://lab.example/v1"\n'
        '[[upstream]]\nname = "local"\nbase_url = "http://localhost/v1"\nunix_socket = "/run/llama.sock"\n'
    )
    environ = {"HTTPS_PROXY": "http://me:secret@proxy.example:3128", "NO_PROXY": "lab.example"}
    code, out, error = told("check", "--config", "h.toml", **environ)
    assert (code, error) == (0, "")
    assert out == (
        "headwater: the settings are good\n"
        "  upstream far: https://up.example/v1 through http://proxy.example:3128, models *, no API key\n"
        "  upstream near: https://lab.example/v1, models *, no API key\n"
        "  upstream local: http://localhost/v1 at /run/llama.sock, models *, no API key\n"
    )


async def test_files_that_cannot_be_used_are_named_before_anything_is_asked(tmp_path: Path, told: Told) -> None:
    (tmp_path / "h.toml").write_text(
        "[server]\nport = 0\n"
        '[[upstream]]\nname = "a"\nbase_url = "https://up.example/v1"\nca_file = "missing.pem"\n'
        '[[upstream]]\nname = "b"\nbase_url = "https://up.example/v1"\nclient_cert_file = "h.toml"\n'
    )
    error = (
        "headwater: upstream 'a': ca_file: missing.pem cannot be read: No such file or directory\n"
        "headwater: upstream 'b': client_cert_file: h.toml and h.toml hold no certificate and key in PEM form\n"
    )
    assert told("check", "--config", "h.toml") == (2, "", error)
    for name in ("serve", "probe"):
        assert await run(tmp_path, name, "--config", "h.toml") == (2, "", error)


async def test_check_says_everything_that_is_wrong_at_once(tmp_path: Path) -> None:
    (tmp_path / "h.toml").write_text(
        '[server]\nport = 99999\nhots = "127.0.0.1"\n'
        "[streaming]\nidle_timeout_s = 0\n"
        '[[upstream]]\nname = "local"\nbase_url = "https://up.example/v1"\napi_key_env = "NOT_SET"\n'
        '[[model]]\nname = "fast"\ntargets = ["locl/a-1"]\n'
    )
    code, out, error = await run(
        tmp_path, "check", "--config", "h.toml", HEADWATER_STREAMING__MAX_RETRIES="many", HEADWATER_SERVER__PROT="1"
    )
    assert (code, out) == (2, "")
    lines = error.splitlines()
    assert all(line.startswith("headwater: ") for line in lines)
    for said in (
        "h.toml:2: server.port: ",
        "h.toml:3: server.hots: unknown key; did you mean host?",
        "h.toml:5: streaming.idle_timeout_s: ",
        "NOT_SET is not set",
        "no upstream is named 'locl'; did you mean local?",
        "environment variable HEADWATER_STREAMING__MAX_RETRIES: ",
        "environment variable HEADWATER_SERVER__PROT: unknown field; did you mean HEADWATER_SERVER__PORT?",
    ):
        assert sum(said in line for line in lines) == 1, (said, lines)
    assert len(lines) == 7


@pytest.mark.parametrize("words", ["port = = 1", '[server]\nport = "\xff'])
def test_check_names_a_file_that_is_no_toml(tmp_path: Path, told: Told, words: str) -> None:
    (tmp_path / "h.toml").write_bytes(words.encode("latin-1"))
    code, _, error = told("check", "--config", "h.toml")
    assert code == 2
    assert error.startswith("headwater: h.toml: is not valid TOML: ")
    assert error.count("\n") == 1


def test_check_names_a_file_that_is_not_there(told: Told) -> None:
    code, _, error = told("check", "--config", "h.toml")
    assert (code, error) == (2, "headwater: h.toml: cannot be read: No such file or directory\n")


# ---------------------------------------------------------------------- probe


def _by_model(**plays: Any) -> Callable[[Received, Wire], Any]:
    async def play(request: Received, wire: Wire) -> None:
        await plays[request.json()["model"].replace("-", "_")](request, wire)

    return play


async def _streams_if_asked(request: Received, wire: Wire) -> None:
    play = stream(role(), text("Hi"), finish()) if request.json().get("stream") else answer()
    await play(request, wire)


async def _refuses_to_stream(request: Received, wire: Wire) -> None:
    await (refuse(400, "stream") if request.json().get("stream") else answer())(request, wire)


async def test_probe_finds_out_who_streams(tmp_path: Path, upstream: FakeUpstream) -> None:
    upstream.plays(
        _by_model(streams=_streams_if_asked, refuses=_refuses_to_stream, json_only=answer(), broken=refuse(500))
    )
    code, out, error = await run(
        *(tmp_path, "probe", "--upstream", upstream.url, "streams", "refuses", "json-only", "broken")
    )

    assert code == 0
    assert re.fullmatch(r"\S+ \S+ INFO probe-3: default/broken failed \(.*\), default/broken is asked\n", error)
    heading, *rows = out.splitlines()
    assert heading.split() == ["MODEL", "STREAMS", "FIRST", "TOKEN", "ms", "AGE", "s", "EVIDENCE"]
    found = {row.split()[0]: row.split()[1:] for row in rows}
    assert [(name, columns[0]) for name, columns in found.items()] == [
        ("default/streams", "yes"),
        ("default/refuses", "no"),
        ("default/json-only", "no"),
        ("default/broken", "unknown"),
    ]
    assert re.search(r"default/refuses .* answered 400.*: Unsupported value\n", out)
    assert "answered stream: true with one JSON body" in out
    assert found["default/streams"][1].isdigit()
    assert found["default/broken"][1:3] == ["-", "-"]
    assert upstream.requests[0].json()["max_tokens"] == 1


async def test_probe_takes_the_models_that_the_upstream_lists(tmp_path: Path, upstream: FakeUpstream) -> None:
    upstream.plays(_streams_if_asked)
    code, out, _ = await run(tmp_path, "probe", "--upstream", upstream.url)
    assert code == 0
    assert [row.split()[:2] for row in out.splitlines()[1:]] == [
        ["default/model-a", "yes"],
        ["default/model-b", "yes"],
    ]


async def test_probe_asks_otherwise_where_max_tokens_is_refused(tmp_path: Path, upstream: FakeUpstream) -> None:
    """OpenAI's reasoning models take `max_completion_tokens` only
    (https://platform.openai.com/docs/api-reference/chat/create)."""

    async def play(request: Received, wire: Wire) -> None:
        if "max_tokens" in request.json():
            words = "Unsupported parameter: 'max_tokens' is not supported with this model."
            await refuse(400, "max_tokens", words, "unsupported_parameter")(request, wire)
        else:
            await _streams_if_asked(request, wire)

    upstream.plays(play)
    code, out, _ = await run(tmp_path, "probe", "--upstream", upstream.url, "model-a")
    assert code == 0
    assert out.splitlines()[1].split()[:2] == ["default/model-a", "yes"]


async def test_what_probe_found_is_known_to_the_proxy(tmp_path: Path, upstream: FakeUpstream) -> None:
    upstream.plays(_refuses_to_stream)
    assert (await run(tmp_path, "probe", "--upstream", upstream.url, "model-a"))[0] == 0
    upstream.requests.clear()
    async with command(tmp_path, "serve", "--upstream", upstream.url, "--port", "0") as running:
        assert (await ask(await running.base(), stream=True)).endswith(DONE)
    assert ["stream" in request.json() for request in upstream.requests] == [False]


async def test_probe_of_nobody_fails(tmp_path: Path) -> None:
    code, out, _ = await run(tmp_path, "probe", "--upstream", "http://127.0.0.1:9/v1", "model-a")
    assert code == 1
    assert out.splitlines()[1].split()[:2] == ["default/model-a", "unknown"]


async def test_probe_of_a_model_that_no_upstream_serves_is_refused(tmp_path: Path, upstream: FakeUpstream) -> None:
    (tmp_path / "h.toml").write_text(f'[[upstream]]\nname = "up"\nbase_url = "{upstream.url}"\nmodels = ["gpt-*"]\n')
    code, out, error = await run(tmp_path, "probe", "--config", "h.toml", "claude")
    assert (code, out) == (2, "")
    assert "claude" in error
    assert "Traceback" not in error


async def test_json_lines_are_json_lines(tmp_path: Path, upstream: FakeUpstream) -> None:
    async with command(
        *(tmp_path, "serve", "--upstream", upstream.url, "--port", "0"), HEADWATER_SERVER__LOG_FORMAT="json"
    ) as running:
        base = await running.base()
        await ask(base)
        row = json.loads(await running.line("{"))
    assert (row["model"], row["mode"], row["status"]) == ("model-a", "whole", "ok")
