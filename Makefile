# Everything that is done with this project. `make` alone says what there is.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup run test test-all lint smoke bench tensorboard clean

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(VENV)/.done  ## make .venv and install everything into it, pinned by constraints.txt

# torch first: with none installed, an open range would fetch a CUDA build of several GB
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --upgrade pip
	$(RUN) -m pip install -q -c constraints.txt torch
	$(RUN) -m pip install -q -c constraints.txt -e '.[dev,sweep,text,generate]'
	@touch $@

run: setup  ## the main job: ResNet-20 teaches a network 50 times smaller (make run ARGS="loss.temperature=2")
	$(RUN) -m kdlab experiment=kd_resnet $(ARGS)

test: setup  ## lint, types and every test but the slow ones
	$(MAKE) lint
	$(RUN) -m pytest -n auto $(ARGS)

test-all: setup  ## lint, types and every test
	$(MAKE) lint
	$(RUN) -m pytest -n auto -m "" $(ARGS)

lint: setup  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

smoke: setup  ## one quick experiment from end to end, in a minute
	$(RUN) -m kdlab experiment=kd_resnet epochs=2 teacher.epochs=2 name=smoke $(ARGS)

bench: setup  ## speed and memory, as ratios
	$(RUN) -m benchmarks $(ARGS)

tensorboard: setup  ## the curves of all runs, at http://localhost:6006
	$(VENV)/bin/tensorboard --logdir outputs

clean:  ## remove .venv and caches; runs in outputs/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
