#!/usr/bin/env bash
# Install into a venv, teach the bundled model a subject, and write a comparison grid. May be run again and again.
# VENV and OUT choose other places; PYTHON another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup.sh

VENV="${VENV:-.venv}"
OUT="${OUT:-out/quickstart}"
start=$(date +%s)
make_venv "$VENV"
fast_blas
pip_install "$VENV" --upgrade pip setuptools
rm -rf build
pip_install "$VENV" .
rm -rf build ./*.egg-info
installed=$(date +%s)

rm -rf "$OUT"
mkdir -p "$OUT"
subject="$("$VENV/bin/python" -P -c 'import mlx_blockskip; print(mlx_blockskip.__path__[0])')/assets/subjects/hedgehog"
"$VENV/bin/python" -P examples/quickstart.py "$OUT" "$subject"
echo "install: $((installed - start)) s, run: $(($(date +%s) - installed)) s"
