# Everything a newcomer needs: `make demo` and `make test`. Both set up what they need first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test test-all check format bench faults clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or 3.12, or give PYTHON=..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,s3,dev]"
	touch $@

# The main job, on real images that come in packages: about ten minutes on two cores.
demo: setup
	$(BIN)/ldm run quickstart

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: setup
	$(BIN)/python -m pytest -m "not gpu"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Each benchmark measures this project beside a named peer, in one run. benchmarks/gpu.py is for a GPU.
bench: setup
	for benchmark in benchmarks/acquire.py benchmarks/model.py; do $(BIN)/python $$benchmark --quick || exit 1; done

# Kill the demo in every stage and compare what comes out with an undisturbed run: about twenty minutes.
faults: setup
	$(BIN)/python -m pytest -m slow tests/faults

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
