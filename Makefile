# make run | make test | make setup. PYTHON picks the interpreter (3.11 to 3.13 are tested), VENV the environment, CONFIG
# the study.
# The first that runs and is recent enough: a version manager's shim may be on the path and run nothing.
RECENT = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(RECENT)' && echo $$p && break; done 2>/dev/null)
VENV ?= .venv
CONFIG ?= configs/rope_ablation.py
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: run studies setup test test-slow test-commit test-all test-tpu test-gpu test-hf test-lm-eval test-slurm test-storage smoke

run: setup
	$(VENV)/bin/python -m lab.main --config=$(CONFIG)

studies: setup
	$(VENV)/bin/python launch/studies.py

setup: $(VENV)/.runs

test: $(VENV)/.tests
	$(VENV)/bin/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(VENV)/.tests
	$(VENV)/bin/python -m pytest -m slow -n 2 --dist worksteal

test-commit: $(VENV)/.tests
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.tests
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal --matrix=all

test-tpu: $(VENV)/.tests
	$(VENV)/bin/python -m pytest --matrix=all tests/kernels/test_compile_for_tpu.py

test-gpu: $(VENV)/.tests
	$(VENV)/bin/python -m pytest --matrix=all tests/kernels/test_compile_for_gpu.py

test-hf: $(VENV)/.tests $(VENV)-hf/.ready
	LAB_HF_PYTHON=$(abspath $(VENV)-hf/bin/python) $(VENV)/bin/python -m pytest -s tests/exchange/test_in_transformers.py

# The harness brings much that the lab does not need: it has an environment of its own.
test-lm-eval: $(VENV)-lm-eval/.lm-eval
	$(VENV)-lm-eval/bin/python -m pytest tests/exchange/test_harness.py

# On a real Slurm of two nodes, on this machine: apt-get install slurm-wlm munge.
test-slurm: $(VENV)/.tests
	LAB_SLURM=1 $(VENV)/bin/python -m pytest tests/test_slurm.py

# A server that speaks S3, and what speaks to it, over the lab's own environment: 170 MB, a minute to make.
test-storage: $(VENV)-storage/.ready
	$(VENV)-storage/bin/python -m pytest -s tests/test_object_store.py

smoke: $(VENV)/.tests
	$(VENV)/bin/python -m pytest -m smoke -n 2 --dist loadfile

$(VENV)/.runs: requirements.txt
	@test -n "$(PYTHON)" || { echo "lab needs Python 3.11 or newer, and none was found; name one: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c '$(RECENT)' || { echo "lab needs Python 3.11 or newer; $(PYTHON) is older, or does not run"; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)-lm-eval/.lm-eval: requirements-lm-eval.txt
	$(MAKE) $(VENV)-lm-eval/.tests VENV=$(VENV)-lm-eval
	$(VENV)-lm-eval/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-lm-eval.txt
	@touch $@

$(VENV)/.tests: $(VENV)/.runs requirements-dev.txt requirements-serve.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)-storage/.ready: $(VENV)/.tests requirements-storage.txt
	@$(VENV)/bin/python -m venv $(VENV)-storage
	@$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > $$($(VENV)-storage/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/lab.pth
	$(VENV)-storage/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-storage.txt "moto[s3]" flask flask-cors
	@touch $@

$(VENV)-hf/.ready:
	@$(PYTHON) -m venv $(VENV)-hf
	$(VENV)-hf/bin/python -m pip install --quiet --disable-pip-version-check torch "transformers>=5.24,<6" peft tokenizers numpy jinja2
	@touch $@
