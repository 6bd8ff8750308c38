# `make demo` and `make test` need Python >= 3.11 (headers, venv), a C++ compiler and make; everything
# else is installed into .venv by the rules below.
#   PYTHON=path     the Python that .venv is made with (PYTHON= is read when .venv does not exist yet)
#   CMAKE_ARGS=...  passed to CMake, for example -DJAX_GLUON_WERROR=ON
#   ARGS=...        passed to the program of demo, demo-images, bench, study, smoke and to pytest
#   SOFTMETAL=off   `make test` without the software Metal device: installs no compiler, skips its tests

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
HEADERS := $(VENV)/ffi-headers
# Every C++, Objective-C++ and Metal file. The plugin for a Mac also holds Metal's host code and the
# shaders, which `make metal` builds elsewhere.
SOURCES := $(shell find plugin shaders softmetal tests tools \
  -name "*.cc" -o -name "*.h" -o -name "*.mm" -o -name "*.metal")
PLUGIN_SOURCES := $(filter plugin/%.cc plugin/%.h,$(SOURCES))
ifeq ($(shell uname),Darwin)
PLUGIN_SOURCES += $(filter plugin/%.mm shaders/%,$(SOURCES))
endif
PYTHON_PATHS := $(wildcard jax_gluon tests demo benchmarks tools plugin/metal softmetal/python)
# Development on Linux: Metal's host code against the software device (softmetal).
METAL_BUILD := build/metal
SOFTMETAL_CLANG ?= clang++-19
# Programs that call the handlers without JAX.
HANDLERS := build/handlers
HANDLER_SOURCES := $(filter plugin/%.cc plugin/%.h tests/handlers/%,$(SOURCES)) tests/handlers/CMakeLists.txt
FUZZ_OPTIONS := -max_len=200 -len_control=0 -timeout=60
export ASAN_OPTIONS ?= detect_leaks=0
PIP_BUILD := $(BIN)/python -m pip install --quiet --no-build-isolation \
  --config-settings=cmake.define.JAX_GLUON_FFI_INCLUDE_DIR="$(CURDIR)/$(HEADERS)/jaxlib/include" \
  --config-settings=cmake.define.JAX_GLUON_EMULATED_AVX512=ON \
  --config-settings=cmake.define.JAX_GLUON_METAL_LIBRARY="$(CURDIR)/$(METAL_BUILD)/libjax_gluon_metal.so"

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifdef CMAKE_ARGS
export CMAKE_ARGS
endif
ifeq ($(SOFTMETAL),off)
export SOFTMETAL_CLANG := none
endif

.PHONY: help demo demo-images test load fuzz fuzz-handlers sanitize-handlers exhaustive study mutate \
  test-arm64 test-cuda-compile test-frameworks sanitize metal wheel-macos wheel-linux-arm64 \
  sdist-check bench smoke lint format format-cxx typecheck tidy docs clean
help:
	@echo 'make demo       train a small language model with float and INT8 attention'
	@echo 'make demo-images  train an image model on digits, and sample it in float32, INT8 and INT4'
	@echo 'make test       run the test suite'
	@echo 'make load       many calls: threads, memory, processes, signals, a device that fails'
	@echo 'make fuzz       random problems against the float64 oracle, for SECONDS=60'
	@echo 'make fuzz-handlers  random custom calls under sanitizers, RUNS=1000000 of them'
	@echo 'make exhaustive  every float through exp2 of each instruction set'
	@echo 'make sanitize   run the Metal kernels under the sanitizers of clang'
	@echo 'make sanitize-handlers  run the CPU kernels under them'
	@echo 'make metal      build the software Metal device, for implementation="metal" on Linux'
	@echo 'make wheel-macos  build the wheel for Macs, on Linux, and check it'
	@echo 'make wheel-linux-arm64  cross-build the wheel for Linux on arm64, and check it'
	@echo 'make mutate     plant faults one at a time: which of them do the tests catch?'
	@echo 'make test-arm64  run the suite of the CPU kernels on it, under qemu (ARGS=short: a few tests)'
	@echo 'make test-cuda-compile  compile for several NVIDIA GPUs, without any'
	@echo 'make test-frameworks  run published models with patched attention'
	@echo 'make bench      time attention against its peers'
	@echo 'make study      train in float32, bfloat16, INT8 and INT4, for hours; goes on where it was'
	@echo 'make smoke      load the built package under several releases of JAX'
	@echo 'make lint       ruff, clang-format, workflows    make format   apply them'
	@echo 'make typecheck  pyright                     make tidy     clang-tidy'
	@echo 'make sdist-check  build the sdist, and install it in fresh Pythons'
	@echo 'make docs       build the documentation     make clean    remove builds and environments'

