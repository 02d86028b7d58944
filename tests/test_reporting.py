"""`headwater usage` and `headwater backup`: what they print, what they refuse, and that they only read."""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.__main__ import main
from proxy.chat import Status
from proxy.server import reports
from proxy.store.backup import backup
from proxy.store.calls import End, NewCall
from proxy.store.credits import Cause
from proxy.store.migrations import MAIN
from tests.store.ledgers import NOW, check_books, done, look, new, opened, record, starting
from tests.test_docs import ROOT

PAGE = ROOT / "docs" / "usage.md"
DAY_S = 86_400

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "headwater.db"


@pytest.fixture
def run(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a command on the database: its exit code, and what it prints."""
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HEADWATER_STORE__PATH", path.name)

    def run_it(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capsys.readouterr()

    return run_it


async def fill(path: Path, *calls: tuple[NewCall, End]) -> None:
    async with starting(path) as start:
        process = await start()
        for call, end in calls:
            record(process.ledger, call, end)
        await process.stop()


@pytest_asyncio.fixture
async def calls(path: Path) -> None:
    """The calls of which docs/usage.md tells."""
    first = (reports.days("2026-11-19", "2026-11-21", NOW).first + 0.5) * DAY_S
    made = []
    for team, day, model, count, prompt, completion, price, status in (
        ("alpha", 0, "gpt-4o-mini", 3, 1_200, 400, 420, Status.OK),
        ("alpha", 1, "gpt-4o", 2, 52_100, 3_050, 160_750, Status.OK),
        ("alpha", 2, "gpt-4o", 1, 9_000, 120, 23_700, Status.CANCELLED),
        ("beta", 1, "our-own-llama", 4, 30_000, 8_000, None, Status.OK),
        ("beta", 2, "gpt-4o", 1, 410_000, 11_000, 1_135_000, Status.OK),
    ):
        end = done(status=status, prompt_tokens=prompt, completion_tokens=completion, attempts=1)
        end = end._replace(cost_microusd=price, price_microusd=price)
        made += [(new(team=team, key=f"sk-hw-{team}", model=model, opened_at=first + day * DAY_S), end)] * count
    await fill(path, *made)


# ---------------------------------------------------------------------- usage


def console() -> list[tuple[list[str], str]]:
    """The commands that docs/usage.md shows with what they print."""
    shown = re.findall(r"^```console\n\$ headwater (usage .*)\n((?:.*\n)*?)```$", PAGE.read_text("utf-8"), re.MULTILINE)
    return [(shlex.split(command), output) for command, output in shown]


@pytest.mark.usefixtures("calls")
def test_what_the_page_shows_is_what_is_printed(run: Run) -> None:
    assert len(console()) >= 2
    for command, output in console():
        assert run(*command) == (0, output, ""), command


@pytest.mark.usefixtures("calls")
def test_csv_is_that_of_the_route(run: Run) -> None:
    code, said, _ = run(
        "usage", "--by", "team", "--from", "2026-11-19", "--to", "2026-11-21", "--csv", "--key", "sk-hw-beta"
    )
    assert (code, said.splitlines()[1:]) == (
        0,
        [
            "beta,5,0,4,5,530000,43000,0,0,573000,1.135000,1.135000,0.000000",
            "TOTAL,5,0,4,5,530000,43000,0,0,573000,1.135000,1.135000,0.000000",
        ],
    )


async def test_names_that_clients_chose_do_nothing_to_a_terminal(path: Path, run: Run) -> None:
    await fill(path, (new(model="a\x1b[2J\n\u202eb"), done()))
    code, said, _ = await asyncio.to_thread(
        run, "usage", "--by", "model,user", "--from", "0", "--to", str(int(NOW * 2))
    )
    assert code == 0
    assert said.splitlines()[1].startswith("a\\x1b[2J\\n\\u202eb  -         1 ")


async def test_it_only_reads_and_takes_no_part_while_others_write(path: Path, run: Run) -> None:
    async with starting(path) as start:
        process = await start()
        ledger = process.ledger
        call = await opened(ledger, new())
        record(ledger, new("call-2"), done())
        await ledger.settled()
        before = await process.connection.data_version(), look(path, "SELECT * FROM process")
        code, said, _ = await asyncio.to_thread(run, "usage", "--from", "0", "--to", str(int(NOW * 2)))
        assert (code, said.splitlines()[-1].split()[:2]) == (0, ["TOTAL", "1"])
        assert (await process.connection.data_version(), look(path, "SELECT * FROM process")) == before
        ledger.close_call(call, done())
    check_books(path)


async def test_what_a_killed_proxy_left_in_its_log_is_told_too(path: Path, run: Run) -> None:
    killed = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _WRITE_AND_DIE, str(path)), cwd=ROOT, stdout=asyncio.subprocess.DEVNULL
    )
    assert await killed.wait() == -signal.SIGKILL
    left = contents(path)
    assert left[1]
    code, said, _ = await asyncio.to_thread(run, "usage", "--by", "team", "--from", "0", "--to", str(int(NOW * 2)))
    assert (code, said.splitlines()[-1].split()[:2]) == (0, ["TOTAL", "1"])
    assert contents(path) == left, "to tidy up is the proxy's own"
    assert (await asyncio.to_thread(run, "backup", "copy.db"))[0] == 0
    assert look(path.with_name("copy.db"), "SELECT team FROM call") == [("red",)]


def contents(path: Path) -> tuple[bytes, bytes]:
    """A database and its log."""
    return path.read_bytes(), path.with_name(f"{path.name}-wal").read_bytes()


_WRITE_AND_DIE = """
import asyncio, os, pathlib, signal, sys
from tests.store.ledgers import done, new, record, starting

async def main():
    async with starting(pathlib.Path(sys.argv[1])) as start:
        ledger = (await start()).ledger
        record(ledger, new(), done())
        await ledger.settled()
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_without_calls_it_says_so(run: Run, path: Path) -> None:
    code, out, error = run("usage")
    assert (code, out) == (2, "")
    assert error == "headwater: store.path: there is no headwater.db: nothing was ever called here\n"
    assert not path.exists(), "who only reads makes none"
    asyncio.run(fill(path))
    code, out, error = run("usage", "--from", "2026-11-01", "--to", "2026-11-02")
    assert (code, len(out.splitlines())) == (0, 2)
    assert error == "headwater: the ledger knows of no such calls from 2026-11-01 to 2026-11-02\n"


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (1, "was written by an older version of the proxy, and is brought up to date when the proxy starts"),
        (len(MAIN) + 1, "was written by a newer version of the proxy"),
    ],
)
def test_a_database_of_another_version_is_left_alone(run: Run, path: Path, version: int, words: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={version}")
    before = path.read_bytes()
    assert run("usage") == (2, "", f"headwater: store.path: headwater.db {words}\n")
    assert path.read_bytes() == before


def test_what_is_no_database_is_said(run: Run, path: Path) -> None:
    path.write_bytes(b"somebody's notes\n" * 100)
    assert run("usage") == (2, "", "headwater: store.path: headwater.db cannot be read: file is not a database\n")
    assert run("backup", "copy.db") == (
        *(1, ""),
        "headwater: headwater.db could not be copied to copy.db: file is not a database\n",
    )
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--by", "teams"], "'--by' must be one or several of day, team, key, "),
        (["--from", "1.2.2026"], "'--from' must be a day as YYYY-MM-DD (UTC)"),
        (["--to", "2026-13-01"], "'--to' must be a day as YYYY-MM-DD (UTC)"),
        (
            ["--from", "2026-11-21", "--to", "2026-11-20"],
            "'--from' must not be later than '--to', which is 2026-11-20.",
        ),
    ],
)
def test_what_cannot_be_told_is_said_in_one_line(run: Run, arguments: list[str], words: str) -> None:
    code, out, error = run("usage", *arguments)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"headwater: {words}")


