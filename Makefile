# Every target sets up what it needs by itself: a fresh machine needs Python 3.11 or later, no more.
#   make quickstart ARGS="--num-prompts 8"      options go to the script that is run
#   make test ARGS="-k ngram" JOBS=0           JOBS=0 is one process, for a debugger
#   make test PYTHON=python3.13 VENV=.venv313   another interpreter, beside the first

PYTHON ?= python3
VENV ?= .venv
# The compilers of libtpu and CUDA, about 6 GB; only `make aot` looks here.
AOT_VENV ?= .venv-aot
ARGS ?=
# Test processes, one a core. A file's tests stay together: they share what they compile.
JOBS ?= auto
# PyTorch without CUDA; only `make interop` looks here.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow test-real interop lint format bench aot gpu-check clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.installed-experiments  ## decode real prompts with every method that needs no training
	$(BIN)/python -m experiments.compare $(ARGS)

test: $(VENV)/.installed-dev  ## the test suite: no weights to download, nothing slow
	$(BIN)/python -m pytest -q -n $(JOBS) --maxprocesses 8 --dist loadfile $(ARGS)

test-slow: $(VENV)/.installed-dev  ## the tests that take minutes
	XLA_FLAGS= $(BIN)/python -m pytest -q -m 'slow and not interop' $(ARGS)

test-real: $(VENV)/.installed-dev  ## the tests on real weights, fetched once
	XLA_FLAGS= $(BIN)/python -m pytest -q -m 'real and not slow and not interop' $(ARGS)

interop: $(VENV)/.installed-interop  ## compare with PyTorch and transformers
	XLA_FLAGS= $(BIN)/python -m pytest -q -m interop $(ARGS)

lint: $(VENV)/.installed-dev  ## style and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev  ## mend the style in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## run every experiments/bench_*.py
	@for file in experiments/bench_*.py; do \
	  [ -e "$$file" ] || { echo "There is no experiments/bench_*.py."; exit 1; }; \
	  name=$$(basename "$$file" .py); \
	  echo "== $$name"; \
	  $(BIN)/python -m "experiments.$$name" $(ARGS) || exit 1; \
	done

aot: $(AOT_VENV)/.installed  ## compile the kernels for TPUs and an H200 that need not be there
	$(AOT_VENV)/bin/python -m experiments.aot_kernels --out results/aot $(ARGS)

gpu-check:  ## on a GPU, with the jax of $(PYTHON): are the kernels right, and how fast
	$(PYTHON) -m experiments.gpu_check $(ARGS)

clean:  ## remove the environment, builds and caches; results and weights stay
	rm -rf $(VENV) $(AOT_VENV) .cache/jax .jax_cache .hypothesis .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# Stamps: an install runs again only when pyproject.toml has changed since.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "decodax needs Python 3.11 or later, and '$(PYTHON)' is not." \
	    "Choose another with: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Could not create $(VENV); on Debian and Ubuntu, install the package python3-venv."; \
	  exit 1; }

$(VENV)/.installed-experiments: pyproject.toml | $(BIN)/python
	@echo "Installing decodax[experiments] into $(VENV) (the first time, some minutes)"
	@$(PIP) -e '.[experiments]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing decodax[models,train,experiments,dev] into $(VENV) (the first time, some minutes)"
	@$(PIP) -e '.[models,train,experiments,dev]'
	@touch $@

$(VENV)/.installed-interop: pyproject.toml $(VENV)/.installed-dev
	@echo "Installing decodax[interop] into $(VENV) (PyTorch and transformers)"
	@$(PIP) --isolated --retries 0 --index-url $(TORCH_INDEX) 'torch>=2.6' 2>/dev/null || \
	  echo "No PyTorch from $(TORCH_INDEX): taking the default one, a larger download"
	@$(PIP) -e '.[interop]'
	@touch $@

$(AOT_VENV)/.installed: pyproject.toml
	@echo "Installing decodax[aot] into $(AOT_VENV): the compilers of libtpu and CUDA, about 6 GB"
	@$(PYTHON) -m venv $(AOT_VENV)
	@$(AOT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[aot]'
	@touch $@
