#!/bin/sh
# Runs the suite of the CPU kernels as processors of arm64 would, in JAX, under qemu: all of it, or a
# few tests of every kind (`short`). What runs is the wheel that wheel.sh built.
set -eu
cd "$(dirname "$0")/../.."
form=${1:-full}
sh tools/arm64/sysroot.sh
folder=$PWD/build/arm64
rm -rf "$folder/package"
mkdir -p "$folder/package"
tag=$(.venv/bin/python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
.venv/bin/python -m zipfile -e dist/jax_gluon-*-"$tag"-manylinux_*_aarch64.whl "$folder/package"
# The wheel comes before the checkout, whose package has no plugin for arm64, in processes that tests
# start as well.
export PYTHONPATH="$folder/package:$folder/site:$PWD" PYTHONSAFEPATH=1
export PYTHONDONTWRITEBYTECODE=1 JAX_PLATFORMS=cpu
export OPENBLAS_NUM_THREADS=1

# Each model of a processor gets the best variant that it has, and is refused what it lacks.
checks=""
for pair in cortex-a72:neon neoverse-n1:neon_dotprod max:neon_i8mm_bf16; do
  ARM64_CPU=${pair%:*} "$folder/python" tools/arm64/check_choice.py "${pair#*:}" &
  checks="$checks $!"
done
for check in $checks; do wait "$check"; done

run() {
  "$folder/python" -m pytest -q -o pythonpath= -p no:cacheprovider "$@"
}
if [ "$form" = short ]; then
  run @tools/arm64/short_1.txt &
  first=$!
  failed=0
  run @tools/arm64/short_2.txt || failed=1
  wait "$first" || failed=1
  [ "$failed" = 0 ]
else
  # Those that read or compile sources are the host's; pytest's processes are started by name.
  run tests/cpu tests/ffi --ignore tests/cpu/test_simd.py --ignore tests/cpu/test_signatures.py \
    -d --dist worksteal --tx "2*popen//python=$folder/python"
  "$folder/python" tests/package/smoke.py
fi
