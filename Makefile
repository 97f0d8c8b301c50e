# Every target does its own set-up; all it needs is make and Python 3.11 or newer (PYTHON=... picks another one).
# The set-up lives in .venv and is repeated only when constraints.txt or pyproject.toml change.

PYTHON ?= python3
MODEL := smollm2-135m-instruct
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help setup demo test lint types wheel check containers format lock clean

help:
	@echo "make setup       virtual environment in .venv, dependencies, model"
	@echo "make demo        start the four processes, stream an answer, stop"
	@echo "make test        the whole test suite"
	@echo "make lint        ruff: rules and formatting"
	@echo "make types       mypy --strict over code and tests"
	@echo "make wheel       build a wheel and try it in a clean environment without torch"
	@echo "make check       lint, types, test, wheel: what CI runs"
	@echo "make containers  build the image, start the compose stack, ask it something, stop"
	@echo "make format      let ruff rewrite what it can"
	@echo "make lock        write the versions in .venv to constraints.txt"
	@echo "make clean       remove .venv and everything built (models stay in DS_HOME)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "==> virtual environment in .venv"
	@$(PYTHON) -m venv .venv

$(STAMP): constraints.txt pyproject.toml deploy/install-torch.sh | $(BIN)/python
	@echo "==> torch"
	@deploy/install-torch.sh $(BIN)/python
	@echo "==> other dependencies, and this project in place"
	@$(BIN)/python -m pip install -c constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP)
	@echo "==> model $(MODEL)"
	@$(BIN)/dsctl model pull $(MODEL)

demo: setup
	@deploy/demo.sh $(BIN)

# two files at a time: much of the suite waits for processes that start, stop, or fall silent
test: setup
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

wheel: $(STAMP)
	@.ci/wheel $(BIN)/python

check: lint types test wheel

containers: $(STAMP)
	@deploy/try-containers.sh

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(STAMP)
	@sed -n '/^#/p' constraints.txt > .venv/constraints.txt
	@$(BIN)/pip freeze --all --exclude pip --exclude-editable | sed 's/^\(torch==[0-9.]*\)+cpu$$/\1/' >> .venv/constraints.txt
	@mv .venv/constraints.txt constraints.txt
	@touch $(STAMP)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis deploy/wheelhouse/*.whl
	find common services tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
