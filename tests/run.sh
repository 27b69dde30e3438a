#!/usr/bin/env bash
# Make a venv, install the package with its test extras (not editable), run ruff, mypy and pytest.
# May be run again and again. VENV chooses another place for the venv; PYTHON another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup.sh

VENV="${VENV:-.venv-tests}"
make_venv "$VENV"
fast_blas
pip_install "$VENV" --upgrade pip setuptools
# torch first and by itself: the exact version has a build without CUDA
pip_install "$VENV" torch==2.13.0
rm -rf build
pip_install "$VENV" ".[dev,parity]"
pip_install "$VENV" --force-reinstall --no-deps .
rm -rf build ./*.egg-info

bin="$(cd "$VENV" && pwd)/bin"
root="$(pwd)"
"$bin/ruff" check .
"$bin/ruff" format --check .
# from elsewhere, so that the installed package is checked: mypy does not see the mapping of convert/
(cd tests && "$bin/mypy" -p mlx_blockskip --config-file "$root/pyproject.toml")
# of benchmarks what breaks when the package changes: names that are gone, arguments that are not taken
(cd examples/bench && "$bin/mypy" --config-file "$root/pyproject.toml" --no-warn-unused-ignores --follow-imports silent \
  --disable-error-code arg-type --disable-error-code assignment --disable-error-code import-not-found ./*.py)
# two workers, and one thread of BLAS for each: the machines that run this have two cores, and threads that wait spin
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
(cd tests && "$bin/python" -P -m pytest -c "$root/pyproject.toml" --rootdir "$root" -n 2 --dist worksteal \
  "$root/tests" "$@")
