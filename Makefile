# Everything a newcomer needs. `make demo` and `make test` do the whole set-up by themselves.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEED ?= 0
export DS_BUILD_OPS := 0
export OMP_NUM_THREADS ?= 1

# Debian ships venv apart from Python. Root gets it installed, anybody else is told.
define VENV_HELP
if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	echo "installing python3-venv, which this Python lacks" && apt-get update -qq && apt-get install -qq -y python3-venv \
	&& $(PYTHON) -m venv --clear $(VENV); \
else \
	echo "This Python cannot make virtual environments. Install its venv package (Debian: apt-get install python3-venv), then try again." >&2; exit 1; fi
endef

.PHONY: demo test test-full capabilities bench lint setup ops clean

setup: $(STAMP)

# torch goes in before deepspeed, so that pip does not choose another torch; deepspeed is an sdist that needs
# torch and setuptools at build time, hence no build isolation.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "phalanx needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || $(VENV_HELP)
	@echo "set-up, once, about two minutes: build tools, torch, deepspeed, everything else"
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja py-cpuinfo
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[ray,train,s3,dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/phalanx submit experiment=quickstart fault_seed=$(SEED)

# DeepSpeed's op for state on disks, where there is what it takes to compile it: once, a few minutes. Elsewhere it is said.
ops: setup
	@$(BIN)/python -m jobs.engine || echo "So the tests of state on disks are skipped."

# The tests are of the CPU, on every machine; a run, and so the demo, takes what there is.
test test-full bench capabilities ops: export DS_ACCELERATOR ?= cpu
# What is compiled for them is no run's: it may be of another accelerator.
test test-full bench capabilities ops: export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

# What needs no ranks runs on every core; what starts ranks has the machine to itself. Both run, whatever the first finds.
test: ops
	@failed=0; \
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --max-worker-restart 0 --dist loadfile --ignore tests/e2e --ignore tests/benchmarks || failed=1; \
	$(BIN)/python -m pytest tests/e2e || failed=1; \
	exit $$failed

# On top of these, the slow sweeps.
test-full: test
	$(BIN)/python -m pytest -m full

# For a new DeepSpeed: what runs and what it refuses, by trying. Goes on where it was stopped.
capabilities: setup
	$(BIN)/python -m tests.e2e.probe_capabilities --write

# The peers that phalanx is measured against come on top.
bench: setup
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[bench]'
	$(BIN)/python -m pytest tests/benchmarks -m 'full or not full' -s

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
