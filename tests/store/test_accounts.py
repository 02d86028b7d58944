"""Organisations, teams and keys, in memory and in the database, and what other processes change."""

from __future__ import annotations

import asyncio
import resource
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from proxy.chat import Holder, Identity, Limits
from proxy.errors import ClientError, ConfigError, OverloadedError
from proxy.policy.keys import make_key
from proxy.settings import AuthSettings, Settings, StoreSettings
from proxy.store import db, migrations
from proxy.store.account_rows import Organisation, Team, VirtualKey
from proxy.store.accounts import Accounts
from proxy.store.keysecret import read_or_make_secret
from tests.conftest import examples

NOW = 1_000_000.0
ALPHA = Team("alpha", "local", "Alpha", ("gpt-*", "o3"), NOW, Limits(60, None, 4))
BETA = Team("beta", "local", "Beta", ("*",), NOW)


class Process:
    """A process's accounts, on a connection of its own."""

    def __init__(self, directory: Path, key_secret: str | None = None) -> None:
        auth, store = AuthSettings(mode="keys"), StoreSettings(path=directory / "headwater.db")
        self.settings = Settings(auth=auth, store=store, key_secret=key_secret)
        self.accounts: Accounts
        self.connection: db.Connection

    async def open(self) -> Process:
        self.connection = await db.connect(self.settings.store.path, migrations.MAIN)
        self.accounts = await Accounts.open(self.connection, self.settings)
        return self

    async def start(self) -> Process:
        await self.open()
        await self.accounts.load_secret()
        return self

    def fate(self, key: str, now: float = NOW) -> str:
        """What becomes of who presents the key: the team's id, or the error's code."""
        try:
            return self.accounts.identify(key, now).team
        except ClientError as error:
            return f"{error.status} {error.code}"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


Start = Callable[..., Awaitable[Process]]


@pytest_asyncio.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """A function that starts a process on the test's database."""
    async with AsyncExitStack() as stack:

        async def starter(key_secret: str | None = None) -> Process:
            process = Process(tmp_path, key_secret)
            try:
                return await process.start()
            finally:
                stack.push_async_callback(process.connection.close)

        yield starter


async def test_a_key_tells_all_of_who_asks_and_so_it_does_in_the_next_process(start: Start) -> None:
    one = await start()
    await one.accounts.create(Organisation("acme", "Acme", NOW))
    await one.accounts.create(ALPHA._replace(organisation="acme"))
    limits = Limits(parallel_calls=1)
    row, key = await one.accounts.create_key("alpha", "ci", now=NOW, models=("gpt-4*",), limits=limits)
    holders = Holder(f"key {row.id}", "this key", limits), Holder("team alpha", "team 'alpha'", Limits(60, None, 4))
    expected = Identity("acme", "alpha", row.id, "team: alpha", ("gpt-4*",), ("gpt-*", "o3"), holders)
    assert one.accounts.identify(key, NOW) == expected
    two = await start()
    assert two.accounts.identify(key, NOW) == expected
    assert two.accounts.key(row.id) == row
    assert [team.id for team in two.accounts.teams(None)[0]] == ["alpha", "local"], "one is there from the start"


async def test_a_key_that_was_let_in_is_not_when_it_has_expired(start: Start) -> None:
    one = await start()
    _, key = await one.accounts.create_key("local", "ci", now=NOW, expires_at=NOW + 10)
    assert [one.fate(key, NOW + passed) for passed in (0, 9, 10, 11)] == ["local"] * 2 + ["403 key_expired"] * 2


async def test_only_the_beginning_of_a_key_is_kept(start: Start, tmp_path: Path) -> None:
    one = await start()
    row, key = await one.accounts.create_key("local", "ci", now=NOW)
    await one.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert key.startswith(row.id)
    kept = b"".join(contents(tmp_path).values())
    assert row.id.encode() in kept
    assert key[len(row.id) :].encode() not in kept
    assert [
        one.fate(wrong) for wrong in (row.id, key[:-1], key + "x", key[:-1] + "!", "", "sk-hw-", "Ärger\udcff")
    ] == ["401 invalid_api_key"] * 7
    assert one.fate(row.id + "\udcff" * 31) == "401 invalid_api_key"


