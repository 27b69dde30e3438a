# Shared by examples/quickstart.sh and tests/run.sh: a venv, pip, and a fast BLAS for MLX on Linux.

make_venv() {
  local python="${PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "Python 3.11 or newer is needed; set PYTHON to one" >&2
    exit 1
  fi
  [ -x "$1/bin/python" ] || "$python" -m venv "$1"
}

pip_install() {
  local venv="$1"
  shift
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# MLX's Linux wheel is linked to the reference BLAS; mlx-blockskip opens OpenBLAS where it is installed.
fast_blas() {
  [ "$(uname -s)" = Linux ] || return 0
  if python3 -c 'import ctypes; ctypes.CDLL("libopenblas.so.0")' 2>/dev/null; then return 0; fi
  if command -v apt-get >/dev/null; then
    local sudo=""
    [ "$(id -u)" = 0 ] || sudo="sudo -n"
    ($sudo apt-get update -qq && $sudo apt-get install -y -qq libopenblas0-pthread) >/dev/null 2>&1 || true
  fi
  if ! python3 -c 'import ctypes; ctypes.CDLL("libopenblas.so.0")' 2>/dev/null; then
    echo "note: libopenblas.so.0 is not installed and could not be; MLX's products will be about 50 times slower here"
  fi
}
