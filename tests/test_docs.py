"""What is written about the settings and the commands, held against what they are."""

from __future__ import annotations

import re
import tomllib
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import proxy
from proxy.__main__ import main
from proxy.config import load
from proxy.settings import (
    AuthSettings,
    CacheSettings,
    LedgerSettings,
    ModelSettings,
    PriceSettings,
    ServerSettings,
    Settings,
    StoreSettings,
    StreamingSettings,
    TargetSettings,
    UpstreamSettings,
)

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
REFERENCE = ROOT / "config" / "headwater.toml"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

TABLES: dict[str, type[Any]] = {
    "server": ServerSettings,
    "auth": AuthSettings,
    "store": StoreSettings,
    "ledger": LedgerSettings,
    "streaming": StreamingSettings,
    "cache": CacheSettings,
}
LISTS: dict[str, type[Any]] = {"upstream": UpstreamSettings, "model": ModelSettings, "price": PriceSettings}

# A commented-out setting or heading of a block. Prose never looks like either.
_COMMENTED = re.compile(r"# (?P<line>(?P<field>[a-z][a-z_]*) = .+|\[\[(?P<block>[a-z]+)\]\])")

_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Entry(NamedTuple):
    """A setting in the reference: the comment above it, and its line without the `# `."""

    section: str
    field: str
    comment: str
    line: str

    @property
    def value(self) -> Any:
        return tomllib.loads(self.line)[self.field]


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    language: str
    text: str


def entries() -> list[Entry]:
    """Every setting in the reference, in its order."""
    found: list[Entry] = []
    comment: list[str] = []
    section = ""
    for line in REFERENCE.read_text("utf-8").splitlines():
        if heading := re.fullmatch(r"\[([a-z]+)\]", line):
            section = heading.group(1)
        elif match := _COMMENTED.fullmatch(line):
            if match["block"]:
                section = match["block"]
            else:
                found.append(Entry(section, match["field"], " ".join(comment), match["line"]))
            comment = []
        elif line.startswith("# "):
            comment.append(line.removeprefix("# "))
        elif not line:
            comment = []
    return found


def uncommented(path: Path, sections: tuple[str, ...]) -> Path:
    """The reference with all settings and blocks of `sections` in force, written to `path`."""
    lines, section = [], ""
    for line in REFERENCE.read_text("utf-8").splitlines():
        match = _COMMENTED.fullmatch(line)
        if heading := re.fullmatch(r"\[([a-z]+)\]", line):
            section = heading.group(1)
        elif match and match["block"]:
            section = match["block"]
        lines.append(match["line"] if match and section in sections else line)
    path.write_text("\n".join(lines), "utf-8")
    return path


def loaded(text: str, directory: Path) -> Settings:
    """The settings in a piece of TOML, with a key in every variable and file it names."""
    data = tomllib.loads(text)
    environ = {}
    for upstream in data.get("upstream", []):
        if name := upstream.get("api_key_env"):
            environ[name] = "sk-of-the-test"
        if name := upstream.get("api_key_file"):
            key = directory / "key"
            key.write_text("sk-of-the-test\n", "utf-8")
            text = text.replace(name, str(key))
    path = directory / "headwater.toml"
    path.write_text(text, "utf-8")
    return load(path, environ)


def blocks() -> list[Block]:
    """The fenced blocks of all pages."""
    found = []
    for page in PAGES:
        found += [Block(page, match[2], match[3]) for match in _FENCED.finditer(page.read_text("utf-8"))]
    return found


