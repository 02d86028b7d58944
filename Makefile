# Everything a developer or an operator runs. `make help` lists it.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
COMPILE := $(BIN)/pip-compile --quiet --upgrade --strip-extras --allow-unsafe --generate-hashes --no-header \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup run test fuzz lint types floors bench bench-cache profile demo-llm lock clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# Two stamps, so that running needs no more than the proxy itself.
$(VENV)/.run: config/lock/run.txt setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes --requirement config/lock/run.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.run config/lock/dev.txt
	$(BIN)/pip install --quiet --require-hashes --requirement config/lock/dev.txt
	touch $@

setup: $(VENV)/.dev  ## the virtual environment, with the exact versions that were tested

run: $(VENV)/.run  ## install what is needed and start the proxy on 127.0.0.1:8100
	$(BIN)/headwater serve

test: setup lint types floors  ## every test, and lint, types and floors before them
	$(BIN)/python -m pytest -q -n 3

fuzz: setup  ## the property tests alone, on other examples each time, and twenty times as many
	$(BIN)/python -m pytest -q -n 2 -m hypothesis --hypothesis-profile=deep

lint: setup  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy, strict
	$(BIN)/mypy

floors: setup  ## import-linter: a module imports only from the floors below its own
	$(BIN)/lint-imports --no-logo

bench: setup  ## the price of a chunk and a request, beside a plain relay and nginx (6 minutes)
	$(BIN)/python scripts/bench/run.py

bench-cache: setup  ## how often the cache serves, how often wrongly, and what it costs (4 minutes; PAIRS=FILE for pairs of yours)
	$(BIN)/python scripts/cachebench/run.py $(if $(PAIRS),--pairs $(PAIRS))

profile: setup  ## where the microseconds of a request and of a chunk go, by part of the code (1 minute)
	$(BIN)/python scripts/bench/budget.py

demo-llm: $(VENV)/.run  ## the proxy before a real LLM on this machine (llama.cpp, downloads 130 MB once)
	HEADWATER=$(BIN)/headwater bash scripts/demo-llm.sh

lock: setup  ## new exact versions, the newest that setup.cfg allows
	$(COMPILE) --build-deps-for editable --output-file config/lock/run.txt setup.cfg
	$(COMPILE) --extra dev --constraint config/lock/run.txt --output-file config/lock/dev.txt setup.cfg

clean:  ## remove what was made, but not var/ (the database)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './node_modules/*' -exec rm -rf {} +
