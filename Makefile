# Every target sets up what it needs: a virtual environment, the dependencies, the default model.
#   make serve    make test    make help
# Settings: PYTHON=python3.12  VENV=.venv  MODEL=<hub name, directory or GGUF file>
#           SERVE_ARGS='--port 9000 --replicas 2'  PYTEST_ARGS='-k scheduler'
#           TORCH_INDEX=https://download.pytorch.org/whl/cpu   (torch without CUDA)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; \
	done)
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=
SERVE_ARGS ?=
BENCH_ARGS ?= --modes full,exact,rollback,free --batch 1,8 --new-tokens 64 --vs transformers \
	--json bench-engine.json
PYTEST_ARGS ?=
STUDY_ARGS ?=
TORCH_INDEX ?=
PIP_INDEX_ARGS := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# The stamps depend on pyproject.toml: an environment that is up to date costs nothing.
RUN_STAMP := $(VENV)/.fathom-run
DEV_STAMP := $(VENV)/.fathom-dev

# Tests never ask the hub for anything, and small matrices gain nothing from many threads.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
# Tests that share nothing but the model's files run side by side; each worker takes whole files.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))
PYTEST = $(TEST_ENV) $(BIN)/python -m pytest
SIDE_BY_SIDE = -n $(WORKERS) --dist loadfile
UNIT_TESTS = $(PYTEST) tests/unit $(SIDE_BY_SIDE) $(PYTEST_ARGS)
# A choice of tests (PYTEST_ARGS) may have none in one part: pytest's exit code 5.
OR_NONE = $(if $(PYTEST_ARGS),|| [ $$? -eq 5 ])

.PHONY: help
help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "fathom needs Python 3.11 or newer, and found none on PATH." >&2; \
		echo "Install one (Debian: apt-get install python3 python3-venv), or name it:" >&2; \
		echo "  make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fathom needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)." >&2; \
		echo "Name another one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "== virtual environment: $(VENV) ($$($(PYTHON) -V))"
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; \
		echo "could not make a virtual environment (Debian: apt-get install python3-venv)." >&2; \
		exit 1; }

$(RUN_STAMP): pyproject.toml | $(BIN)/python
	@echo "== dependencies (a few minutes the first time)"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_INDEX_ARGS) -e .
	@touch $@

$(DEV_STAMP): pyproject.toml $(RUN_STAMP) | $(BIN)/python
	@echo "== development dependencies"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_INDEX_ARGS) -e '.[dev]'
	@touch $@

.PHONY: setup dev model
setup: $(RUN_STAMP)  ## Make the virtual environment and install Fathom into it
dev: $(DEV_STAMP)  ## The same with the development tools
model: $(RUN_STAMP)  ## Get the default model into the cache (MODEL= for another)
	@$(BIN)/fathom pull $(MODEL)

.PHONY: serve
serve: model  ## Start a server, stream one answer with its depths, serve until Ctrl-C
	@exec $(BIN)/fathom serve --demo $(if $(MODEL),--model $(MODEL)) $(SERVE_ARGS)

# The tests of the dashboard drive Debian's Chromium. Without one they are skipped, but in CI.
.PHONY: browser
browser:
	@browser=$$(command -v chromium chromium-browser google-chrome | head -n 1 || true); \
	if [ -n "$$browser" ] && command -v chromedriver >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "== Chromium, for the tests of the dashboard"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
			--no-install-recommends chromium chromium-driver; } >/dev/null || true; fi; \
	command -v chromedriver >/dev/null || { \
		echo "no Chromium with its driver: the tests of the dashboard need it" >&2; \
		echo "(Debian: apt-get install chromium chromium-driver)" >&2; }

.PHONY: test quick unit lint format
test: lint model browser  ## Lint, types, then every test: unit, integration, end to end, browser
	@$(UNIT_TESTS) tests/integration/dataplane $(OR_NONE)
	@$(PYTEST) tests/e2e tests/integration $(SIDE_BY_SIDE) -m parallel $(PYTEST_ARGS) $(OR_NONE)
	@$(PYTEST) tests/integration tests/e2e tests/browser -m "not parallel" \
		--ignore tests/integration/dataplane $(PYTEST_ARGS) $(OR_NONE)

quick: $(DEV_STAMP) model  ## The unit tests that are not slow
	@$(UNIT_TESTS) -m "not slow"

unit: $(DEV_STAMP) model  ## The unit tests
	@$(UNIT_TESTS)

lint: $(DEV_STAMP)  ## ruff (style, format) and mypy (types)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV_STAMP)  ## Rewrite the sources in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: study
study: model $(DEV_STAMP)  ## Search, promote, serve at what was found (STUDY_ARGS=--keep)
	@$(BIN)/python -m experiments.study.run --work study-work \
		$(if $(MODEL),--model $(MODEL)) $(STUDY_ARGS)

.PHONY: bench clean
bench: model $(DEV_STAMP)  ## Benchmark the engine against transformers (BENCH_ARGS=)
	@$(BIN)/fathom bench engine $(if $(MODEL),--model $(MODEL)) $(BENCH_ARGS)

clean:  ## Remove the virtual environment and all caches of the tools
	rm -rf "$(VENV)" build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
