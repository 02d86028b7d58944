"""Headwater: a streaming reverse proxy for LLM APIs.

The folder is a house of floors; a module imports only from the floors below its own (setup.cfg holds the
contract, `make floors` checks it). From the top:

    __main__.py  probe.py  issuing.py  reporting.py    the command
    server/                                  HTTP faces: routes, errors to responses, bytes to clients
    pipeline.py  passing.py                  one call's journey: read this file first; requests that are passed on unread
    producer.py  replay.py                   the making of one answer, from its targets to the end of its log; giving one again
    answers.py  pump.py                      answers and who waits for them; from the upstream's socket to the log
    learning.py  recovery.py                 how targets are to be asked, and knowing it; saving a broken stream
    semcache/                                answers found again: text to vector, the index, the cache over both
    answerlog.py  encoders.py  pricelookup.py    what calls lean on: the log, counting tokens, learning prices
    tokenizer.py  pricelist.py               the processes that count them and look those up
    childprocess.py  inflight.py  tasks.py  histogram.py    how one is run; what is under way; how often took what how long
    upstream/  store/                        the ways out: to upstreams, to SQLite
    dialects/  policy/                       what an API speaks; what to do (decisions without effects)
    wire/                                    bytes to meaning and back: SSE, chunks, splices, JSON, headers
    config.py  settings.py                   reading the config file and the environment; what the proxy is told
    chat.py  addresses.py                    our words; what URLs and host names say
    errors.py                                whose fault it is, and what kind of trouble
"""

__version__ = "0.6.0"
