# make run | make test | make setup. PYTHON picks the interpreter (3.11 to 3.13), VENV the environment.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do command -v $$p && break; done 2>/dev/null)
VENV ?= .venv
CONFIG ?= configs/rope_ablation.py
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: run setup test test-slow smoke lint

run: setup
	$(VENV)/bin/python -m lab.main --config=$(CONFIG)

setup: $(VENV)/.runs

test: $(VENV)/.tests
	$(VENV)/bin/python -m pytest -m "not slow" -n 2

test-slow: $(VENV)/.tests
	$(VENV)/bin/python -m pytest -m slow

smoke: $(VENV)/.tests
	$(VENV)/bin/python -m pytest -m smoke

$(VENV)/.runs: requirements.txt
	@echo "setting up $(VENV) with $(PYTHON)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lab needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.tests: $(VENV)/.runs requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@
