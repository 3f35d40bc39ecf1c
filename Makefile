# `make demo` and `make test` set up what they need: a virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# llama.cpp's vocabulary files with their test vectors, out of a source package; for tests alone.
LLAMA_SOURCE := llama-cpp-python==0.3.36
export PINFER_TEST_VOCABS ?= $(abspath $(VENV))/vocabs
# Sleeping OpenMP threads: spinning ones stall each other where cores are shared.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint types bench format vocabs clean

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
# The Gemma model and the vocabularies are only for tests; where they cannot be had, tests skip and say so.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	-$(BIN)/pip install -q -c constraints.txt -e ".[models]"
	-$(MAKE) vocabs
	touch $@

vocabs:
	mkdir -p $(VENV)/source $(VENV)/vocabs
	$(BIN)/pip download -q --no-deps --no-binary :all: -d $(VENV)/source $(LLAMA_SOURCE)
	tar -xzf $(VENV)/source/llama_cpp_python-*.tar.gz -C $(VENV)/vocabs --strip-components=4 \
		--wildcards '*/vendor/llama.cpp/models/ggml-vocab-*'
	rm -rf $(VENV)/source

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks *.egg-info
