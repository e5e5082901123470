# make demo | make test | make check. A virtual environment in .venv is made once and used by all of them.
#
# TORCH names the build to install: by default 2.13.0, which takes a CPU wheel from pip's own paths where there is one.
# On Linux, pip's default index serves a CUDA build. For a CPU build there, or another CUDA version:
#   make demo TORCH="torch --index-url <index of the build, see pytorch.org/get-started>"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check slow

demo: $(VENV)/.installed
	$(BIN)/kvfuse demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow -n 2 --durations=25

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable ".[train]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(BIN)/pip install --quiet --editable ".[demo-build,dev]"
	touch $@
