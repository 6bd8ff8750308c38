#!/bin/sh
# Builds the programs of CMakeLists.txt: build.sh address|thread|none HEADERS [CLANG], into
# build/handlers/SANITIZER. Quiet unless it fails.
set -eu
cd "$(dirname "$0")/../.."
folder=build/handlers/$1
mkdir -p "$folder"
if ! { cmake -S tests/handlers -B "$folder" -DSANITIZER="$1" -DCMAKE_CXX_COMPILER="${3:-clang++-19}" \
         -DJAX_GLUON_FFI_INCLUDE_DIR="$2" && cmake --build "$folder" -j 2; } >"$folder/log" 2>&1; then
  cat "$folder/log" >&2
  exit 1
fi
