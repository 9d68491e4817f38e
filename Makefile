# `make quickstart` and `make test` are all there is to know. Both make their own virtual environment in .venv, and
# install into it again only after pyproject.toml has changed.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Several test processes with one thread each are faster than one with many: the models in the tests are tiny.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help quickstart test venv lint format types test-fast test-slow test-gpu test-gpu-slow test-lowest constraints clean

help:
	@echo "make quickstart  install, fetch two small models and some images, train, score, and ask a question"
	@echo "make test        install, then lint, types and the fast tests"
	@echo "make lint        ruff: rules and format          make format     let ruff put both right"
	@echo "make types       mypy                            make venv       the virtual environment alone"
	@echo "make test-fast   the tests without the slow ones make test-slow  the slow ones: minutes, and downloads"
	@echo "make test-gpu    the tests for an emulated GPU   make test-gpu-slow  its slow ones, and those of training"
	@echo "make test-lowest  the fast tests with the oldest versions of all packages that pyproject.toml allows"
	@echo "make constraints  write the versions of .venv, which the tests passed with, to constraints.txt"
	@echo "make clean       remove the environment and all caches; runs/ stays"

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/vlm quickstart

test: lint types test-fast test-gpu

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-test
	$(BIN)/mypy -p vlm

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" -n logical --maxprocesses 4

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow

# tests/emulated_gpu/README.md. Where no GPU can be emulated, the reason is printed and nothing runs.
EMULATED = reason=$$($(BIN)/python -m tests.emulated_gpu --check 2>&1) || { echo "$@: skipped: $$reason"; exit 0; }; \
  OMP_NUM_THREADS=1 $(BIN)/python -m tests.emulated_gpu $(BIN)/python -m pytest

test-gpu: $(VENV)/.installed-test
	@$(EMULATED) -m "not slow" -n logical --maxprocesses 4 tests/emulated_gpu

test-gpu-slow: $(VENV)/.installed-test
	@$(EMULATED) -m slow tests/emulated_gpu
	@$(EMULATED) -m "not slow" -p tests.emulated_gpu.plugin tests/training

# In an environment of its own, since older packages would stay in .venv.
LOWEST = build/lowest
test-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check --quiet uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --python $(LOWEST)/bin/python --extra test \
	  --output-file $(LOWEST)/requirements.txt pyproject.toml
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --requirement $(LOWEST)/requirements.txt
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -m "not slow" -n logical --maxprocesses 4

constraints: $(VENV)/.installed-test
	$(BIN)/python -m pip freeze --exclude-editable > constraints.txt

venv: $(VENV)/.made

# Some systems ship Python without ensurepip, but with a pip that can install into another environment.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is older or missing: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install pip; }
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
