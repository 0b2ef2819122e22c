# Two commands set up a fresh machine: `make demo` and `make test`. Each makes the virtual
# environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TENSORRT := $(VENV)/.tensorrt
JOBS ?= auto

.PHONY: help install demo test test-all test-slow lint format protos clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

# A large wheel that only some tests need: where it cannot be had, they say so and are skipped.
$(TENSORRT): $(STAMP)
	@$(BIN)/python -m pip install --quiet --editable '.[tensorrt]' \
		|| echo "tensorrt-rtx cannot be installed here: its tests are skipped"
	@touch $(TENSORRT)

install: $(STAMP)  ## the environment alone, in .venv

demo: $(STAMP)  ## the whole story on this machine; CHECKPOINT=dir uses your own model
	$(BIN)/python -m examples.demo $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)')

test: $(TENSORRT)  ## the tests that belong to every change
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

test-all: $(TENSORRT)  ## these and the slow ones, as CI runs them
	$(BIN)/python -m pytest -n $(JOBS) -m 'not gpu' $(PYTEST_ARGS)

test-slow: $(TENSORRT)  ## only the slow ones
	$(BIN)/python -m pytest -n $(JOBS) -m 'slow and not gpu' $(PYTEST_ARGS)

lint: $(STAMP)  ## style, types, import contract, drift of protocols and of generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_protos.py --check
	$(BIN)/python -m scripts.support_reference --check
	$(BIN)/python -m scripts.state_reference --check

format: $(STAMP)  ## rewrite what the linters can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(STAMP)  ## generate the protocol code again
	$(BIN)/python scripts/generate_protos.py

clean:  ## remove the environments and caches
	rm -rf $(VENV) .venv-protos .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
