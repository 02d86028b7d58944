"""Serves a real language model from a GGUF file: llama.cpp's own server, out of the `xllamacpp` package.

    python scripts/llm_server.py MODEL.gguf PORT [--alias NAME] [--threads 1] [--slots 4] [--context 4096]

Port 0 takes a free port. Once the model is loaded it prints `listening http://127.0.0.1:PORT/v1`; llama.cpp's own log
goes to stderr. `xllamacpp` is no dependency of the proxy: `scripts/demo-llm.sh` keeps it in an environment of its own.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from pathlib import Path

HOST = "127.0.0.1"


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves a GGUF model with llama.cpp's server.")
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("port", type=int, metavar="PORT", help="0 takes a free port")
    parser.add_argument("--alias", help="the name clients know the model by (default: the file's name)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, default=4, help="answers written at the same time (default: 4)")
    parser.add_argument("--context", type=int, default=4096, help="tokens, shared out among the slots (default: 4096)")
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:  # llama.cpp would take it, and listen elsewhere than it says
        parser.error(f"there is no port {options.port}")
    if not options.model.is_file():
        parser.error(f"there is no file {options.model}")

    # Imported by name because the project's own environment, where this file is type-checked, does not have it.
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(options.model)
    params.model_alias = {options.alias or options.model.stem}
    params.hostnames = [HOST]
    params.port = options.port
    params.n_ctx = options.context
    params.n_parallel = options.slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.ui = False

    # Blocked before llama.cpp starts its threads, which inherit the mask: the two signals then wait for sigwait.
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    server = xllamacpp.Server(params)
    print(f"listening {server.listening_address}/v1", flush=True)
    signal.sigwait(signals)
    sys.exit(0)


if __name__ == "__main__":
    main()
