# `make train` and `make test` set everything up in .venv; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin
# Of the benchmark:
DATA ?= Dataset
CONFIGS ?= fast fast-99

.PHONY: train test test-all test-gpu lint benchmark clean
.DELETE_ON_ERROR:

train: .venv/installed
	$(BIN)/mnist-dist train --config quick

test: .venv/installed-dev lint
	$(BIN)/pytest -m "quick and not slow"

test-all: .venv/installed-dev
	$(BIN)/pytest -m "not quick and not slow and not engines"

# On a machine with CUDA GPUs: on one, and on all.
test-gpu: .venv/installed-dev
	$(BIN)/pytest -m gpu

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Less than half an hour where nothing else runs; QUICK=1 for a first look.
benchmark: .venv/installed-benchmark
	$(BIN)/python benchmarks/compare.py --data $(DATA) --output docs/speed $(if $(QUICK),--rounds 1 --limit 3200)
	$(BIN)/python benchmarks/time_to_accuracy.py --data $(DATA) $(addprefix --config ,$(CONFIGS)) --output docs/speed \
	  $(if $(QUICK),--seeds 3 --plain-runs 1)

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml .venv/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

.venv/installed-benchmark: pyproject.toml .venv/installed
	$(BIN)/pip install --quiet --editable '.[benchmark]'
	touch $@

clean:
	rm -rf .venv dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
