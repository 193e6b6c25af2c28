# Every target does its own set-up: a machine with Python >= 3.11, git and make is enough.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SECONDS ?= 20

.DEFAULT_GOAL := help
.PHONY: help setup demo soak up down status logs top doctor test check bench schema lock clean

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

soak: setup  ## Run the fleet under load and faults for SECONDS=20 (900 is the full one) and prove that nothing was lost
	$(BIN)/python -m tools.soak --seconds $(SECONDS) --out soak-out

WORKERS ?= 3

test: setup  ## Run the tests, WORKERS=3 at a time; what fails beside others on a busy machine has to pass alone
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal || \
		$(BIN)/python -m pytest --last-failed --last-failed-no-failures none -p no:randomly

check: setup  ## Lint, types, import directions, and whether generated texts are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.docs --check

CONFIG ?= fleet.toml

up: setup  ## Start the fleet of CONFIG=fleet.toml in the background, with its monitor
	@mkdir -p logs
	@nohup $(BIN)/mdcollector up -c $(CONFIG) >>logs/fleet.log 2>&1 & echo $$! >logs/fleet.pid
	@nohup $(BIN)/mdcollector monitor -c $(CONFIG) >>logs/monitor.log 2>&1 & echo $$! >logs/monitor.pid
	@echo "started; make status, make logs, make top, make down"

down:  ## Stop what make up started, in order, and print rows in = rows written
	@test -f logs/fleet.pid || { echo "nothing is running here"; exit 1; }
	@kill -TERM $$(cat logs/fleet.pid) && timeout 180 tail --pid=$$(cat logs/fleet.pid) -f /dev/null; tail -n 30 logs/fleet.log
	@-kill -TERM $$(cat logs/monitor.pid) 2>/dev/null
	@rm -f logs/fleet.pid logs/monitor.pid

status: setup  ## Show the fleet of CONFIG
	$(BIN)/mdcollector status -c $(CONFIG)

top: setup  ## Watch the fleet of CONFIG
	$(BIN)/mdcollector top -c $(CONFIG)

logs:  ## Follow the logs of make up
	tail -n 50 -F logs/fleet.log logs/monitor.log

doctor: setup  ## Look whether this machine is fit for the fleet of CONFIG
	$(BIN)/mdcollector doctor -c $(CONFIG)

bench: setup  ## Measure; writes bench/results.*
	$(BIN)/python -m bench all

schema: setup  ## Write the generated parts of the documentation anew
	$(BIN)/python -m tools.docs

PIP_COMPILE = $(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links

lock: setup  ## Pin the newest allowed versions in .ci/requirements.lock, and those of them that the image needs
	$(BIN)/python -m pip install --quiet pip-tools
	$(PIP_COMPILE) --all-extras --output-file .ci/requirements.lock pyproject.toml
	$(PIP_COMPILE) --extra top --all-build-deps --constraint .ci/requirements.lock --output-file .ci/image.lock pyproject.toml

clean:  ## Remove what was made here, environments included
	rm -rf .venv .venv-* demo-out soak-out logs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
