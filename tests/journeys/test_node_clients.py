"""The Node clients that people really use, before the proxy: the official SDK and the AI SDK, in processes of their own.

The upstream is `scripts/demo_upstream.py`. Whatever it does (stream, refuse to stream, ignore the wish) each client is to
get the same text, why it ended and what it used, and no client is to see an error.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from scripts.demo_upstream import write_answer

ROOT = Path(__file__).parents[2]
NODE = ROOT / "tests" / "node"
QUESTION = "How do rivers find the sea?"  # the one clients.mjs asks
INSTALL_TIMEOUT_S = 300


def pinned(lock_file: Path) -> dict[str, str]:
    """Package folder to version, as a package-lock has it; empty when there is no such file."""
    if not lock_file.exists():
        return {}
    packages = json.loads(lock_file.read_text())["packages"]
    return {folder: package["version"] for folder, package in packages.items() if folder}


@pytest.fixture(scope="module")
def node() -> str:
    """The path of `node`, with the modules of tests/node installed. They stay there for the next run."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are needed for the Node clients")
    # The lock is for parallel workers: `npm ci` starts by removing the modules that another one may be using.
    with (NODE / "package.json").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if pinned(NODE / "node_modules" / ".package-lock.json") != pinned(NODE / "package-lock.json"):
            command = [npm, "ci", "--no-audit", "--no-fund"]
            try:
                subprocess.run(command, cwd=NODE, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"npm ci failed: {error.stderr.strip()[-500:]}")
            except subprocess.TimeoutExpired:
                pytest.skip(f"npm ci took more than {INSTALL_TIMEOUT_S} s")
    return node


@asynccontextmanager
async def running(directory: Path, *command: str) -> AsyncIterator[str]:
    """Runs a server and gives its base URL, found in the first line it prints that has one."""
    # A clean environment: the settings and keys of whoever runs the tests have no part in them.
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": str(ROOT),
        "HEADWATER_STORE__PATH": str(directory / "headwater.db"),
    }
    process = await asyncio.create_subprocess_exec(*command, cwd=directory, env=environment, stdin=DEVNULL, stdout=PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            found = None
            while found is None:
                line = (await process.stdout.readline()).decode()
                assert line, f"{command} ended before it listened"
                found = re.search(r"http://127\.0\.0\.1:\d+/v1", line)
        # What it prints later is read as well, or a full pipe would stop it.
        rest = asyncio.create_task(process.stdout.read())
        yield found[0]
        process.terminate()
        await asyncio.wait_for(rest, 30)
        await asyncio.wait_for(process.wait(), 30)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def run_clients(node: str, base_url: str, model: str) -> dict[str, dict[str, Any]]:
    """What each client made of its chat: see the head of clients.mjs for the shape."""
    environment = {"PATH": os.environ.get("PATH", os.defpath)}
    process = await asyncio.create_subprocess_exec(
        node, str(NODE / "clients.mjs"), base_url, model, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=PIPE
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), 120)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    results: dict[str, dict[str, Any]] = json.loads(output)
    return results


async def test_node_clients_get_the_whole_answer(node: str, tmp_path: Path) -> None:
    demo = (sys.executable, str(ROOT / "scripts" / "demo_upstream.py"), "--word-delay-ms", "2")
    proxy = (sys.executable, "-m", "proxy", "serve", "--port", "0", "--upstream")
    async with running(tmp_path, *demo) as upstream_url, running(tmp_path, *proxy, upstream_url) as base_url:
        for model in ("demo-stream", "demo-refuses-stream", "demo-json-only"):
            _have_the_whole_answer(model, await run_clients(node, base_url, model))


def _have_the_whole_answer(model: str, results: dict[str, dict[str, Any]]) -> None:
    assert {client: result["errors"] for client, result in results.items() if result["errors"]} == {}, model
    whole = {"openai.create", "ai.generateText"}
    streamed = {"openai.create, stream", "openai.create, stream, usage", "openai.stream, usage", "ai.streamText"}
    assert set(results) == whole | streamed

    text = write_answer(model, [{"role": "user", "content": QUESTION}])
    for client, result in results.items():
        assert result["text"] == text, (model, client)
        assert result["finish_reason"] == "stop", (model, client)
        if client in streamed:
            assert result["chunks"] > 1, (model, client)
        if client == "openai.create, stream":  # which does not ask for it
            assert result["usage"] is None
        else:
            usage = result["usage"]
            assert usage["prompt_tokens"] == len(QUESTION.split()), (model, client)
            assert usage["completion_tokens"] == len(text.split()), (model, client)
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], (model, client)