def test_a_path_that_the_system_refuses_is_said_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it refuses what stands in a directory of somebody else's."""
    name = "n" * 300
    monkeypatch.setenv("HEADWATER_STORE__PATH", name)
    words = f"[Errno 36] File name too long: '{name}'"
    assert run("usage") == (2, "", f"headwater: store.path: {name} cannot be read: {words}\n")
    assert run("backup", "a.db") == (1, "", f"headwater: {name} could not be copied to a.db: {words}\n")


# ---------------------------------------------------------------------- backup


@pytest.mark.usefixtures("calls")
def test_a_backup_says_where_it_is_and_is_for_its_owner_alone(run: Run, path: Path) -> None:
    copy = path.with_name("copy.db")
    path.with_name("headwater-keys.secret").write_text("of the keys")
    code, out, error = run("backup", "copy.db")
    assert (code, out) == (0, f"headwater: copy.db is a copy of headwater.db: {copy.stat().st_size:,} bytes\n")
    assert error.endswith(" only with the secret in headwater-keys.secret: keep a copy of that too\n")
    assert copy.stat().st_mode & 0o777 == 0o600
    # https://www.sqlite.org/fileformat.html#file_format_version_numbers: 2 is WAL, which needs a file beside it to be read.
    assert copy.read_bytes()[18:20] == bytes([1, 1])
    check_books(copy)
    assert look(copy, "SELECT * FROM call") == look(path, "SELECT * FROM call")
    assert {file.name for file in path.parent.iterdir()} == {path.name, "copy.db", "headwater-keys.secret"}


