# Every target creates .venv from requirements.lock if needed; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo demo-train test test-all chaos lint docs bench bench-long lock clean
help:            ## this list
	@grep -E '^[a-z-]+: *.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.ready: requirements.lock pyproject.toml
	@echo "installing the packages of requirements.lock into $(VENV): a minute or more"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock || $(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps -e . || $(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

demo: $(VENV)/.ready   ## 32 brains from the bundled model, verified, with a report; under 3 minutes on 2 cores
	$(BIN)/brainsynth demo

demo-train: $(VENV)/.ready   ## the whole pipeline, training included, on procedural brains; about 6 minutes on 2 cores
	$(BIN)/brainsynth demo --train

test: $(VENV)/.ready   ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" --durations 25

test-all: $(VENV)/.ready   ## the tests, slow ones included
	$(BIN)/python -m pytest -q --chaos

chaos: $(VENV)/.ready   ## fault injection; writes the table of docs/reliability.md
	$(BIN)/python -m pytest -q --chaos tests/chaos
	$(BIN)/python -m benchmarks.protocol_cost

lint: $(VENV)/.ready   ## ruff, mypy, import contracts, wording, known vulnerabilities of the locked packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.language
	$(BIN)/python -m tests.security.audit

docs: $(VENV)/.ready   ## build the site into docs/_build/html; a broken link or an undocumented name is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html -c docs . docs/_build/html

bench: $(VENV)/.ready   ## speed on this machine, about 15 minutes on two idle cores; writes benchmarks/results/
	$(BIN)/python -m benchmarks.ladder --rounds 3 --figure docs/images/ladder.png
	$(BIN)/python -m benchmarks.training_speed
	$(BIN)/python -m benchmarks.overhead --rounds 1 --per-shard 8
	$(BIN)/python -m benchmarks.covariate_distribution

bench-long: bench   ## the longer benchmarks too: the paper's size on a CPU, 100,000 rows
	$(BIN)/python -m benchmarks.ladder --full --rounds 2 --figure docs/images/ladder.png
	$(BIN)/python -m benchmarks.control_plane

lock: pyproject.toml   ## write requirements.lock from pyproject.toml
	uv pip compile --universal --python-version 3.11 --extra dev --no-header --no-annotate --no-emit-index-url --quiet pyproject.toml -o requirements.lock

clean:           ## remove what the demo, the tests and the linters wrote
	rm -rf demo-output demo-train-output docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
