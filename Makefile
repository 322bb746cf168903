# make quickstart   from a corpus to a generating pondering model, in minutes on two cores
# make test-fast    lint, types, layers and the tests that start no processes: for every change
# make test         lint, types, layers and all tests but those of a cluster
# make test-slurm   the templates on a real Slurm of twenty nodes, on this machine; Slurm has to be installed
# make test-vllm    exported folders in vLLM against transformers, in an environment of its own that is kept
# make vllm-packages   what test-vllm installs, but for this package; it comes while other tests run
# make evidence     where pondering pays: five worlds of facts, the pondering model and every baseline, in about an hour
# make faults       the tests that injure a run, and the table of what they did and what was left
# make mutants      slips put into the arithmetic, one at a time: the tests have to notice each
# make wheel        the tests of what `pip install` gives: the wheel in an environment of its own, outside the clone
# make docs         the documentation as a site, in site/, by an environment of its own, .venv-docs
# make dist         the source distribution and the wheel, in dist/
# make lock         the locks, made again from pyproject.toml and from what they hold; needs `uv`
# make gpu          what is to be known of the GPU at hand, in ten minutes: its tests, its ceilings, every bench;
#                   by .venv's Python where there is one, else $(PYTHON); FLAGS=--train trains for 20 minutes too
# All but `test-vllm`, `vllm-packages`, `docs`, `lock`, `gpu` and `clean` make .venv and install the locked versions first.

VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTHON ?= python3
RUN := runs/quickstart
STDLIB = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('stdlib'))")
# one rank a GPU; without GPUs two ranks, so that ZeRO has something to partition
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
RANKS := $(if $(filter-out 0,$(GPUS)),$(GPUS),2)

# processes that share the test files; each may start two ranks of its own
WORKERS ?= 2
# a file goes to one worker, which makes its fixtures once; the order of the files is that of tests/conftest.py
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# with several --jobs, a make that a test starts would warn that it cannot share them
PYTEST = MAKEFLAGS= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# where the environment with vLLM is kept between runs
VLLM ?= $(HOME)/.cache/ponder-scale-vllm
# the environment of mkdocs
DOCS := .venv-docs

.PHONY: quickstart evidence test test-fast pytest pytest-fast test-slurm test-vllm vllm-packages faults mutants gpu wheel docs dist lock install lint clean

install: $(VENV)/installed

$(VENV)/installed: requirements-dev.lock requirements-torch.txt requirements-triton.lock pyproject.toml
	@echo "== installing the locked packages into $(VENV) (once; minutes on a slow network)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --require-hashes -r requirements-dev.lock
	$(PIP) -r requirements-torch.txt
	@# torch's CUDA build brings the triton it was built for; its CPU build brings none, and the tests interpret kernels
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) --no-deps --require-hashes -r requirements-triton.lock
	$(PIP) --no-deps --editable .
	@touch $@

quickstart: install
	@PATH="$(abspath $(BIN)):$$PATH" sh examples/quickstart.sh "$(RUN)" "$(STDLIB)" $(RANKS)

evidence: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python examples/composition/evidence.py runs/evidence

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/check_prose.py

# two targets, so that `make --jobs 2 test` has one processor look at the code while the tests have begun
test: lint pytest

test-fast: lint pytest-fast

pytest: install
	$(PYTEST) $(SHARED) --ignore tests/slurm --ignore tests/serve

pytest-fast: install
	$(PYTEST) -m "not processes and not slow" --ignore tests/serve $(SHARED)

test-slurm: install
	OMP_NUM_THREADS=1 REQUIRE_SLURM=1 $(BIN)/python -m pytest tests/slurm

vllm-packages:
	@PYTHON=$(PYTHON) timeout 30m sh tests/serve/environment.sh "$(VLLM)" packages

test-vllm:
	@PYTHON=$(PYTHON) timeout 30m sh tests/serve/environment.sh "$(VLLM)"
	OMP_NUM_THREADS=1 REQUIRE_VLLM=1 "$(VLLM)/venv/bin/python" -m pytest tests/serve --confcutdir tests/serve \
	    --timeout 1200 -n $(WORKERS) --dist loadfile

faults: install
	$(PYTEST) -m faults --ignore tests/serve $(SHARED)

mutants: install
	$(BIN)/python -m tests.mutants

# installs nothing: a node with a GPU often has no network, and a Python with its own torch
gpu:
	@$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m benchmarks gpu $(FLAGS)

wheel: install
	$(PYTEST) tests/test_package.py

docs: $(DOCS)/installed
	$(DOCS)/bin/mkdocs build --strict

$(DOCS)/installed: requirements-docs.lock
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $<
	@touch $@

dist: install
	$(BIN)/python -c "from setuptools import build_meta as made; made.build_sdist('dist'); made.build_wheel('dist')"

# versions stay as they are; delete a line of requirements-dev.lock to take the newest, or raise it there
COMPILE := uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
    --no-emit-package torch --no-emit-package triton --constraint requirements-torch.txt --custom-compile-command "make lock"

lock:
	$(COMPILE) --extra dev --output-file requirements-dev.lock
	cp requirements-dev.lock requirements.lock
	$(COMPILE) --constraint requirements-dev.lock --output-file requirements.lock
	$(subst pyproject.toml,tests/serve/requirements.in,$(COMPILE)) --override tests/serve/overrides.in \
	    --output-file requirements-vllm.lock
	$(subst pyproject.toml,docs/requirements.in,$(COMPILE)) --output-file requirements-docs.lock

clean:
	rm -rf $(VENV) $(DOCS) runs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
