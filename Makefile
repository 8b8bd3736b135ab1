# `make demo` and `make test` each take a fresh clone to their goal: Python >= 3.11 and make
# are all they need. PYTHON chooses the interpreter, VENV the virtual environment, ARGS is
# passed on: make demo ARGS="--shape 64 64", make test ARGS="tests/physics -x".
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint format bench install

demo: $(STAMP)
	$(BIN)/nanobeam demo $(ARGS)

test: lint
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "nanobeam-bluesky needs Python >= 3.11, but '$(PYTHON)' is" \
	        "$$($(PYTHON) --version 2>&1); choose another: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
	    exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	    echo "could not create $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "installing into $(VENV), which takes a few minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt -e ".[all,test]"
	@touch $@