@pytest.mark.usefixtures("calls")
def test_nothing_is_overwritten_that_is_no_backup(run: Run, path: Path) -> None:
    path.with_name("old.db").write_bytes(b"an older backup")
    path.with_name("headwater-cache.db").touch()
    path.with_name("used.db").touch()
    path.with_name("used.db-wal").touch()
    path.with_name("link.db").symlink_to(path.name)
    path.with_name("gone.db-wal").touch()
    path.with_name("torn.db-journal").touch()
    for arguments, words in (
        (["old.db"], "old.db is there already: --force replaces it"),
        (["headwater.db", "--force"], "headwater.db is the proxy's own"),
        (["link.db", "--force"], "link.db is the proxy's own"),
        (["headwater-cache.db", "--force"], "headwater-cache.db is the proxy's own"),
        ([".", "--force"], ". is no file"),
        (["/dev/null", "--force"], "/dev/null is no file"),
        (["used.db", "--force"], "used.db is a database in use, or was when its program died: used.db-wal is there"),
        (["gone.db"], "gone.db is a database in use, or was when its program died: gone.db-wal is there"),
        (["torn.db"], "torn.db is a database in use, or was when its program died: torn.db-journal is there"),
        *(
            ([name, "--force"], f"{name} is the proxy's own")
            for name in ("headwater.db-wal", "headwater.db-journal", "headwater-cache.db-shm", "headwater-keys.secret")
        ),
        (["not/there/copy.db"], "there is no directory not/there"),
    ):
        assert run("backup", *arguments) == (2, "", f"headwater: FILE: {words}\n")
    assert path.with_name("old.db").read_bytes() == b"an older backup"
    assert run("backup", "old.db", "--force")[0] == 0
    check_books(path.with_name("old.db"))


async def test_backups_made_during_heavy_writing_are_each_as_the_ledger_was_at_one_moment(path: Path) -> None:
    """Two tasks: one opens and closes calls that must be paid for, as fast as it can; the other makes copies."""
    copies = [path.with_name(f"copy-{number}.db") for number in range(4)]
    async with starting(path) as start:
        ledger = (await start()).ledger
        await ledger.allocate("red", 10**9, Cause(NOW))
        is_copying = True

        async def write() -> int:
            number = 0
            while is_copying:
                begun = [await opened(ledger, new(f"call-{number}-{each}", hold_microcredits=9)) for each in range(5)]
                for call in begun:
                    ledger.close_call(call, done(7, prompt_tokens=number))
                number += 1
            return number

        async def copy() -> None:
            nonlocal is_copying
            try:
                for target in copies:
                    before = (await ledger.calls()).total
                    await backup(path, target)
                    while (await ledger.calls()).total == before:
                        pass
            finally:
                is_copying = False

        rounds, _ = await asyncio.gather(write(), copy())
        assert rounds >= len(copies)
    counts = []
    for target in copies:
        check_books(target)
        assert look(target, "PRAGMA integrity_check") == [("ok",)]
        counts.append(look(target, "SELECT count(*) FROM call")[0][0])
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