async def test_who_presents_no_good_key_hears_whether_it_is_a_whole_one(start: Start) -> None:
    one = await start()
    row, key = await one.accounts.create_key("local", "ci", now=NOW)
    await one.accounts.revoke(row.id, NOW)
    said = []
    for presented in (key, make_key(bytes(24)), key[:-1], "sk-another-kind", row.id):
        with pytest.raises(ClientError) as caught:
            one.accounts.identify(presented, NOW)
        said.append(str(caught.value))
    unknown, no_whole = "it is unknown here, or was revoked", "it is no whole key of this proxy's"
    assert said == [f"Incorrect API key provided: {why}." for why in [unknown] * 2 + [no_whole] * 3]


FATES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    # changes of the key, changes of its team, what becomes of a call at NOW
    ({}, {}, "alpha"),
    ({"is_suspended": True}, {}, "403 key_suspended"),
    ({"expires_at": NOW}, {}, "403 key_expired"),
    ({"expires_at": NOW + 1}, {}, "alpha"),
    ({"expires_at": NOW - 1, "is_suspended": True}, {}, "403 key_expired"),
    ({}, {"is_suspended": True}, "403 team_suspended"),
    ({"is_suspended": True}, {"is_suspended": True}, "403 key_suspended"),
]


@pytest.mark.parametrize(("of_key", "of_team", "expected"), FATES)
async def test_what_is_changed_holds_at_once_and_can_be_taken_back(
    start: Start, of_key: dict[str, Any], of_team: dict[str, Any], expected: str
) -> None:
    one = await start()
    await one.accounts.create(ALPHA)
    row, key = await one.accounts.create_key("alpha", "ci", now=NOW)
    assert one.fate(key) == "alpha"
    await one.accounts.change(VirtualKey, row.id, **of_key)
    await one.accounts.change(Team, "alpha", **of_team)
    assert one.fate(key) == (await start()).fate(key) == expected
    await one.accounts.change(VirtualKey, row.id, is_suspended=False, expires_at=None)
    await one.accounts.change(Team, "alpha", is_suspended=False)
    assert one.fate(key) == "alpha"
    assert (await one.accounts.revoke(row.id, NOW)).revoked_at == NOW
    assert (await one.accounts.revoke(row.id, NOW + 1)).revoked_at == NOW, "again changes nothing"
    assert one.fate(key) == "401 invalid_api_key"
    with pytest.raises(ClientError) as caught:
        await one.accounts.change(VirtualKey, row.id, is_suspended=False)
    assert caught.value.code == "key_revoked"


async def test_a_change_of_one_limit_leaves_the_others(start: Start) -> None:
    one = await start()
    await one.accounts.create(ALPHA)
    changed = await one.accounts.change(Team, "alpha", tokens_per_minute=9, parallel_calls=None, models=["*"])
    assert changed == ALPHA._replace(limits=Limits(60, 9, None), models=("*",))
    assert (await start()).accounts.team("alpha") == changed


async def test_what_does_not_exist_and_what_exists_already_is_refused(start: Start) -> None:
    accounts = (await start()).accounts
    await accounts.create(ALPHA)
    refused: list[tuple[Awaitable[Any], str]] = [
        (accounts.create(ALPHA), "409 team_exists"),
        (accounts.create(Organisation("local", "", NOW)), "409 organisation_exists"),
        (accounts.create(BETA._replace(organisation="nobody")), "404 organisation_not_found"),
        (accounts.create_key("nobody", "", now=NOW), "404 team_not_found"),
        (accounts.change(Team, "nobody", name="x"), "404 team_not_found"),
        (accounts.revoke("nobody", NOW), "404 key_not_found"),
        (accounts.revoke("\udc80", NOW), "404 key_not_found"),
    ]
    for attempt, expected in refused:
        with pytest.raises(ClientError) as caught:
            await attempt
        assert f"{caught.value.status} {caught.value.code}" == expected
    assert accounts.teams(None)[1] == 2


