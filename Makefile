# make quickstart   from a corpus to a generating pondering model, in minutes on two cores
# make test-fast    lint, types, layers and the tests that start no processes: for every change
# make test         lint, types, layers and all tests but those of a cluster
# make test-slurm   the templates on a real Slurm of twenty nodes, on this machine; Slurm has to be installed
# make faults       the tests that injure a run, and the table of what they did and what was left
# make mutants      slips put into the arithmetic, one at a time: the tests have to notice each
# All make .venv and install the locked versions first.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
RUN := runs/quickstart
STDLIB = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('stdlib'))")
# one rank a GPU; without GPUs two ranks, so that ZeRO has something to partition
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
RANKS := $(if $(filter-out 0,$(GPUS)),$(GPUS),2)

# processes that share the test files; each may start two ranks of its own
WORKERS ?= 2

.PHONY: quickstart test test-fast test-slurm faults mutants install lint clean

install: $(VENV)/installed

$(VENV)/installed: requirements.lock pyproject.toml
	@echo "== installing the locked packages into $(VENV) (once; minutes on a slow network)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@# torch's CUDA build brings the triton it was built for; its CPU build brings none, and the tests interpret kernels
	$(BIN)/python -c "import triton" 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check triton==3.9.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

quickstart: install
	@PATH="$(abspath $(BIN)):$$PATH" sh examples/quickstart.sh "$(RUN)" "$(STDLIB)" $(RANKS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --ignore tests/slurm

test-fast: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not processes and not slow" -n $(WORKERS) --dist loadfile

test-slurm: install
	OMP_NUM_THREADS=1 REQUIRE_SLURM=1 $(BIN)/python -m pytest tests/slurm

faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults -n $(WORKERS) --dist loadfile

mutants: install
	$(BIN)/python -m tests.mutants

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
