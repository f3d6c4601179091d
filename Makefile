# `make` alone prints help. Every target makes its own virtual environment in $(VENV): Python >= 3.11 and make are enough.
#   make test PYTHON=/path/to/python3.12 VENV=.venv312     another Python, beside the first
#   make test PYTEST_ARGS='-k layering'                    further arguments for pytest

VENV ?= .venv
PYTHON ?=
JOBS ?= 2
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PYTEST := $(PY) -m pytest -n $(JOBS) --dist loadfile
SUPPORTED := import sys; sys.exit(sys.version_info < (3, 11))
VERSION := import platform; print(platform.python_version())
CANDIDATES := $(if $(PYTHON),'$(PYTHON)',python3.13 python3.12 python3.11 python3 python)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-slurm plan-tools lint format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## four-axis scaling study on planted data; ends with report.html (under 10 minutes on 2 cores)
	$(PY) -m launch.sweep experiments/0001_four_axes_planted --on=local

test: $(READY) ## the whole quick suite (under 10 minutes on 2 cores)
	$(PYTEST) -m 'not slow and not slurm' $(PYTEST_ARGS)

test-slow: $(VENV)/.tpu ## the tests marked slow, those of compiled TPU programs among them (no TPU is needed)
	$(PYTEST) -m 'slow and not slurm' $(PYTEST_ARGS) || test $$? -eq 5 # 5: none is marked slow

test-slurm: $(READY) ## the tests against a real SLURM, which is installed first (Debian, root or sudo)
	.ci/install-slurm
	RECSCALE_REQUIRE_SLURM=1 $(PY) -m pytest -m slurm $(PYTEST_ARGS) tests/slurm

plan-tools: $(VENV)/.tpu ## install the TPU compiler, which `python -m launch.plan` needs

lint: $(READY) ## ruff check, ruff format --check, pyrefly
	@failed=0; for check in 'ruff check .' 'ruff format --check .' 'pyrefly check --python-interpreter-path $(PY)'; do \
	  echo "$$check"; $(PY) -m $$check || failed=1; \
	done; exit $$failed

format: $(READY) ## rewrite the code the way lint wants it
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(READY) ## every file of benchmarks/, one after the other: each prints its table and writes its JSON
	@for file in benchmarks/[!_]*.py; do \
	  name=$$(basename $$file .py); echo "benchmarks.$$name"; $(PY) -m benchmarks.$$name || exit 1; \
	done

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The TPU compiler: for `python -m launch.plan` and the slow tests. With it installed, run the rest with JAX_PLATFORMS=cpu.
$(VENV)/.tpu: requirements-tpu.txt $(READY)
	@$(PY) -m pip install -qq --no-deps -r requirements-tpu.txt
	@touch $@

# An environment whose Python is new enough is brought up to date in place. Otherwise the first candidate that is new
# enough makes one (a version manager's stand-in may be on PATH and fail to run). setuptools is among the pinned
# requirements, so that recscale itself, editable, builds without looking for anything on the network.
$(READY): requirements.txt
	@if ! $(PY) -c '$(SUPPORTED)' 2>/dev/null; then \
	  seen=; \
	  for candidate in $(CANDIDATES); do \
	    version=$$("$$candidate" -c '$(VERSION)' 2>/dev/null) || continue; \
	    if ! "$$candidate" -c '$(SUPPORTED)'; then seen="$$seen $$candidate is $$version,"; \
	    elif ! "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then \
	      seen="$$seen $$candidate is $$version without venv (Debian: apt-get install python3-venv),"; \
	    else echo "making $(VENV) with $$candidate ($$version)"; "$$candidate" -m venv --clear $(VENV) && break || exit 1; fi; \
	  done; \
	fi; \
	if ! $(PY) -c '$(SUPPORTED)' 2>/dev/null; then \
	  echo "recscale needs Python >= 3.11 with venv; found:$${seen:- none,} set PYTHON=/path/to/python3.11 (or newer)" >&2; \
	  exit 1; \
	fi
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null
	@echo "installing requirements.txt into $(VENV) (one to three minutes the first time)"
	@$(PY) -m pip install -qq -r requirements.txt
	@$(PY) -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@
