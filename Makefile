# Every target sets itself up: the first one to run creates .venv and installs into it.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo study test test-fast check format bundles docs release

PYTHON ?= $(firstword $(shell command -v python3.11 python3))
VENV := .venv
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin
WORKERS ?= 2
SIZE ?= small

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | while IFS='|' read -r name text; do \
		printf '  make %-10s %s\n' "$$name" "$$text"; done

install: $(INSTALLED) ## create .venv and install the pinned packages

# Reinstalls when a requirement changes. The stamp comes last: an install that broke off is taken up again.
$(INSTALLED): requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python must be 3.11 or newer, got $$($(PYTHON) --version). Call make with PYTHON=/path/to/python3.11."; exit 1; }
	@echo "Installing into $(VENV): 3 to 6 minutes and 8 GB the first time (CUDA build of PyTorch; runs on a CPU too)."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@touch $@

demo: $(INSTALLED) ## the whole path on a synthetic cohort: some 20 minutes on 2 cores
	PYTHON=$(BIN)/python bash demo/run.sh

study: $(INSTALLED) ## every table of the paper on a synthetic cohort, resumable: SIZE=small or gpu
	$(BIN)/python -m study.run --size $(SIZE)

test: $(INSTALLED) ## all tests, doctests included: about 15 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=15

test-fast: $(INSTALLED) ## the tests without the slow and the two-rank ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not two_ranks"

check: $(INSTALLED) ## lint, format, types, rendered bundles, spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python bundles/render.py --check
	$(BIN)/codespell

format: $(INSTALLED) ## sort imports and format in place
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bundles: $(INSTALLED) ## render bundles/_recipes into bundles/*/configs
	$(BIN)/python bundles/render.py

docs: $(INSTALLED) ## build the documentation into build/docs, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

release: $(INSTALLED) bundles ## pack every bundle into dist/; URL=... says where the archives will lie
	$(BIN)/python bundles/pack.py --out dist --url "$(URL)"
