# Everything runs in a virtual environment of its own: make test VENV=/elsewhere PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
# LLaMA-Factory takes torchrun from PATH; it has to be this environment's.
export PATH := $(BIN):$(PATH)

.PHONY: install demo test quality style build

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard chatreid_plugin/autoload/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

demo: install
	$(BIN)/chatreid demo demo_run

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python
	$(BIN)/lint-imports

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: install
	$(BIN)/python -m build
