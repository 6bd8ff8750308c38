#!/bin/sh
# Builds the wheel for macOS on arm64 into dist/ and checks it. What it makes on the way stays under
# build/macos and .venvs. PYTHON chooses the version of Python that the wheel is for.
set -eu
cd "$(dirname "$0")/../.."
sh tools/install_packages.sh macos

# .venv holds all that is needed, once the package is installed in it; else an environment of its own.
if [ -z "${PYTHON:-}" ] && [ -f .venv/stamps/package ]; then
  venv=$PWD/.venv headers=$PWD/.venv/ffi-headers
else
  python=$(sh tools/find_python.sh)
  name=macos-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  venv=$PWD/.venvs/$name headers=$PWD/.venvs/$name/ffi-headers
  if ! cat pyproject.toml tools/macos/requirements.txt | cmp -s - "$venv/requirements"; then
    "$python" -m venv "$venv"
    "$venv/bin/python" tools/install_build_requirements.py "$headers"
    "$venv/bin/python" -m pip install --quiet -r tools/macos/requirements.txt
    cat pyproject.toml tools/macos/requirements.txt >"$venv/requirements"
  fi
fi
python=$venv/bin/python
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
platform=macosx-13.0-arm64
wheel_tag=$tag-$tag-$(echo $platform | tr .- __)

"$python" -m tools.macos.downloads build/macos/downloads
"$python" -m tools.macos.sdk build/macos/downloads build/macos/sdk

# Linked anew: CMake does not know the SDK's lists of symbols.
rm -f "build/$wheel_tag/_plugin."* "dist/jax_gluon-"*"-$wheel_tag.whl"

# The tag of the wheel, its file's suffix and CMake's compiler follow from these.
export MACOSX_DEPLOYMENT_TARGET=13.0
export _PYTHON_HOST_PLATFORM=$platform
export ARCHFLAGS="-arch arm64"
export SETUPTOOLS_EXT_SUFFIX=.cpython-${tag#cp}-darwin.so
export CMAKE_TOOLCHAIN_FILE=$PWD/tools/macos/toolchain.cmake
export PATH="$venv/bin:$PATH"
"$python" -m pip wheel --quiet --no-deps --no-build-isolation -w dist \
  --config-settings=cmake.define.JAX_GLUON_FFI_INCLUDE_DIR="$headers/jaxlib/include" \
  --config-settings=cmake.define.JAX_GLUON_WERROR=ON \
  --config-settings=cmake.define.PYTHON_MODULE_EXTENSION="$SETUPTOOLS_EXT_SUFFIX" .
"$python" -m tools.macos.gate "dist/jax_gluon-"*"-$wheel_tag.whl"
