# fusion_ray: two commands, `make demo` and `make test`, each setting up what it needs (one .venv, from requirements/cpu.lock).
SHELL := /bin/bash
KIND ?= cpu
BIN := .venv/bin
DEMO := jobs/configs/demo.yaml

.PHONY: help setup demo test test-unit test-ray test-e2e test-slow lint types check lock zoo bench clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup:           ## the environment alone
	@requirements/setup.sh $(KIND)

demo: setup      ## the main job: teach, align, distill, merge, serve and score the zoo's models
	$(BIN)/fusion-ray run $(DEMO) $(ARGS)

test: setup      ## unit, ray and e2e tests
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-unit: setup ## pure tests, two minutes
	$(BIN)/python -m pytest tests/unit -m "not ray and not e2e and not slow" $(ARGS)

test-ray: setup  ## tests that start Ray
	$(BIN)/python -m pytest -m "ray and not slow" $(ARGS)

test-e2e: setup  ## the whole graph on the zoo's models
	$(BIN)/python -m pytest -m "e2e and not slow" $(ARGS)

test-slow: setup ## what is too long for `make test`
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup      ## ruff, lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup     ## mypy
	$(BIN)/mypy

check: lint types test ## what CI runs

lock: setup      ## regenerate requirements/$(KIND).lock from pyproject.toml
	requirements/lock.sh $(KIND)

zoo: setup       ## retrain the zoo's models from seeds (tens of minutes)
	$(BIN)/python jobs/zoo.py $(ARGS)

bench: setup     ## every benchmark (a file with a main; align.py runs align_fusechat.py's); lines go to runs/benchmarks.jsonl
	@mkdir -p runs; for file in $$(grep -l '^def main' jobs/benchmarks/*.py | grep -v /align_fusechat); do $(BIN)/python $$file | tee /dev/stderr | tail -n 1 >> runs/benchmarks.jsonl; done

clean:           ## caches, those of compiled loops too; not the environment and not the runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find fusion_ray -name "*.nb[ic]" -delete
