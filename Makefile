# Every target does its own set-up: a machine with Python >= 3.11, git and make is enough.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SECONDS ?= 20
comma := ,

.DEFAULT_GOAL := help
.PHONY: help setup demo soak up down restart status logs top doctor test check bench schema lock clean

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

check: setup  ## Lint, types, import directions, generated texts, and whether dependencies are those pinned
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.docs --check
	$(BIN)/python -m tools.audit

CONFIG ?= fleet.toml
LOGS ?= logs
WITHIN ?= 120

# Whether what make up started as $(1) still runs, as $$pid: a number of an old file may be another process by now.
define runs
{ pid=$$(cat $(LOGS)/$(1).pid 2>/dev/null) && tr '\0' ' ' 2>/dev/null </proc/$$pid/cmdline | grep -q "mdcollector $(2) "; }
endef

# Start $(1) as `mdcollector $(2)` unless it runs, until it says $(3). Who does not get so far is no longer there.
define start
	@if $(call runs,$(1),$(2)); then echo "$(1): runs already"; exit 0; fi; \
	mkdir -p -m 0750 $(LOGS) && touch $(LOGS)/$(1).log && said=$$(stat -c %s $(LOGS)/$(1).log) || exit; \
	nohup $(BIN)/mdcollector $(2) -c $(CONFIG) >>$(LOGS)/$(1).log 2>&1 & pid=$$!; \
	for _ in $$(seq $$(($(WITHIN) * 5))); do \
		tail -c +$$((said + 1)) $(LOGS)/$(1).log | grep -q '$(3)' && { echo $$pid >$(LOGS)/$(1).pid; echo "$(1): started"; exit 0; }; \
		kill -0 $$pid 2>/dev/null || { wait $$pid; code=$$?; tail -c +$$((said + 1)) $(LOGS)/$(1).log >&2; exit $$code; }; \
		sleep 0.2; \
	done; echo "$(1): not ready within $(WITHIN) s, stopped; see $(LOGS)/$(1).log" >&2; kill -TERM $$pid; exit 1
endef

# Stop $(1) if it runs and wait for its end; what it says meanwhile is shown. With $(3): it must say this.
define stop
	@$(call runs,$(1),$(2)) || { echo "$(1): does not run"; rm -f $(LOGS)/$(1).pid; exit 0; }; \
	said=$$(stat -c %s $(LOGS)/$(1).log); kill -TERM $$pid; \
	timeout $(WITHIN) tail --pid=$$pid -f /dev/null || { echo "$(1): does not end within $(WITHIN) s" >&2; exit 1; }; \
	rm -f $(LOGS)/$(1).pid; tail -c +$$((said + 1)) $(LOGS)/$(1).log; \
	$(if $(3),tail -c +$$((said + 1)) $(LOGS)/$(1).log | grep -q '$(3)')
endef

up: setup  ## Start the fleet of CONFIG=fleet.toml in the background, with its monitor, as far as they do not run yet
	$(call start,fleet,up,: running$(comma) rings in )
	$(call start,monitor,monitor,serving on )
	@echo "make status, make top, make logs, make down"

down:  ## Stop what make up started, in order, and print rows in = rows written
	$(call stop,fleet,up,every row that went in was written\|no writer is configured)
	$(call stop,monitor,monitor)

restart:  ## make down, then make up: after an upgrade or another CONFIG
	@$(MAKE) --no-print-directory down
	@$(MAKE) --no-print-directory up

status: setup  ## Show the fleet of CONFIG
	$(BIN)/mdcollector status -c $(CONFIG)

top: setup  ## Watch the fleet of CONFIG
	$(BIN)/mdcollector top -c $(CONFIG)

logs:  ## Follow the logs of make up
	@test -f $(LOGS)/fleet.log || { echo "make up has written no logs to $(LOGS)/ yet" >&2; exit 1; }
	tail -n 50 -F $(LOGS)/fleet.log $(LOGS)/monitor.log

doctor: setup  ## Look whether this machine is fit for the fleet of CONFIG
	$(BIN)/mdcollector doctor -c $(CONFIG)

bench: setup  ## Measure; writes bench/results.*
	$(BIN)/python -m bench all

schema: setup  ## Write the generated parts of the documentation anew
	$(BIN)/python -m tools.docs

PIP_COMPILE = $(VENV)-lock/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links

lock:  ## Pin the newest allowed versions in .ci/requirements.lock, and those of them that the image needs
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet pip-tools
	$(PIP_COMPILE) --all-extras --output-file .ci/requirements.lock pyproject.toml
	$(PIP_COMPILE) --extra top --all-build-deps --constraint .ci/requirements.lock --output-file .ci/image.lock pyproject.toml

clean:  ## Remove what was made here, environments and logs included
	@! $(call runs,fleet,up) || { echo "the fleet of make up runs from here: make down first" >&2; exit 1; }
	rm -rf .venv .venv-* demo-out soak-out $(LOGS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