async def test_lists_are_in_order_and_come_in_pages(start: Start) -> None:
    accounts = (await start()).accounts
    for team in (BETA, ALPHA):
        await accounts.create(team)
    mine = sorted([(await accounts.create_key("beta", "", now=NOW))[0].id for _ in range(5)])
    await accounts.create_key("alpha", "", now=NOW)
    found, total = accounts.keys(2, team="beta")
    more, _ = accounts.keys(9, found[-1].id, team="beta")
    assert ([key.id for key in found + more], total, len(found)) == (mine, 5, 2)
    assert [team.id for team in accounts.teams(2)[0]] == ["alpha", "beta"]
    assert accounts.organisations(9, "local") == ([], 1)


STEPS = st.lists(
    st.tuples(
        st.integers(0, 1),  # which process does it
        st.sampled_from(["key", "revoke", "suspend", "resume", "suspend team", "resume team", "expire", "look"]),
        st.integers(0, 3),  # to which key
    ),
    max_size=25,
)


@examples(15)
@given(STEPS)
def test_two_processes_agree_with_a_plain_model_whatever_they_do(steps: list[tuple[int, str, int]]) -> None:
    """Each knows its own changes at once, and the other's when it looks."""

    async def play(directory: Path) -> None:
        processes = [await Process(directory).start() for _ in range(2)]
        await processes[0].accounts.create(ALPHA)
        keys: list[tuple[str, str]] = []
        states: list[dict[str, bool]] = []
        is_team_suspended = False
        for number, step, wanted in steps:
            accounts = processes[number].accounts
            if step == "key":
                row, text = await accounts.create_key("alpha", "", now=NOW)
                keys.append((row.id, text))
                states.append({})
            elif step in ("suspend team", "resume team"):
                is_team_suspended = step == "suspend team"
                await accounts.change(Team, "alpha", is_suspended=is_team_suspended)
            elif step == "look" or not keys or (step != "revoke" and states[wanted % len(keys)].get("revoked")):
                await accounts.refresh()
            else:
                name, state = keys[wanted % len(keys)][0], states[wanted % len(keys)]
                if step == "revoke":
                    await accounts.revoke(name, NOW)
                    state["revoked"] = True
                else:
                    is_end = step == "expire"
                    change: dict[str, Any] = {"expires_at": NOW} if is_end else {"is_suspended": step == "suspend"}
                    await accounts.change(VirtualKey, name, **change)
                    state["expired" if is_end else "suspended"] = step != "resume"
            expected = [_expected(state, is_team_suspended=is_team_suspended) for state in states]
            assert [processes[number].fate(text) for _, text in keys] == expected
        for process in processes:
            await process.accounts.refresh()
            assert [process.fate(text) for _, text in keys] == [
                _expected(state, is_team_suspended=is_team_suspended) for state in states
            ]
            await process.connection.close()

    with TemporaryDirectory() as directory:
        asyncio.run(play(Path(directory)))


def _expected(state: dict[str, bool], *, is_team_suspended: bool) -> str:
    if state.get("revoked"):
        return "401 invalid_api_key"
    for word in ("expired", "suspended"):
        if state.get(word):
            return f"403 key_{word}"
    return "403 team_suspended" if is_team_suspended else "alpha"


async def test_a_database_that_cannot_be_written_changes_nothing(start: Start) -> None:
    one, other = await start(), await start()
    row, key = await one.accounts.create_key("local", "", now=NOW)
    await one.connection.execute("PRAGMA busy_timeout=0")
    await other.connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(OverloadedError):
        await one.accounts.revoke(row.id, NOW)
    assert one.fate(key) == "local"
    await other.connection.execute("ROLLBACK")
    await one.accounts.revoke(row.id, NOW)
    assert one.fate(key) == "401 invalid_api_key"


async def test_who_leaves_in_the_midst_of_a_change_has_made_it_all_the_same(start: Start) -> None:
    one = await start()
    row, key = await one.accounts.create_key("local", "", now=NOW)
    task = asyncio.ensure_future(one.accounts.revoke(row.id, NOW))
    await asyncio.sleep(0)  # now the database has it
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await one.accounts.refresh()
    assert one.fate(key) == "401 invalid_api_key"


