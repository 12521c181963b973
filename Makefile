# Everything a newcomer needs: `make demo` and `make test`. Both set up what they need first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Succeeds with a Python that the packages below are made for.
SUITS  := -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'

.PHONY: setup demo test test-all test-gpu check format bench faults clean

setup: $(STAMP)

# An environment of another Python, or one whose Python is gone, is made anew.
ifneq ($(shell $(BIN)/python $(SUITS) 2>/dev/null && echo suits),suits)
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python $(SUITS) 2>/dev/null || { \
		command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or 3.12, or give PYTHON=..."; exit 2; }; \
		$(PYTHON) $(SUITS) || { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1), and 3.11 or 3.12 is needed; install one, or give PYTHON=..."; exit 2; }; \
		$(PYTHON) -m venv --clear $(VENV); }
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

# On a machine with a CUDA device.
test-gpu: setup
	$(BIN)/python -m pytest -m gpu

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