demo: $(STAMPS)/package
	$(BIN)/python -m demo $(ARGS)

demo-images: $(STAMPS)/package
	$(BIN)/python -m demo.images $(ARGS)

test: $(STAMPS)/package metal
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

# Races and stray accesses of Metal's kernels.
sanitize: $(STAMPS)/package metal
	$(BIN)/python -m pytest -m sanitizers -n logical --maxprocesses 4 --dist worksteal $(ARGS)

# The same of the CPU's, called through their handlers: by libFuzzer, by 16 threads at once, and without
# memory.
sanitize-handlers: $(HANDLERS)/address/fuzzer $(HANDLERS)/thread/threads
	$(HANDLERS)/address/fuzzer -runs=20000 $(FUZZ_OPTIONS)
	$(HANDLERS)/address/faults 200
	$(HANDLERS)/thread/threads 100

# What it finds stands in build/handlers/found; what it learned, in build/handlers/corpus.
fuzz-handlers: $(HANDLERS)/address/fuzzer
	mkdir -p $(HANDLERS)/corpus $(HANDLERS)/found
	$(HANDLERS)/address/fuzzer -runs=$(or $(RUNS),1000000) -print_final_stats=1 \
	  -artifact_prefix=$(HANDLERS)/found/ $(FUZZ_OPTIONS) $(HANDLERS)/corpus

$(HANDLERS)/address/fuzzer: $(HANDLER_SOURCES) $(STAMPS)/build-requirements
	sh tools/install_packages.sh softmetal
	sh tests/handlers/build.sh address "$(CURDIR)/$(HEADERS)/jaxlib/include" $(SOFTMETAL_CLANG)

$(HANDLERS)/thread/threads: $(HANDLER_SOURCES) $(STAMPS)/build-requirements
	sh tools/install_packages.sh softmetal
	sh tests/handlers/build.sh thread "$(CURDIR)/$(HEADERS)/jaxlib/include" $(SOFTMETAL_CLANG)

exhaustive: $(STAMPS)/package
	$(BIN)/python -m pytest -s -m exhaustive tests/cpu/test_simd.py $(ARGS)

# The software Metal device, where its compiler is there or may be installed; else it says so.
metal: $(STAMPS)/build-requirements
ifneq ($(SOFTMETAL),off)
	@if [ "$$(uname)" != Linux ]; then exit 0; fi; \
	if SOFTMETAL_CLANG=$(SOFTMETAL_CLANG) sh tools/install_packages.sh softmetal; then \
	  sh tools/build_softmetal.sh $(METAL_BUILD) $(SOFTMETAL_CLANG); \
	else echo "tests of the software Metal device are skipped (SOFTMETAL=off installs nothing)"; fi
endif

# In .venv where it holds the package; with PYTHON=path, for that Python, in an environment of its own.
wheel-macos: $(if $(PYTHON),,$(wildcard $(STAMPS)/package))
	@PYTHON='$(PYTHON)' sh tools/macos/wheel.sh

