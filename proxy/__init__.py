"""Headwater: a streaming reverse proxy for LLM APIs.

The folder is a house of floors; a module imports only from the floors below its own (setup.cfg holds the
contract, `make floors` checks it). From the top:

    __main__.py  probe.py                    the command
    server/                                  HTTP faces: routes, errors to responses, bytes to clients
    pipeline.py                              one call's journey: read this file first
    pump.py                                  from the upstream's socket to the log, read by read
    answerlog.py  tasks.py  encoders.py      what a call leans on: the log of an answer, tasks, counting tokens
    tokenizer.py                             the process that counts them
    upstream/  store/                        the ways out: to upstreams, to SQLite
    dialects/  policy/                       what an API speaks; what to do (decisions without effects)
    wire/                                    bytes to meaning and back: SSE, chunks, JSON, headers
    settings.py                              the config file and the environment, as frozen objects
    chat.py                                  our words
    errors.py                                whose fault it is
"""

__version__ = "0.2.0"