def commands(page: Path) -> list[str]:
    """Everything a page tells people to type: lines of sh blocks, `$` lines of console blocks, and `code` in prose."""
    found: list[str] = []
    for block in blocks():
        if block.page != page:
            continue
        lines = block.text.replace("\\\n", " ").splitlines()
        if block.language in ("sh", "bash", "shell"):
            found += lines
        elif block.language == "console":
            found += [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    found += re.findall(r"`([^`\n]+)`", _FENCED.sub("", page.read_text("utf-8")))
    # A line may hold several commands, and a comment behind them.
    return [part.strip() for line in found for part in re.split(r"&&|\|\||;|\|", re.sub(r"(^|\s)#.*", "", line))]


def default_of(field: Field[Any]) -> Any:
    """A field's default as TOML would give it."""
    default = field.default
    if isinstance(default, Path):
        return str(default)
    return list(default) if isinstance(default, tuple) else default


# ---------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("section", [*TABLES, *LISTS])
def test_reference_has_every_field_and_no_other(section: str) -> None:
    written = [entry.field for entry in entries() if entry.section == section]
    if section in TABLES:
        assert written == [field.name for field in fields(TABLES[section])], "the same fields, in the same order"
    else:
        assert set(written) == {field.name for field in fields(LISTS[section])}


def test_reference_knows_every_section() -> None:
    assert {*TABLES, *LISTS} == {field.name for field in fields(Settings)} - {
        "secrets",
        "proxies",
        "admin_key",
        "key_secret",
        "content_keys",
    }


@pytest.mark.parametrize("section", TABLES)
def test_reference_shows_the_defaults(section: str) -> None:
    written = {entry.field: entry.value for entry in entries() if entry.section == section}
    assert written == {field.name: default_of(field) for field in fields(TABLES[section])}


@pytest.mark.parametrize("section", LISTS)
def test_reference_says_what_is_required_and_what_is_the_default(section: str) -> None:
    for field in fields(LISTS[section]):
        comment = next(entry.comment for entry in entries() if (entry.section, entry.field) == (section, field.name))
        if field.default is MISSING:
            assert "Required." in comment, field.name
        elif field.default is None:
            assert "Default: none" in comment, field.name
        else:
            shown = re.search(r"Default: (\[.*?\]|\".*?\")", comment)
            assert shown is not None, field.name
            assert tomllib.loads(f"it = {shown[1]}")["it"] == default_of(field)


def test_reference_explains_every_field_of_a_target() -> None:
    comment = next(entry.comment for entry in entries() if (entry.section, entry.field) == ("model", "targets"))
    assert set(re.findall(r"`([a-z_]+)`:", comment)) == {field.name for field in fields(TargetSettings)} - {"target"}


def test_reference_explains_every_field_of_the_tables() -> None:
    silent = [entry.field for entry in entries() if entry.section in TABLES and len(entry.comment) < 40]
    assert not silent


def test_reference_as_shipped_changes_nothing() -> None:
    assert load(REFERENCE, {}) == Settings()


def test_reference_uncommented_changes_nothing(tmp_path: Path) -> None:
    path = uncommented(tmp_path / "headwater.toml", tuple(TABLES))
    assert {name for name, table in tomllib.loads(path.read_text("utf-8")).items() if table} == set(TABLES)
    assert load(path, {}) == Settings()


def test_reference_examples_load(tmp_path: Path) -> None:
    path = uncommented(tmp_path / "reference.toml", (*TABLES, *LISTS))
    settings = loaded(path.read_text("utf-8"), tmp_path)
    assert len(settings.upstream) == 3
    assert settings.secrets.keys() == {"openai", "lab"}
    assert settings.proxies.keys() == {"openai"}
    assert [model.name for model in settings.model] == ["chat", "chat-shared"]


# ------------------------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", [*PAGES, REFERENCE], ids=lambda page: page.name)
def test_environment_variables_exist(page: Path) -> None:
    known = {
        f"HEADWATER_{section}__{field.name}".upper() for section, table in TABLES.items() for field in fields(table)
    }
    assert set(re.findall(r"\bHEADWATER_[A-Z]+__[A-Z_]+", page.read_text("utf-8"))) <= known


@pytest.mark.parametrize("page", [*PAGES, REFERENCE], ids=lambda page: page.name)
def test_settings_that_are_mentioned_exist(page: Path) -> None:
    known = {f"{section}.{field.name}" for section, table in (TABLES | LISTS).items() for field in fields(table)}
    mentioned = re.findall(r"(?<![\w./-])(?:server|store|streaming)\.(?!py\b)[a-z_]+", page.read_text("utf-8"))
    assert set(mentioned) <= known


def test_toml_blocks_load(tmp_path: Path) -> None:
    found = [block for block in blocks() if block.language == "toml"]
    assert any(block.page == README for block in found)
    for block in found:
        loaded(block.text, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {match[1] for line in commands(page) if (match := re.match(r"(?:\S*/)?headwater ([a-z][a-z-]*)\b", line))}
    assert named or page != README
    for command in named:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0, f"{page.name} mentions `headwater {command}`"
    capsys.readouterr()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {
        word
        for line in commands(page)
        if line.startswith("make ")
        for word in line.split()[1:]
        if not word.startswith("-") and "=" not in word
    }
    assert named or page != README
    assert named <= known


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCED.sub("", page.read_text("utf-8"))
    targets = re.findall(r"\]\(<?([^)\s>]+)", text)
    relative = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    missing = [target for target in relative if not (page.parent / target).exists()]
    assert not missing


def test_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## \[?v?{re.escape(proxy.__version__)}\b", changelog, re.MULTILINE)