async def test_a_change_holds_when_it_is_made_whoever_looks_meanwhile(start: Start) -> None:
    one = await start()
    row, _ = await one.accounts.create_key("local", "", now=NOW)
    is_over = False

    async def look() -> None:
        while not is_over:
            await one.accounts.refresh()

    looking = [asyncio.ensure_future(look()) for _ in range(2)]
    for number in range(30):
        await one.accounts.change(VirtualKey, row.id, name=str(number))
        assert one.accounts.key(row.id).name == str(number)
    is_over = True
    await asyncio.gather(*looking)


async def test_a_database_that_cannot_be_read_is_one_warning_and_what_was_known_stays(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = await start(), await start()
    row, key = await one.accounts.create_key("local", "", now=NOW)
    await other.connection.execute("ALTER TABLE accounts_version RENAME TO away")
    for _ in range(3):
        await one.accounts.refresh()
    assert one.fate(key) == "local"
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["accounts could not be read"]
    await other.connection.execute("ALTER TABLE away RENAME TO accounts_version")
    await other.accounts.revoke(row.id, NOW)
    await one.accounts.refresh()
    assert one.fate(key) == "401 invalid_api_key"


# ------------------------------------------------------------------ the secret


async def test_the_secret_is_its_owners_alone_and_made_once(tmp_path: Path) -> None:
    first, second = Process(tmp_path), Process(tmp_path)
    for process in (first, second):
        await process.open()
    path = first.settings.store.key_secret_path
    assert not path.exists(), "who asks for no keys gets no file"
    await asyncio.gather(first.accounts.load_secret(), second.accounts.load_secret())
    assert path.stat().st_mode & 0o777 == 0o600
    _, key = await first.accounts.create_key("local", "", now=NOW)
    await second.accounts.refresh()
    assert second.fate(key) == "local"
    assert [name for name in contents(tmp_path) if "secret" in name] == [path.name], "nothing is left beside it"
    for process in (first, second):
        await process.connection.close()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.chmod(0o640), "others than its owner may read it"),
        (lambda path: path.write_bytes(b"short"), "holds fewer than 32 characters"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
        (lambda path: path.unlink(), "1 virtual keys were made by another secret"),
    ],
)
async def test_a_secret_that_cannot_be_used_is_said_at_the_start(
    start: Start, spoil: Callable[[Path], Any], words: str
) -> None:
    one = await start()
    await one.accounts.create_key("local", "", now=NOW)
    spoil(one.settings.store.key_secret_path)
    with pytest.raises(ConfigError, match=words):
        await start()


def test_a_full_disk_leaves_no_half_secret(tmp_path: Path) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, unlimited[1]))
    try:
        with pytest.raises(ConfigError, match="secret: cannot be written: File too large"):
            read_or_make_secret(None, tmp_path / "secret")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert contents(tmp_path) == {}


async def test_the_environment_goes_before_the_file_and_keys_of_a_lost_secret_can_be_revoked(start: Start) -> None:
    one = await start("x" * 32)
    row, key = await one.accounts.create_key("local", "", now=NOW)
    assert not one.settings.store.key_secret_path.exists()
    assert (await start("x" * 32)).fate(key) == "local"
    with pytest.raises(ConfigError, match="than the one in the environment"):
        await start("y" * 32)
    await one.accounts.revoke(row.id, NOW)
    assert (await start("y" * 32)).fate(key) == "401 invalid_api_key"


async def test_a_key_of_another_secret_that_comes_while_it_runs_is_none(start: Start) -> None:
    one, other = await start("x" * 32), await start("y" * 32)
    _, key = await other.accounts.create_key("local", "", now=NOW)
    await one.accounts.refresh()
    assert (one.fate(key), other.fate(key)) == ("401 invalid_api_key", "local")
    with pytest.raises(ConfigError):
        await one.accounts.create_key("local", "", now=NOW)


async def test_a_file_of_the_version_before_gets_the_team_that_is_built_in(tmp_path: Path) -> None:
    path = tmp_path / "headwater.db"
    older = sqlite3.connect(path)
    older.executescript(migrations.MAIN[0] + "PRAGMA user_version=1;")
    older.close()
    process = await Process(tmp_path).open()
    assert process.accounts.team("local").organisation == "local"
    await process.connection.close()
