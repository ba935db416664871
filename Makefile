# The verbs of the project. Every one works on a clean checkout: what it needs, it installs.
VENV   := .venv
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: help test lint type unit e2e fire kernel demo demo-down bench bench-control clean

help:  ## Show the verbs.
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

test: lint type unit e2e  ## Everything: lint, types, unit, property, contract and end-to-end tests.

lint: $(READY)  ## Style, imports and architecture.
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports

type: $(READY)  ## Types.
	$(VENV)/bin/mypy

unit: $(READY) packages  ## Unit, property and contract tests.
	$(PYTHON) -m pytest tests/unit tests/property tests/contract

e2e: $(READY) packages  ## End-to-end tests on a real Swarm: engine 20.10, then 26.1.
	$(PYTHON) -m pytest tests/e2e

fire: $(READY) packages  ## 200 starts and stops under capture, and storms; JSON goes to build/fire/.
	$(PYTHON) -m pytest tests/e2e -m long -k host

kernel: $(READY) packages  ## The same contract on kernel WireGuard, in a virtual machine (emulated, some minutes).
	deploy/vm/run --limit 2400 $(CURDIR)/$(PYTHON) -m pytest -p no:cacheprovider -k '[kernel' tests/contract/test_kernel.py

demo: $(READY) packages  ## A three-node Swarm on this machine, with services that talk through WireGuard.
	$(PYTHON) deploy/proof/demo.py up

demo-down: $(READY)  ## Stop the demo and leave nothing behind.
	$(PYTHON) deploy/proof/demo.py down

bench: $(READY) packages  ## Measure task starts and links on a real Swarm; JSON goes to build/bench/.
	PYTHONPATH=deploy $(PYTHON) -m tests.bench

bench-control: $(READY) packages  ## Measure the control side of one node beside wg, in the virtual machine; JSON in build/bench/.
	$(PYTHON) -m tests.bench.control

packages:  ## Debian packages that tests and lab need.
	deploy/packages.sh
.PHONY: packages

$(READY): pyproject.toml constraints.txt
	deploy/venv.sh $(VENV)
	@touch $@

clean:  ## Remove what was built here.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
