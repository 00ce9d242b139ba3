# Every target sets itself up: Python 3.11 or newer and make are all that a machine needs.

PYTHON ?= python3
OUT ?= quickstart
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal
READY := .venv/ready

.DEFAULT_GOAL := help
.PHONY: help setup quickstart check lint format types test test-all bench interchange gpu wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## the virtual environment .venv with the pinned set and the package, editable

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "$$(grep ^torch== constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(READY)  ## all of RLHF on the embedded model, into OUT=quickstart; again: ARGS=--overwrite
	$(BIN)/tether quickstart --out $(OUT) $(ARGS)

check: lint types test-all  ## everything that must pass before a change goes in

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY)  ## let ruff repair what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(READY)  ## mypy, strict on the mathematics, the types and the algorithms
	$(BIN)/mypy

test: $(READY)  ## all tests but the slow ones; ARGS='-k grpo' chooses among them
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: $(READY)  ## all tests
	$(PYTEST) $(ARGS)

bench: $(READY)  ## all speed benchmarks against the peers; DATA=DIR holds the HH pairs
	test -d .peers || $(BIN)/python -m benchmarks.peers setup
	$(BIN)/python -m benchmarks.rollout $(ARGS)
	$(BIN)/python -m benchmarks.grpo_step $(ARGS)
	$(BIN)/python -m benchmarks.ppo_step $(ARGS)
	$(BIN)/python -m benchmarks.reward_epoch --data $(DATA) $(ARGS)
	$(BIN)/python -m benchmarks.logprob_memory
	$(BIN)/python -m benchmarks.cost

interchange: $(READY)  ## what TRL and pipelines make of our models and pairs, and the reverse, in an environment of its own
	test -d .peers/trl-1.16 || $(BIN)/python -m benchmarks.peers setup --only 1.16.0
	$(PYTEST) tests/interchange $(ARGS)

gpu:  ## everything for one card, in under nine minutes, by .venv or else the Python of the machine; ARGS=--list
	$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) -m benchmarks.gpu $(ARGS)

wheel: $(READY)  ## the wheel, into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove the environment, caches and built wheels
	rm -rf .venv .mypy_cache .ruff_cache .hypothesis dist build
