#!/bin/sh
# A Python of arm64 with JAX, under build/arm64: Debian's packages, unpacked, and PyPI's wheels.
# build/arm64/python runs it, as the model of processor that ARM64_CPU names (qemu's "max").
set -eu
cd "$(dirname "$0")/../.."
folder=$PWD/build/arm64
sysroot=$folder/sysroot
version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
jax=$(.venv/bin/python -c 'import jax; print(jax.__version__)')
mkdir -p "$folder"

# Packages of another architecture, in lists of their own: nothing of this system changes.
if [ ! -x "$sysroot/usr/bin/python$version" ]; then
  apt=$folder/apt
  mkdir -p "$apt/state" "$apt/cache/archives/partial"
  : >"$apt/status"
  get() {
    apt-get -qq -o Dir::State="$apt/state" -o Dir::State::status="$apt/status" \
      -o Dir::Cache="$apt/cache" -o APT::Architecture=arm64 -o APT::Architectures=arm64 \
      -o APT::Sandbox::User=root -o Debug::NoLocking=1 "$@" >/dev/null
  }
  get update
  get -y --no-install-recommends --download-only install "python$version" libstdc++6
  rm -rf "$sysroot" "$sysroot.new"
  for package in "$apt"/cache/archives/*.deb; do dpkg -x "$package" "$sysroot.new"; done
  mv "$sysroot.new" "$sysroot"
  rm -rf "$apt"
fi

# What the tests of the kernels import.
if [ "$(cat "$folder/site/jax.version" 2>/dev/null)" != "$jax" ]; then
  rm -rf "$folder/site"
  platforms=""
  for glibc in 2_17 2_27 2_28 2_31 2_34 2_35; do
    platforms="$platforms --platform manylinux_${glibc}_aarch64"
  done
  # shellcheck disable=SC2086
  .venv/bin/python -m pip install --quiet --target "$folder/site" $platforms \
    --platform manylinux2014_aarch64 --python-version "$version" --only-binary=:all: \
    "jax==$jax" pytest pytest-xdist hypothesis psutil flatbuffers
  echo "$jax" >"$folder/site/jax.version"
fi

cat >"$folder/python" <<EOF
#!/bin/sh
# The name it is called by is what Python starts its children with.
PYTHONHOME=$sysroot/usr exec qemu-aarch64-static -L $sysroot -cpu "\${ARM64_CPU:-max}" \\
  -0 "\$0" $sysroot/usr/bin/python$version "\$@"
EOF
chmod +x "$folder/python"
