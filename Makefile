# `make train` and `make test` set everything up in .venv; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint clean
.DELETE_ON_ERROR:

train: .venv/installed
	$(BIN)/mnist-dist train --config quick

test: .venv/installed-dev lint
	$(BIN)/pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml .venv/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
