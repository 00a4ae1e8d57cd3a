# make run    the main job: everything from collecting histories to the report
# make test   the whole test suite
# make test-extras   the tests of MiniGrid, Meta-World and XLand-MiniGrid, which it installs (800 MB)
# make torture    faults of every kind, a sample of each (minutes); make torture-long: all of them (half an hour)
# make docs       the site, in build/site
# make lint | bench | bench-gpu | install | clean
# Works from any directory: make -C path/to/this run

ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
PYTHON ?= python3
VENV := $(ROOT).venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install run test test-extras torture torture-long lint bench bench-gpu docs clean

help:
	@sed -n '1,7p' $(ROOT)Makefile

install: $(READY)

$(READY): $(ROOT)pyproject.toml $(ROOT)constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into .venv (about a minute)"
	@cd $(ROOT) && $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch==2.13.0
	@cd $(ROOT) && $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: install
	@cd $(ROOT) && $(BIN)/cad run

test: install
	@cd $(ROOT) && $(BIN)/python -m pytest -n auto --dist loadscope

test-extras: install
	@cd $(ROOT) && $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[minigrid,metaworld,xland]'
	@cd $(ROOT) && $(BIN)/python -m pytest tests/tasks/test_minigrid.py tests/tasks/test_metaworld.py tests/tasks/test_xland.py tests/tasks/test_optional_environments.py

torture: install
	@cd $(ROOT) && $(BIN)/python -m torture

torture-long: install
	@cd $(ROOT) && $(BIN)/python -m torture --long --keep runs/torture --markdown runs/torture/table.md

lint: install
	@cd $(ROOT) && $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: install
	@cd $(ROOT) && $(BIN)/python -m benchmarks

bench-gpu: install
	@cd $(ROOT) && $(BIN)/python -m benchmarks.gpu

docs: install
	@cd $(ROOT) && $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@cd $(ROOT) && $(BIN)/python -m sphinx -q -W --keep-going -c docs . build/site
	@echo "$(ROOT)build/site/index.html"

clean:
	rm -rf $(VENV) $(ROOT)build $(ROOT)dist $(ROOT).mypy_cache $(ROOT).ruff_cache $(ROOT).pytest_cache $(ROOT).hypothesis
	find $(ROOT)compressed_ad $(ROOT)tests $(ROOT)benchmarks $(ROOT)torture -name __pycache__ -type d -prune -exec rm -rf {} +
