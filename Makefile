# Every target does its own set-up: a machine with Python >= 3.11, git and make is enough.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SECONDS ?= 20

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench schema lock clean

help:  ## Show this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/ready: pyproject.toml .ci/requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mdcollector needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .ci/requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(VENV)/ready  ## Make the virtual environment .venv with everything pinned

demo: setup  ## Run the whole fleet offline for some SECONDS=20 and prove what it wrote
	$(BIN)/python -m tools.demo --seconds $(SECONDS) --out demo-out

test: setup  ## Run the tests
	$(BIN)/python -m pytest

check: setup  ## Lint, types, import directions, and whether generated texts are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.docs --check

bench: setup  ## Measure; writes bench/results.*
	$(BIN)/python -m bench all

schema: setup  ## Write the generated parts of the documentation anew
	$(BIN)/python -m tools.docs

lock: setup  ## Pin the newest allowed versions in .ci/requirements.lock
	$(BIN)/python -m pip install --quiet pip-tools
	$(BIN)/pip-compile --quiet --all-extras --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file .ci/requirements.lock pyproject.toml

clean:  ## Remove what was made here, environments included
	rm -rf .venv .venv-* demo-out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
