# The verbs of the project. Every one works on a clean checkout: what it needs, it installs.
VENV   := .venv
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: help test lint type unit e2e attack life fire kernel kernel-bookworm kernel-trixie kernel-lab demo demo-down bench bench-control clean

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

attack: $(READY) packages  ## What footholds can do: on a real etcd, in process, and on the lab; ends with a table.
	$(PYTHON) -m pytest tests/attack

life: $(READY) packages  ## Certificates and revocations over time: renewal, another CA, autolock, a removed node, a backup.
	$(PYTHON) -m pytest -s tests/life

fire: $(READY) packages  ## 200 starts and stops under capture, and storms; JSON goes to build/fire/.
	$(PYTHON) -m pytest tests/e2e -m long -k host

# No bytecode and no cache is kept in a guest; the logs of guest and kernel are in build/vm/.
GUEST_PYTEST := $(CURDIR)/$(PYTHON) -m pytest -v -p no:cacheprovider --durations=20

# Engine 20.10 on 6.1, 26.1 on 6.12; what takes long and does not hang on the kernel's age runs on 6.1 only. The lab in a
# guest wants the machine for itself: beside other work its mesh is not ready in time.
kernel: kernel-bookworm kernel-trixie  ## Kernel WireGuard beside IPVS and IPsec: Debian's 6.1 and 6.12 in virtual machines (40 to 55 minutes).
kernel-bookworm: ENGINE := host
kernel-bookworm: CONTRACT := $(addprefix tests/contract/test_,kernel.py rules_held.py mtu.py activation.py)
kernel-bookworm: LAB := tests/kernel tests/e2e/test_streams.py
kernel-trixie: ENGINE := trixie
kernel-trixie: CONTRACT := $(addprefix tests/contract/test_,kernel.py rules_held.py)
kernel-trixie: LAB := tests/kernel
kernel-bookworm kernel-trixie: kernel-%: $(READY) packages
	HIVEWIRE_TEST_PATIENCE=6 deploy/vm/run --kernel $* --limit 1800 $(GUEST_PYTEST) -k '[kernel or rules_held' $(CONTRACT)
	deploy/vm/run --kernel $* --lab --limit 3600 $(GUEST_PYTEST) -k '[$(ENGINE)' $(LAB)

kernel-lab: $(READY) packages  ## More on kernel WireGuard: the end-to-end suite in a virtual machine (very slow).
	deploy/vm/run --kernel bookworm --lab --limit 14400 $(GUEST_PYTEST) -k '[host' $(addprefix tests/e2e/test_,mesh.py modes.py matrix.py why_quarantine.py denials.py api.py privileges.py secrets.py)

demo: $(READY) packages  ## A three-node Swarm on this machine, with services that talk through WireGuard.
	$(PYTHON) deploy/proof/demo.py up

demo-down: $(READY)  ## Stop the demo and leave nothing behind.
	$(PYTHON) deploy/proof/demo.py down

bench: $(READY) packages  ## Links beside the field, here and in a virtual machine; BENCH="datapath --rounds 90" chooses.
	PYTHONPATH=deploy $(PYTHON) -m tests.bench $(BENCH)

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
