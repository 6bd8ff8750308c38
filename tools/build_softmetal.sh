#!/bin/sh
# Builds the software Metal device, and Metal's host code against it: build_softmetal.sh FOLDER CLANG
# Quiet unless it fails. Processes that build at the same time wait for each other.
set -eu
cd "$(dirname "$0")/.."
folder=$1 clang=$2
mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9
if ! { cmake -S plugin/metal -B "$folder" -DCMAKE_CXX_COMPILER="$clang" -DSOFTMETAL_WERROR=ON &&
       cmake --build "$folder" -j 2; } >"$folder/log" 2>&1; then
  cat "$folder/log" >&2
  exit 1
fi
