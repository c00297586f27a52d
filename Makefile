# Everything runs in .venv, which is made on first use. Any Python from 3.11 on will do: make demo PYTHON=python3.12
PYTHON    ?= python3
WORKLOAD  ?= image
MAX_DROP  ?= 0.01
PROCESSES ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help demo test lint format bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     compress a workload: WORKLOAD=image|text|speech|image_mobile MAX_DROP=$(MAX_DROP)"
	@echo "make test     lint, type check, tests and doctests, in PROCESSES=$(PROCESSES) processes: all that CI runs"
	@echo "make lint     ruff and mypy only"
	@echo "make format   rewrite the code as ruff wants it"
	@echo "make bench    the side-by-side runs in benchmarks/, one by one"
	@echo "make clean    remove .venv, out/ and all caches"

demo: .venv/.stamp-demo
	$(BIN)/featherweight compress examples/$(WORKLOAD).py --max-drop $(MAX_DROP) --out out/$(WORKLOAD)

test: lint
	$(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal

lint: .venv/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.stamp-bench
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf .venv out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- environments: one stamp each, so that nothing is installed twice

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: name another one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "$(PYTHON) cannot make environments: name another one with PYTHON=..."; exit 1; }

# torch comes first and alone, so that whichever build pip is set up to find (CPU or CUDA) is settled before the rest.
.venv/.stamp-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e '.[all]'
	@touch $@

.venv/.stamp-dev: .venv/.stamp-demo
	$(PIP) -e '.[all,dev]'
	@touch $@

# pytorchcv asks for torchvision, which the networks of benchmarks/zoo.py do not need and which would change torch.
.venv/.stamp-bench: .venv/.stamp-demo
	$(PIP) -e '.[all,bench]'
	$(PIP) --no-deps pytorchcv
	@touch $@
