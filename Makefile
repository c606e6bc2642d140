# `make` lists the commands. They run in .venv, which the first one sets up.

PYTHON ?= python3
DATASET ?= digits
ARGS ?=
BIN := .venv/bin

help:
	@echo "make train     set up .venv, train ResNet-18, show the result"
	@echo "               [DATASET=$(DATASET)] [ARGS='--epochs 3 ...']"
	@echo "make test      set up .venv, run all tests except the slow ones"
	@echo "make test-all  run all tests"
	@echo "make test-slow run only the slow tests"
	@echo "make lint      run ruff and pyright"
	@echo "make docs      build the documentation in build/site; warnings are errors"
	@echo "make bench     run the quick benchmarks [ARGS='-k step']"
	@echo "make gpu       test and measure on an NVIDIA GPU, in ten minutes [ARGS=--dry-run]"
	@echo "make numerics  measure errors against fp64, write docs/numerics.*"
	@echo "make depth     train with and without skip connections, write docs/skip.* [minutes]"
	@echo "make kernels   compile for ten GPU families, write docs/kernels.*"

train: .venv/train
	$(BIN)/resnet-fast train --dataset $(DATASET) $(ARGS)

PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: .venv/dev
	$(PYTEST) -m "not slow" $(ARGS)

test-all: .venv/dev
	$(PYTEST) $(ARGS)

test-slow: .venv/dev
	$(PYTEST) -m slow $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/dev
	$(BIN)/python -m pytest benchmarks --quick $(ARGS)

docs: .venv/dev
	$(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

gpu: .venv/dev
	$(BIN)/python -m benchmarks.gpu $(ARGS)

numerics: .venv/dev
	PYTHONPATH=. $(BIN)/python tests/numerics_page.py $(ARGS)

depth: .venv/dev
	PYTHONPATH=.:tests $(BIN)/python tests/depth_page.py $(ARGS)

kernels: .venv/dev
	PYTHONPATH=. TRITON_INTERPRET=0 $(BIN)/python tests/kernels_page.py

# Stamp files: one per set of extras.
.venv/train .venv/dev: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(@F)]'
	@touch $@

.PHONY: help train test test-all test-slow lint docs bench gpu numerics depth kernels
