#!/bin/sh
# Builds the software Metal device for arm64 and runs its examples under qemu, with kernels that were
# compiled ahead of time. Needs, on Debian: clang-19 lld-19 g++-12-aarch64-linux-gnu qemu-user-static
set -eu
cd "$(dirname "$0")/.."
folder=build/softmetal-arm64
target="--target=aarch64-linux-gnu -fuse-ld=lld-19"
make metal
cmake -S softmetal -B "$folder" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=clang++-19 -DCMAKE_CXX_FLAGS="$target" -DCMAKE_OBJCXX_FLAGS="$target"
cmake --build "$folder" -j 2
for name in saxpy matmul; do
  mkdir -p "$folder/$name"
  build/metal/softmetal compile "softmetal/examples/$name.metal" \
    --target aarch64-linux-gnu -o "$folder/$name/default.metallib"
  # shellcheck disable=SC2086
  clang++-19 $target -std=gnu++20 -isystem softmetal/include -fobjc-runtime=macosx-12 \
    -fblocks -fobjc-exceptions -fexceptions -fobjc-arc "softmetal/examples/$name.mm" \
    -x none "$folder/libsoftmetal.so" -Wl,-rpath,"$PWD/$folder" -pthread -o "$folder/$name/$name"
  qemu-aarch64-static -L /usr/aarch64-linux-gnu "$folder/$name/$name"
done
