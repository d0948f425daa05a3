# Needs python3 (3.11 or later) and make; everything else is installed into .venv.

PYTHON ?= python3
PORT ?= 3000
PYTEST_JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt
# Their clusters have two workers themselves, and are started once for a file.
ENGINES := sf_pipelines_tests/engines

export DAGSTER_HOME := $(CURDIR)
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help install install-dev snapshot ui test lint types walls fast-tests test-all test-rest chromium docs bench size clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

# The stamps lie inside .venv, so that they go with it and git never sees them.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 is %d.%d; sf_pipelines needs 3.11 or later: make PYTHON=/path/to/python" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-ui: $(VENV)/.created $(INPUTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ui]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(INPUTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed-ui

install: $(VENV)/.installed-ui

install-dev: $(VENV)/.installed-dev

snapshot: install  ## build the demo snapshot through Dagster, then search it
	@$(BIN)/python -m sf_pipelines.defs.digits.tour

ui: install  ## Dagster's UI on the demo, at http://127.0.0.1:3000 (PORT=...)
	$(BIN)/dagster dev --workspace workspace.yaml --host 127.0.0.1 --port $(PORT)

test: lint types walls fast-tests  ## lint, types, import walls and the fast tests

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/pyright

walls: install-dev
	$(BIN)/lint-imports

fast-tests: install-dev
	$(BIN)/python -m pytest -m "not slow and not browser" -n $(PYTEST_JOBS)

test-all: test test-rest  ## test, then the long fault runs and the browser

test-rest: install-dev chromium
	$(BIN)/python -m pytest -m "slow and not browser" -n $(PYTEST_JOBS) --ignore $(ENGINES)
	$(BIN)/python -m pytest -m slow $(ENGINES)
	$(BIN)/python -m pytest -m browser

# As root on Debian the browser is installed; elsewhere the browser tests say that they are skipped.
chromium:
	@if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; \
	  else echo "chromium or chromedriver is missing: the browser tests will be skipped"; fi; fi

docs: install  ## write docs/reference.md from the models
	@$(BIN)/python docs/reference.py docs/reference.md

bench: install-dev  ## measure build, engines, memory, recall, search and look-ups (readers)
	$(BIN)/python -m sf_pipelines_tests.benchmarks

size:  ## lines, code, modules and classes of each folder
	@$(PYTHON) -m sf_pipelines_tests.size

clean:  ## remove the environment, the demo's data and Dagster's runs
	rm -rf $(VENV) data history schedules storage logs .logs_queue .tmp_dagster_home_*
