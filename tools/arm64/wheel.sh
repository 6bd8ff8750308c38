#!/bin/sh
# Builds the wheel for Linux on arm64 into dist/, with the cross compiler, and has auditwheel name the
# oldest systems that it runs on. Needs .venv with the package's build requirements.
set -eu
cd "$(dirname "$0")/../.."
sh tools/install_packages.sh arm64
venv=$PWD/.venv headers=$PWD/.venv/ffi-headers
tag=$("$venv/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
"$venv/bin/python" -m pip install --quiet "auditwheel==6.8.2" wheel

# The tag of the wheel, its file's suffix and CMake's compiler follow from these.
export _PYTHON_HOST_PLATFORM=linux-aarch64
export SETUPTOOLS_EXT_SUFFIX=.cpython-${tag#cp}-aarch64-linux-gnu.so
export CMAKE_TOOLCHAIN_FILE=$PWD/tools/arm64/toolchain.cmake
export PATH="$venv/bin:$PATH"
# Linked anew, with the toolchain's flags: CMake reads them once.
build=build/$tag-$tag-linux_aarch64
rm -rf build/arm64/wheel "$build/CMakeCache.txt" "$build/_plugin."*
mkdir -p build/arm64
aarch64-linux-gnu-gcc -O2 -fPIC -Wall -Wextra -Werror -c tools/arm64/old_glibc.c \
  -o build/arm64/old_glibc.o
rm -f "dist/jax_gluon-"*"-$tag-$tag-"*aarch64.whl
python -m pip wheel --quiet --no-deps --no-build-isolation -w build/arm64/wheel \
  --config-settings=cmake.define.JAX_GLUON_FFI_INCLUDE_DIR="$headers/jaxlib/include" \
  --config-settings=cmake.define.JAX_GLUON_WERROR=ON \
  --config-settings=cmake.define.PYTHON_MODULE_EXTENSION="$SETUPTOOLS_EXT_SUFFIX" .
python -m tools.arm64.gate build/arm64/wheel/*.whl dist
