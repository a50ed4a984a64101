# make demo: the main job.  make test: everything CI runs.  make check: lint and types only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-vllm check bench docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml scripts/install.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/install.sh
	touch $@

demo: setup
	$(BIN)/pilotfish demo

test: check
	$(BIN)/python -m pytest

test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest tests_vllm

.venv-vllm/.installed: scripts/install_vllm.sh
	PYTHON="$(PYTHON)" bash scripts/install_vllm.sh
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/tax.py

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
