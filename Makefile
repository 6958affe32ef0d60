# make run       set up .venv and run the two scripts: results in results/
# make pipeline  the smallest and the fastest network within a point
# make test      the test suite; make test-all adds full-size and repeated runs
# make lint      ruff
# make bench     compare with other runtimes and tools (installs them into .venv);
#                after make pipeline, whose answers it takes
# make clean     remove what make and the tests put here; results/ stays
#
# PYTHON chooses the interpreter, ARGS adds flags: make run ARGS='--test-images all'

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

.PHONY: run pipeline test test-all lint bench clean
.DELETE_ON_ERROR:

run: $(VENV)/.runtime
	$(BIN)/python quantization/quantization.py $(ARGS)
	$(BIN)/python pruning/pruning.py $(ARGS)

pipeline: $(VENV)/.runtime
	$(BIN)/python pipeline/pipeline.py $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -m ''

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/int8_runtimes.py $(ARGS)
	$(BIN)/python benchmarks/compression_peers.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamps are touched last: an interrupted installation is taken up again.
$(VENV)/.runtime: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.bench: requirements-bench.txt $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps nncodec torch-pruning
	touch $@
