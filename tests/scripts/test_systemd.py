"""The unit, the script that installs it, and the web servers' configuration that docs/systemd.md gives."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.settings import ServerSettings, StreamingSettings

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "scripts" / "headwater.service"
INSTALL = ROOT / "scripts" / "install-systemd.sh"
PAGE = ROOT / "docs" / "systemd.md"

# systemctl and nginx are not on everybody's path.
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def command(name: str) -> str:
    """Where a command is; the test is skipped when it is nowhere."""
    path = shutil.which(name, path=_PATH)
    if path is None:
        pytest.skip(f"{name} is not installed on this machine")
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)


def directives() -> dict[str, list[str]]:
    """The unit's settings; a name may come more than once."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text("utf-8").splitlines():
        if match := re.match(r"([A-Z]\w*)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def verifiable(tmp_path: Path) -> Path:
    """The unit with a program that exists in place of the one that the install script has yet to make."""
    program, *arguments = directives()["ExecStart"][0].split(" ")
    copy = tmp_path / UNIT.name
    text = UNIT.read_text("utf-8")
    copy.write_text(text.replace(f"={program} ", f"={sys.executable} "), "utf-8")
    assert arguments[0] == "serve"
    return copy


def planned(*options: str) -> list[list[str]]:
    """The commands of a dry run, as lists of words."""
    done = run(command("bash"), INSTALL, "--dry-run", *options)
    if "Python 3.11 or newer" in done.stderr:
        pytest.skip("this machine's own Python has no venv")
    assert done.returncode == 0, done.stderr
    return [shlex.split(line.removeprefix("+ ")) for line in done.stdout.splitlines() if line.startswith("+ ")]


def constants() -> dict[str, str]:
    """The script's variables in capitals, as bash understands them."""
    lines = [line for line in INSTALL.read_text("utf-8").splitlines() if re.match(r"(?!PATH=)[A-Z]+=", line)]
    script = "\n".join([*lines, *(f'echo "{name}=${name}"' for name in (line.partition("=")[0] for line in lines))])
    done = run(command("bash"), "-c", script)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


# -------------------------------------------------------------------------------------------------------- the unit


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    done = run(command("systemd-analyze"), "verify", "--man=no", verifiable(tmp_path))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_unit_exposes_little(tmp_path: Path) -> None:
    done = run(command("systemd-analyze"), "security", "--offline=true", "--threshold=20", verifiable(tmp_path))
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at a unit that is not loaded")
    assert done.returncode == 0, done.stdout[-400:]


def test_stopping_leaves_time_to_drain() -> None:
    timeout_s = float(directives()["TimeoutStopSec"][0].removesuffix("s"))
    assert timeout_s >= ServerSettings().drain_s + 10


def test_unit_notifies_and_restarts() -> None:
    unit = directives()
    assert unit["Type"] == ["notify"]
    assert unit["WatchdogSec"] == ["30s"]
    assert unit["Restart"] == ["on-failure"]
    assert "AF_UNIX" in unit["RestrictAddressFamilies"][0], "or the notifications go nowhere"


# ---------------------------------------------------------------------------------------------------- the script


def test_script_and_unit_agree() -> None:
    unit, script = directives(), constants()
    assert unit["ExecStart"] == [f"{script['VENV']}/bin/headwater serve --config {script['CONFIG']}"]
    assert unit["EnvironmentFile"] == [f"-{script['ENVIRONMENT']}"]
    assert unit["User"] == unit["Group"] == [script["NAME"]]
    assert unit["WorkingDirectory"] == [script["STATE"]]
    assert [f"/var/lib/{name}" for name in unit["StateDirectory"]] == [script["STATE"]]
    assert unit["Environment"] == [f"HEADWATER_STORE__PATH={script['STATE']}/headwater.db"]
    assert script["UNIT"] == f"/etc/systemd/system/{UNIT.name}"
    page = PAGE.read_text("utf-8")
    assert not [path for path in script.values() if path.startswith("/") and path not in page]


def test_dry_run_lists_the_steps_in_order() -> None:
    script = constants()
    pip = [f"{script['VENV']}/bin/python", "-m", "pip", "install"]
    steps: list[Callable[[list[str]], bool]] = [
        lambda words: words[:4] == pip and words[-2:] == ["--requirement", "config/lock/run.txt"],
        lambda words: words[0] == "cp" and "proxy" in words,
        lambda words: words[:4] == pip and "--no-deps" in words,
        lambda words: words == [f"{script['VENV']}/bin/headwater", "--version"],
        lambda words: words == ["install", "-m", "0644", "scripts/headwater.service", script["UNIT"]],
        lambda words: words == ["systemctl", "daemon-reload"],
        lambda words: words == ["systemctl", "enable", UNIT.name],
        lambda words: words == ["systemctl", "restart", UNIT.name],
    ]
    plan = planned()
    positions = [[number for number, words in enumerate(plan) if step(words)] for step in steps]
    assert all(len(found) == 1 for found in positions), positions
    assert positions == sorted(positions)
    assert "--require-hashes" in plan[positions[0][0]]


def test_dry_run_copies_only_what_exists() -> None:
    (copied,) = [words[3:-1] for words in planned() if words[0] == "cp"]
    assert not [name for name in copied if not (ROOT / name).exists()]


@pytest.mark.skipif(Path("/opt/headwater").exists(), reason="Headwater is installed on this machine")
@pytest.mark.parametrize("options", [(), ("--uninstall",)])
def test_dry_run_does_nothing(options: tuple[str, ...]) -> None:
    assert planned(*options)
    assert not Path("/opt/headwater").exists()


@pytest.mark.skipif(Path("/etc/headwater").exists(), reason="Headwater was installed on this machine")
def test_first_install_makes_the_settings() -> None:
    script, plan = constants(), planned()
    assert ["install", "-m", "0640", "-g", script["NAME"], "config/headwater.toml", script["CONFIG"]] in plan
    assert ["install", "-m", "0600", "/dev/stdin", script["ENVIRONMENT"]] in plan


def test_uninstall_leaves_settings_and_data() -> None:
    script = constants()
    removed = [word for words in planned("--uninstall") if words[0] == "rm" for word in words[1:] if word[0] != "-"]
    assert removed == [script["UNIT"], script["PROGRAM"]]


def test_unknown_option_is_refused() -> None:
    done = run(command("bash"), INSTALL, "--dryrun")
    assert done.returncode == 1
    assert "unknown option --dryrun" in done.stderr


def test_shellcheck_finds_nothing() -> None:
    done = run(command("shellcheck"), INSTALL)
    assert (done.returncode, done.stdout) == (0, "")


# ------------------------------------------------------------------------------------------ nginx and Caddy in front


def nginx_block() -> str:
    """The page's whole nginx configuration."""
    match = re.search(r"```nginx\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert match is not None
    return match[1]


def test_nginx_accepts_the_configuration(tmp_path: Path) -> None:
    nginx, openssl = command("nginx"), command("openssl")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = run(
        *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=llm.example.com"),
        *("-keyout", key, "-out", certificate),
    )
    assert made.returncode == 0, made.stderr
    keys = tmp_path / "keys"
    keys.write_text(f'"Bearer {"5d" * 32}" alice;\n', "utf-8")
    text = nginx_block()
    for written, here in (
        ("/etc/letsencrypt/live/llm.example.com/fullchain.pem", certificate),
        ("/etc/letsencrypt/live/llm.example.com/privkey.pem", key),
        ("/etc/nginx/headwater-keys", keys),
        ("/var/log/nginx/headwater.log", tmp_path / "access.log"),
        (":443", ":18443"),
        ("listen 443", "listen 18443"),
    ):
        assert written in text
        text = text.replace(written, str(here))
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"pid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\nhttp {{\n"
        + "".join(f"{kind}_temp_path {tmp_path};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        + text
        + "}\n",
        "utf-8",
    )
    done = run(nginx, "-t", "-q", "-e", tmp_path / "error.log", "-p", tmp_path, "-c", config)
    assert done.returncode == 0, done.stderr


def test_nginx_configuration_fits_the_defaults() -> None:
    text = nginx_block()
    limits = {"s": 1, "m": 60, "h": 3600}
    settings = StreamingSettings()

    def seconds(directive: str) -> int:
        match = re.search(rf"\b{directive}\s+(\d+)([smh]);", text)
        assert match is not None, directive
        return int(match[1]) * limits[match[2]]

    assert seconds("proxy_read_timeout") > settings.whole_answer_timeout_s * (settings.max_retries + 1)
    assert seconds("send_timeout") >= settings.send_timeout_s
    assert re.search(rf"client_max_body_size\s+{ServerSettings().max_body_mb:g}m;", text)
    assert f"server {ServerSettings().host}:{ServerSettings().port};" in text
    for switch in ("proxy_buffering", "proxy_cache", "gzip"):
        assert re.search(rf"\b{switch}\s+off;", text)


def test_caddy_accepts_the_configuration(tmp_path: Path) -> None:
    caddy = command("caddy")
    (text,) = re.findall(r"```caddyfile\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    path = tmp_path / "Caddyfile"
    path.write_text(text, "utf-8")
    done = run(caddy, "validate", "--adapter", "caddyfile", "--config", path)
    assert done.returncode == 0, done.stderr
