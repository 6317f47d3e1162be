# Every target makes .venv from requirements.lock when needed; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo demo-train test test-all chaos lint docs bench bench-long lock clean
help:            ## what there is
	@grep -E '^[a-z-]+: *.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.ready: requirements.lock pyproject.toml
	@echo "installing the packages of requirements.lock into $(VENV): a minute or more"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock || $(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps -e . || $(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

demo: $(VENV)/.ready   ## 64 brains from the model that travels along, verified, with a report; under 3 minutes on 2 cores
	$(BIN)/python jobs/demo.py

demo-train: $(VENV)/.ready   ## the whole line, trainings included, on procedural brains, about 6 minutes on 2 cores
	$(BIN)/python jobs/demo.py --train

test: $(VENV)/.ready   ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" --durations 25

test-all: $(VENV)/.ready   ## the tests and the long suites
	$(BIN)/python -m pytest -q --chaos

chaos: $(VENV)/.ready   ## breaks everything on purpose and writes the table of docs/reliability.md
	$(BIN)/python -m pytest -q --chaos tests/chaos
	$(BIN)/python -m benchmarks.protocol_cost

lint: $(VENV)/.ready   ## ruff, mypy, import contracts, known vulnerabilities of the locked packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.security.audit

docs: $(VENV)/.ready   ## the site, into docs/_build/html; a broken link or an undocumented name is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html -c docs . docs/_build/html

bench: $(VENV)/.ready   ## speed on this machine, about 15 minutes on two quiet cores; writes into docs/
	$(BIN)/python -m benchmarks.ladder --rounds 3 --figure docs/images/ladder.png
	$(BIN)/python -m benchmarks.training_speed
	$(BIN)/python -m benchmarks.overhead --rounds 1 --per-shard 8
	$(BIN)/python -m benchmarks.covariate_distribution

bench-long: bench   ## also what takes longer: the paper's size on a CPU, 100,000 rows
	$(BIN)/python -m benchmarks.ladder --full --rounds 2 --figure docs/images/ladder.png
	$(BIN)/python -m benchmarks.control_plane

lock: pyproject.toml   ## requirements.lock from pyproject.toml
	uv pip compile --universal --python-version 3.11 --extra dev --no-header --no-annotate --no-emit-index-url --quiet pyproject.toml -o requirements.lock

clean:           ## what the demo and the tests left
	rm -rf demo-output demo-train-output docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