# The gate names the wheel after the systems that it runs on.
wheel-linux-arm64: $(STAMPS)/arm64
$(STAMPS)/arm64: $(STAMPS)/package $(PLUGIN_SOURCES) CMakeLists.txt $(wildcard tools/arm64/*)
	sh tools/arm64/wheel.sh
	touch $@

test-arm64: $(STAMPS)/arm64
	sh tools/arm64/test.sh $(ARGS)

fuzz: $(STAMPS)/package
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60) $(ARGS)

# Each part in a process of its own; ARGS="--only memory", "--seconds 600".
load: $(STAMPS)/package metal
	$(BIN)/python -m tests.load $(ARGS)

# Compiled for GPUs that are described: nothing of this runs, and none is needed.
test-cuda-compile: .venvs/cuda/stamp
	PYTHONPATH=. .venvs/cuda/bin/python -m pytest --noconftest tests/cuda/test_compile.py $(ARGS)

.venvs/cuda/stamp: $(STAMPS)/venv
	$(BIN)/python -m venv .venvs/cuda
	.venvs/cuda/bin/python -m pip install --quiet pytest jax-cuda13-plugin jax-cuda13-pjrt jax \
	  nvidia-cudnn-cu13 nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-nvcc
	touch $@

# KerasHub itself asks for TensorFlow, which its models do not need.
test-frameworks: $(STAMPS)/frameworks
	$(BIN)/python -m pytest tests/frameworks \
	  "tests/package/test_documentation.py::test_examples_of_a_page_run_in_order" $(ARGS)

$(STAMPS)/frameworks: $(STAMPS)/package
	$(PIP_BUILD) -e '.[frameworks]'
	$(BIN)/python -m pip install --quiet --no-deps keras-hub
	touch $@

# Hours for all; ARGS="--domains python", "--every 10".
mutate: $(STAMPS)/dev metal
	$(BIN)/python -m tests.mutation $(ARGS)

bench: $(STAMPS)/dev
	$(BIN)/python -m benchmarks.attention $(ARGS)

study: $(STAMPS)/dev
	$(BIN)/python -m benchmarks.study $(ARGS)

smoke: $(STAMPS)/package
	$(BIN)/python tools/smoke_matrix.py --headers "$(HEADERS)/jaxlib/include" $(ARGS)

lint: $(STAMPS)/dev
	$(BIN)/ruff check $(PYTHON_PATHS)
	$(BIN)/ruff format --check $(PYTHON_PATHS)
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: format-cxx
	$(BIN)/ruff check --fix-only $(PYTHON_PATHS)
	$(BIN)/ruff format $(PYTHON_PATHS)

format-cxx: $(STAMPS)/dev
	$(BIN)/clang-format -i $(SOURCES)

typecheck: $(STAMPS)/dev
	$(BIN)/pyright

# Objective-C++ is read as the software Metal device compiles it, NEON as the wheel for arm64 does; each
# is left out where its build is not there.
tidy: $(STAMPS)/dev metal
	$(BIN)/python tools/tidy.py $$(ls -d build/cp*$$(uname -m) | head -n 1) \
	  build/cp*linux_aarch64 $(METAL_BUILD)

# PYTHONS="python3.12 python3.13": what it is installed for.
sdist-check: $(STAMPS)/dev
	$(BIN)/python tools/check_sdist.py $(PYTHONS)

docs: $(STAMPS)/dev
	$(PIP_BUILD) -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .venv .venvs

$(STAMPS)/venv:
	@python=$$(PYTHON='$(PYTHON)' CXX='$(CXX)' sh tools/find_python.sh) && \
	  { $(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv $(VENV); }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build-requirements: $(STAMPS)/venv pyproject.toml tools/install_build_requirements.py
	$(BIN)/python tools/install_build_requirements.py $(HEADERS)
	touch $@

# Editable: Python is read from the source tree, the plugin from where CMake installed it.
$(STAMPS)/package: $(STAMPS)/build-requirements pyproject.toml CMakeLists.txt $(PLUGIN_SOURCES) \
  plugin/metal/interface.cmake
	$(PIP_BUILD) -e '.[test,demo]'
	touch $@

$(STAMPS)/dev: $(STAMPS)/package
	$(PIP_BUILD) -e '.[dev]'
	touch $@
