"""Keys, teams and credits from the shell: what is printed, and what is then so. tests/test_command.py runs it as a process."""

from __future__ import annotations

import re
import shlex
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from proxy.__main__ import main
from tests.store.ledgers import look

Shell = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs `headwater LINE`: exit code, standard output and standard error."""
    monkeypatch.setenv("HEADWATER_STORE__PATH", str(tmp_path / "headwater.db"))
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        code = main(shlex.split(line))
        return code, *capsys.readouterr()

    return run


def test_a_teams_terms_are_made_and_changed(shell: Shell, tmp_path: Path) -> None:
    columns = (
        "requests_per_minute, budget_day_microusd, budget_mode, microcredits_per_dollar, tokens_per_credit, markup,"
        " rounds_up, stops_when_spent, is_suspended"
    )

    def row() -> tuple[object, ...]:
        return look(tmp_path / "headwater.db", f"SELECT {columns} FROM team WHERE id = 'alpha'")[0]

    money = "--budget-mode consumption_usd --credits-per-dollar 0.1 --tokens-per-credit 7 --markup 2.5"
    assert shell(f"teams create alpha --requests-per-minute 9 --budget-day 1.1 {money} --round-up --hard-stop") == (
        *(0, "headwater: the team alpha is made\n"),
        "",
    )
    assert row() == (9, 1_100_000, "consumption_usd", 100_000, 7, 25_000, 1, 1, 0)
    gone = "--requests-per-minute none --budget-day none --budget-mode none --markup none"
    assert shell(f"teams update alpha {gone} --no-round-up")[0] == 0
    assert row() == (None, None, None, 100_000, 7, None, 0, 1, 0)
    assert shell("teams update alpha --no-hard-stop")[1] == "headwater: the team alpha is changed\n"
    assert shell("teams suspend alpha")[1] == "headwater: the team alpha is suspended\n"
    assert row()[-2:] == (0, 1)
    assert shell("teams resume alpha")[1] == "headwater: the team alpha is resumed\n"
    assert row()[-2:] == (0, 0)
    assert shell("keys create --team alpha --budget-month 0.000001 --budget-total 3")[0] == 0
    budgets = "budget_day_microusd, budget_month_microusd, budget_total_microusd"
    assert look(tmp_path / "headwater.db", f"SELECT {budgets} FROM virtual_key") == [(None, 1, 3_000_000)]


def test_a_team_is_given_credits(shell: Shell) -> None:
    shell("teams create alpha")
    assert shell("credits balance alpha")[1].splitlines()[1].split() == ["alpha", "0", "0", "0", "0", "-"]
    told = "it needs credits from now on: its budget mode is job_based (see `headwater teams update --budget-mode`)"
    assert shell("credits add alpha 100.000001 --reason welcome") == (
        *(0, "headwater: the team alpha has 100.000001 credits left\n"),
        f"headwater: {told}\n",
    )
    assert shell("credits add alpha 1") == (0, "headwater: the team alpha has 101.000001 credits left\n", "")
    shell("teams update alpha --budget-mode none")
    assert shell("credits add alpha 1")[2] == "headwater: it needs none: it has no budget mode\n"
    assert shell("credits balance alpha")[1] == (
        "TEAM   ALLOCATED   REMAINING   RESERVED  CHARGED  MODE\nalpha  102.000001  102.000001  0         0        -\n"
    )


def test_the_commands_on_the_page_work(shell: Shell) -> None:
    page = (Path(__file__).parents[1] / "docs" / "credits.md").read_text("utf-8")
    lines = re.findall(r"^headwater (.+)$", page, re.MULTILINE)
    assert len(lines) >= 5
    assert [line for line in lines if shell(line)[0] != 0] == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("credits add nobody 1", "There is no team 'nobody'."),
        ("credits add local 0", "The amount cannot be allocated."),
        ("credits add local 0.0000001", "'amount': must be a number with at most six decimals."),
        ("credits add local nan", "'amount': must be a number up to 1000000000000."),
        ("credits balance nobody", "There is no team 'nobody'."),
        ("teams update nobody --name x", "There is no team 'nobody'."),
        ("teams update local", "nothing is to be changed: see `headwater teams update --help`"),
        ("teams suspend nobody", "There is no team 'nobody'."),
        ("teams create a --budget-mode x", "'budget_mode': must be one of job_based, "),
        ("teams create a --credits-per-dollar 0", "'credits_per_dollar': must be above 0."),
        ("teams create a --markup 1000.1", "'cost_markup_percentage': must be a number up to 1000."),
        ("keys create --model 'a\x1b[2J'", "'models': string should match pattern"),
        ("keys create --budget-day -1", "'budget_day_usd': must not be negative."),
    ],
)
def test_what_cannot_be_is_said_in_one_line(shell: Shell, line: str, words: str) -> None:
    code, out, error = shell(line)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"headwater: {words}")


def test_a_rotation_that_cannot_write_says_so(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell("teams list")
    refusing = "BEFORE INSERT ON content_key BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
    with closing(sqlite3.connect(tmp_path / "headwater.db")) as connection:
        connection.execute(f"CREATE TRIGGER refusing {refusing}")
    monkeypatch.setenv("HEADWATER_CONTENT_KEYS", f"1:{'A' * 43}=")
    words = "the disk is full; what 0 calls said is sealed anew, run it again for the rest"
    assert shell("content rotate") == (1, "", f"headwater: {tmp_path}/headwater.db cannot be written: {words}\n")


@pytest.mark.parametrize(
    "line", ["credits add local a-lot", "teams create a --markup x", "teams create a --budget-day"]
)
def test_what_is_no_number_is_a_mistake_in_the_arguments(
    shell: Shell, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        shell(line)
    assert ended.value.code == 2
    assert "error: argument" in capsys.readouterr().err
