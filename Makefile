# `make help` lists the targets. Variables: PYTHON, VENV, JOBS (test processes), BENCH_PATH, BENCH_ARGS, TORTURE_ARGS.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# Many tests wait for disks, servers and processes: twice as many at a time as there are processors.
CPUS := $(shell getconf _NPROCESSORS_ONLN)
JOBS ?= $(shell echo $$(( 2 * $(CPUS) < 8 ? 2 * $(CPUS) : 8 )))
BENCH_PATH ?= bench-run
BENCH_ARGS ?=
TORTURE_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.expstate-stamp

.PHONY: help demo test browser torture check bench gpu clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do printf '  make %-7s  %s\n' "$$name" "$$text"; done

demo: $(STAMP) ## train on real data, be killed, resume, restore the best weights (a minute)
	@$(BIN)/python notebooks/demo.py

# Tests start hundreds of processes: where bytecode is not to be written, each of them would compile the package again.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(STAMP) ## run every test and the examples in the docstrings
	@command -v strace >/dev/null || bash .ci/install-strace
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || bash .ci/install-postgres
	@command -v chromium >/dev/null || bash .ci/install-chromium
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not gpu"
	@# These break disks and processes, or drive a browser: two at a time, more would make them wait for each other.
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu" tests
	VENV=$(VENV) bash .ci/lessons

browser: $(STAMP) ## open notebooks in JupyterLab, Notebook 7 and Voila with a real browser (minutes)
	@command -v chromium >/dev/null || bash .ci/install-chromium
	$(BIN)/python -m pytest -m slow tests/browser

torture: $(STAMP) ## attack every promise, and write down what was tried (hours; TORTURE_ARGS="-k crash" for a part)
	@command -v strace >/dev/null || bash .ci/install-strace
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || bash .ci/install-postgres
	VENV=$(VENV) bash .ci/torture $(TORTURE_ARGS)

check: $(STAMP) ## lint, format, types, and the floors of the architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

bench: $(STAMP) ## compare the speed with other systems in BENCH_PATH
	@mkdir -p $(BENCH_PATH)
	$(BIN)/expstate bench $(BENCH_PATH) $(BENCH_ARGS)

gpu: ## tests and benchmark on an accelerator, with the PyTorch of this machine, nothing installed
	@PYTHON=$(PYTHON) bash .ci/gpu $(BENCH_PATH) $(BENCH_ARGS)

clean: ## remove what the other targets made, but not the virtual environment
	rm -rf build dist demo-run bench-run .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find expstate tests notebooks -name __pycache__ -type d -exec rm -rf {} +

$(STAMP): pyproject.toml .ci/constraints.txt .ci/setup
	@PYTHON=$(PYTHON) bash .ci/setup $(VENV)
	@touch $@
