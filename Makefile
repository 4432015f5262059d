# Two commands do everything on a bare machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-chat test lint types unit chaos bench clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt tools/setup.sh
	@VENV="$(VENV)" PYTHON="$(PYTHON)" TORCH="$(TORCH)" sh tools/setup.sh

setup: $(READY) ## Make .venv with everything (once; minutes)

demo: $(READY) ## News topics, end to end on real data; KEEP=1 keeps serving until Ctrl-C
	@$(BIN)/llmo run examples/newsdesk/llmo.yaml $(if $(KEEP),--keep)

demo-chat: $(READY) ## Your own assistant: conversations to a streaming chat endpoint; KEEP=1 keeps serving until Ctrl-C
	@$(BIN)/llmo run examples/assistant/llmo.yaml $(if $(KEEP),--keep)
	@$(BIN)/python examples/assistant/ask.py

lint: $(READY) ## Lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## Static types, strict
	$(BIN)/mypy

unit: $(READY) ## The tests
	$(BIN)/pytest -n 2 --dist loadfile

test: lint types unit ## Lint, types and all tests

chaos: $(READY) ## Kill training, groups and servers at 30 random moments
	LLMO_CHAOS=30 $(BIN)/pytest -m chaos tests/flows

bench: $(READY) ## The figures of the README: serving and training against the usual choices
	$(BIN)/python benchmarks/serve_encoder.py
	$(BIN)/python benchmarks/train_classifier.py

clean: ## Remove .venv, caches and the demo's store
	rm -rf $(VENV) .llmo .mypy_cache .ruff_cache .pytest_cache .hypothesis
