# make demo | test | check | lock. Each builds .venv first where it is missing or older than its lock file.
# EXTRA=gpu uses the GPU lock (vLLM's CUDA wheel); the default runs anywhere.
EXTRA ?= cpu
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed-$(EXTRA)

.PHONY: demo seeds test fast check lock install

demo: $(INSTALLED)
	$(BIN)/equipoise train configs/demo.yaml

seeds: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python benchmarks/demo_seeds.py 0 1 2

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"
	$(BIN)/python -m pytest -m slow

fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(INSTALLED)

$(INSTALLED): requirements/$(EXTRA).txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --compile-bytecode -r requirements/$(EXTRA).txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -e .
	touch $@

lock: $(INSTALLED)
	$(BIN)/uv pip compile -q pyproject.toml --extra cpu --extra dev --custom-compile-command "make lock" -o requirements/cpu.txt
	$(BIN)/uv pip compile -q pyproject.toml --extra gpu --extra dev --custom-compile-command "make lock" -o requirements/gpu.txt
