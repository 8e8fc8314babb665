# Every target sets itself up: the first makes .venv and installs the versions of constraints.txt into it.
# On Linux PyPI's torch brings CUDA along; for the smaller CPU build, first
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed
LINT := fxstream passes tools tests

.PHONY: venv browser test test-isa fuzz fuzz-programs threads lint format demo bench bench-large bench-exact bench-compile
.PHONY: bench-check bench-gpu bench-rehash bench-offload
.PHONY: table table-compile table-pipeline table-offload table-quantized comparison pictures docs clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[plot,test,dev,docs]' --constraint constraints.txt
	touch $@

# A Chromium for the test of the page that `fxstream inspect --html` writes: the system's packages, as root or by sudo,
# else playwright's own download. Without one that test is skipped, and says so.
browser: venv
	@$(BIN)/python -m fxstream.tools.browser || \
	if command -v apt-get > /dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; \
	elif command -v apt-get > /dev/null && sudo -n true 2> /dev/null; then \
	  sudo apt-get update -qq && sudo apt-get install -qq -y --no-install-recommends chromium; \
	else \
	  $(BIN)/playwright install chromium --only-shell; \
	fi
	@$(BIN)/python -m fxstream.tools.browser

test: venv
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# A slice of the tests with the kernels of lesser machines than this one: what is measured there is planned for there.
test-isa: venv
	for isa in $$($(BIN)/python -m fxstream.tools.isa); do \
	  ONEDNN_MAX_CPU_ISA=$${isa%,*} ATEN_CPU_CAPABILITY=$${isa#*,} $(BIN)/python -m pytest --numprocesses 2 \
	    tests/passes/machine tests/passes/rewriting/test_slicing.py || exit 1; \
	done

# The property tests, on examples that no run has seen.
fuzz: venv
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --hypothesis-profile fuzz -m hypothesis

# Random programs against their models. SEED=123 COUNT=1 for one of them again.
fuzz-programs: venv
	$(BIN)/python -m fxstream.tools.fuzz --count $(or $(COUNT),2000) --seed $(or $(SEED),0)

# Streamed modules in several threads at once.
threads: venv
	$(BIN)/python -m fxstream.tools.threads --rounds $(or $(ROUNDS),100)

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

# The decode of a video that needs more memory than there is; many minutes.
bench-large: venv
	$(BIN)/python -m fxstream.tools.bench_large

# Decoders at size, against the eager model and against float64; some minutes.
bench-exact: venv
	$(BIN)/python -m fxstream.tools.bench_exact

bench-compile: venv
	$(BIN)/python -m fxstream.tools.bench_compile

# A transformer of 14 billion parameters from its file, in 4 GiB. Needs 30 GB of disk, and many minutes.
bench-offload: venv
	$(BIN)/python -m fxstream.tools.bench_offload

# On a CUDA card: eight minutes, and records in bench-gpu.json. DRY=--dry for tiny models on the CPU.
bench-gpu: venv
	$(BIN)/python -m fxstream.tools.bench_gpu $(DRY)

# What it costs at each call to see that the model is as it was.
bench-check: venv
	$(BIN)/python -m fxstream.tools.bench_check

# SEEDS=4 for a quick look.
bench-rehash: venv
	$(BIN)/python -m fxstream.tools.bench_rehash --seeds $(or $(SEEDS),16) --plots docs/step-rehash

table: venv
	$(BIN)/python -m fxstream.tools.table

# Each small model of the catalogue through Inductor, in each way. MODELS="sd-vae svd-vae" for some alone.
table-compile: venv
	$(BIN)/python -m fxstream.tools.compile_table $(MODELS)

# PIPELINES="svd svd-xt animatediff" for others than svd.
table-pipeline: venv
	$(BIN)/python -m fxstream.tools.pipeline_table $(PIPELINES)

# Budgets below the weights. MODELS="svd-unet svd" for some of them.
table-offload: venv
	$(BIN)/python -m fxstream.tools.offload_table $(MODELS)

# Models with quantized weights, by each of the libraries; some minutes.
table-quantized: venv
	$(BIN)/python -m fxstream.tools.quantized

# The manual's pictures, of the plan as it is made now.
pictures: browser
	$(BIN)/python -m fxstream.tools.pictures

# The rows of docs/comparison.md.
comparison: venv
	$(BIN)/python -m fxstream.tools.comparison

# The manual, into build/docs; a warning is an error.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
