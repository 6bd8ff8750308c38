#!/bin/sh
# Prints the Python that the virtual environment is made with: $PYTHON, or the first suitable one on
# PATH. Names everything that is missing, with Debian's packages, and fails, before anything is built.
set -u

missing=""
packages=""
lacks() { # what, Debian packages
  missing="${missing}  - $1
"
  packages="$packages $2"
}

suitable() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

python=""
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
  if suitable "$candidate"; then
    python=$candidate
    break
  fi
done

if [ -z "$python" ]; then
  found=$("${PYTHON:-python3}" --version 2>&1) || found="none"
  lacks "Python 3.11 or later (found: $found); PYTHON=path chooses one" \
    "python3 python3-venv python3-dev"
else
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
    lacks "the venv and ensurepip modules of $python ($version)" "python$version-venv"
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  [ -f "$header" ] || lacks "the headers of $python ($version): $header" "python$version-dev"
fi
command -v "${CXX:-g++}" >/dev/null 2>&1 || lacks "a C++17 compiler (${CXX:-g++})" "g++"

if [ -n "$missing" ]; then
  printf 'jax-gluon cannot be set up here. Missing:\n%s' "$missing" >&2
  printf 'On Debian or Ubuntu: apt-get install%s\n' "$packages" >&2
  exit 1
fi
command -v "$python"
