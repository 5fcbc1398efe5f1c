# `make help` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
READY := $(VENV)/.ready
PYTHON ?= python3
RANKS ?= 2
WORKERS ?= 3
ARGS ?=

# DeepSpeed compiles its CPU collectives once; they stay in the virtual environment.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export TOKENIZERS_PARALLELISM := true

.PHONY: help setup hooks train test nightly coverage gpu lint types layers docs check format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(READY) ## Make .venv with everything that the other commands need

# torch first: DeepSpeed's build looks for it.
$(READY): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	pip install -q -c constraints.txt setuptools wheel ninja torch
	pip install -q -c constraints.txt --no-build-isolation deepspeed
	pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	rm -f $(TORCH_EXTENSIONS_DIR)/*/lock # of a compilation that was killed: it blocks the next one
	DS_ACCELERATOR=cpu python -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load()'
	touch $@

hooks: $(READY) ## Check what is committed at each `git commit`
	pre-commit install

# Logits are large: let the C library keep their memory from step to step, and not return it.
train: export MALLOC_MMAP_MAX_ := 0
train: export MALLOC_TRIM_THRESHOLD_ := 17179869184
train: $(READY) ## Train a Llama on real text, RANKS=2, ARGS='embedding=vocab_sharded steps=50'
	deepspeed --num_gpus $(RANKS) --no_local_rank examples/train_lm.py $(ARGS)

# An op that some tests use: compiling it takes longer than a test may.
FUSED_ADAM := $(TORCH_EXTENSIONS_DIR)/fused_adam/fused_adam.so
$(FUSED_ADAM): $(READY)
	DS_ACCELERATOR=cpu python -c 'from deepspeed.ops.op_builder.cpu import FusedAdamBuilder as B; B().load()'
	touch $@

# Tests wait much of their time, for ranks and timeouts: three files at a time keep two cores busy.
test: $(FUSED_ADAM) ## Run the tests, WORKERS=3, ARGS='-k parity'
	pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

nightly: $(FUSED_ADAM) ## Run the wide tests: all families of models, 2,500 random programs, damaged checkpoints
	pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -m nightly $(ARGS)

# Ranks, launchers and commands count too: each process writes a file, and `combine` joins them.
coverage: $(FUSED_ADAM) ## Run the tests and show the lines that no process ran, ARGS='tests/gang'
	rm -f .coverage .coverage.*
	coverage run -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS); \
	  status=$$?; coverage combine --quiet && coverage report && exit $$status

# The machine may reach no package index: any torch on it will do that sees a GPU.
gpu: ## Check what holds on one GPU, and time it, ARGS='--size 8'
	@sees_gpu='import safetensors, torch; assert torch.cuda.is_available()'; \
	for python in $(VENV)/bin/python $$(type -aP $(PYTHON)); do \
	  $$python -c "$$sees_gpu" 2>/dev/null && break; python=; \
	done; \
	if [ -z "$$python" ]; then \
	  python=$(VENV)/bin/python; \
	  { test -x $$python || $(PYTHON) -m venv $(VENV); } \
	    && pip install -q -c constraints.txt torch safetensors numpy \
	    || { echo "No $(PYTHON) here has safetensors and a torch that sees a GPU, and none can be installed."; exit 1; }; \
	fi; \
	PYTHONPATH=$(CURDIR) $$python benchmarks/gpu.py $(ARGS)

lint: $(READY) ## Check the style
	ruff check .
	ruff format --check .

types: $(READY) ## Check the types
	mypy

layers: $(READY) ## Check that a package imports only from the layers below it
	lint-imports

docs: $(READY) ## Build the site in build/docs; warnings and dead links are errors
	sphinx-build -q -E -W --keep-going -d build/doctrees docs build/docs

check: lint types layers docs ## All checks but the tests

format: $(READY) ## Put the code into shape
	ruff check --fix .
	ruff format .

clean: ## Remove what the commands made
	rm -rf $(VENV) build dist outputs runs *.egg-info .coverage .coverage.*
