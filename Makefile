# Every target sets itself up: the first makes .venv and installs the versions of constraints.txt into it.
# On Linux PyPI's torch brings CUDA along; for the smaller CPU build, first
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed
LINT := fxstream passes tools tests

.PHONY: venv test fuzz lint format demo bench bench-rehash table clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]' --constraint constraints.txt
	touch $@

test: venv
	$(BIN)/python -m pytest --numprocesses 2

# The property tests, on examples that no run has seen.
fuzz: venv
	$(BIN)/python -m pytest --numprocesses 2 --hypothesis-profile fuzz -m hypothesis

# mypy sees the packages as they install: build/mypy/fxstream links to the files of fxstream/, and to passes/ and tools/.
lint: venv
	$(BIN)/ruff check $(LINT)
	$(BIN)/ruff format --check $(LINT)
	rm -rf build/mypy && mkdir -p build/mypy/fxstream
	ln -s $(addprefix $(CURDIR)/,$(wildcard fxstream/*) passes tools) build/mypy/fxstream/
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix $(LINT)
	$(BIN)/ruff format $(LINT)

demo: venv
	$(BIN)/python -m fxstream.tools.demo

bench: venv
	$(BIN)/python -m fxstream.tools.bench

# SEEDS=4 for a quick look.
bench-rehash: venv
	$(BIN)/python -m fxstream.tools.bench_rehash --seeds $(or $(SEEDS),16) --plots docs/step-rehash

table: venv
	$(BIN)/python -m fxstream.tools.table

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
