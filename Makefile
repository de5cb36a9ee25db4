# make demo: environment, install, WSFR of a built-in model, what to train instead, its layer timed here.
# make test: environment, install, all tests; with a second version of Triton after make triton36 (190 MB).
# make compiled: what both versions of Triton make of the kernels that have changed, into benchmarks/results for the tests.
# make docs: environment, install, the documentation site in build/site; a warning is an error.
# make gpu: on a machine with a GPU, kernel tests and speed there in four minutes (GPU_ARGS='--only bench'). It makes no
#   environment: PYTHON has torch and triton, msgspec and pytest.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_FLAGS ?=
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS) --constraint constraints.txt

# An editable install links the files that it finds (pyproject.toml says why): a new file needs a new install. A folder's
# time changes when a file in it comes or goes.
FOLDERS := $(shell find powerplan kernels models -type d -not -name __pycache__)

# The second version of Triton that kernels are compiled with, the one that torch 2.11 brings.
TRITON_36 = build/triton-3.6

.PHONY: demo test triton36 compiled lint format docs bench gpu clean

demo: $(VENV)/.installed
	$(BIN)/powerplan wsfr gpt2-small --ctx 1k,8k,64k,1M
	$(BIN)/powerplan recommend gpt2-small --ctx 64k
	$(PIP) --editable '.[torch]'
	$(BIN)/powerplan profile gpt2-small --p 2 --time-limit 45

test: $(VENV)/.installed-dev
	$(if $(wildcard $(TRITON_36)),POWERPLAN_TRITON_36=$(abspath $(TRITON_36))) $(BIN)/pytest -n 2

triton36: $(TRITON_36)

$(TRITON_36): | $(VENV)/bin/python
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $@ triton==3.6.0

# With 3.6 some plain kernels spill, which ends with 1: their blocks are chosen with the other version.
compiled: RESULTS = benchmarks/results/compiled
compiled: $(VENV)/.installed-dev $(TRITON_36)
	$(BIN)/python benchmarks/compiled.py --arch 80 90 --kept $(RESULTS).json --out $(RESULTS).json
	-PYTHONPATH=$(TRITON_36) $(BIN)/python benchmarks/compiled.py --arch 90 --dtype bf16 fp16 \
	  --kept $(RESULTS)-triton-3.6.json --out $(RESULTS)-triton-3.6.json

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/typecheck.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without a notice of what will follow mkdocs-material, which would be printed at each run.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "build/site/index.html"

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/recommend.py

gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

# The links of an editable install are in build/, so the next target installs again.
clean:
	rm -rf $(VENV)/.installed $(VENV)/.installed-dev build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt $(FOLDERS) | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(FOLDERS) | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.installed
