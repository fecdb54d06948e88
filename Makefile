# Every target sets up what it needs: a machine with Python 3.11, make and a package index is enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Sites and coordinators never phone home; neither do the tests.
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export MLFLOW_DISABLE_TELEMETRY = true

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-all lint types docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(STAMP)  ## virtual environment with the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fourdvq needs Python 3.11 or newer, found " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV) (once; one to three minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## the whole federation on synthetic lungs, on this machine
	@$(BIN)/fourdvq-server demo

check: setup lint types  ## lint and types

test: setup  ## the tests (slow ones left out)
	@$(BIN)/python -m pytest -q -m "not slow"

test-all: setup  ## all tests
	@$(BIN)/python -m pytest -q

lint: setup  ## ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup  ## mypy
	@$(BIN)/mypy

docs: setup  ## make the reference pages from the code
	@$(BIN)/python tests/docs_pages.py

clean:  ## remove build products and caches
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
