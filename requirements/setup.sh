#!/usr/bin/env bash
# Build .venv once from requirements/<kind>.lock; a second call does nothing, an interrupted or outdated set-up is mended by the next call.
# usage: requirements/setup.sh [cpu|gpu]     (called by every target of the Makefile; PYTHON names the interpreter, default python3.11)
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-cpu}
lock=requirements/$kind.lock
venv=.venv
want=$(cat "$lock" pyproject.toml | sha256sum | cut -d' ' -f1)

exec 9> .venv.lock
flock 9 # `make demo` and `make test` may be started side by side

if [ "$(cat $venv/.ready 2>/dev/null)" = "$want" ] && $venv/bin/python -c '' 2>/dev/null; then exit 0; fi

python=${PYTHON:-}
for candidate in ${python:+"$python"} python3.11 python3; do
  if "$candidate" -c 'import sys; raise SystemExit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then python=$candidate; break; fi
  python=
done
[ -n "$python" ] || { echo "set-up: no Python 3.11 found; install it or name it: make demo PYTHON=/path/to/python3.11" >&2; exit 1; }

start=$(date +%s)
if [ -e $venv/.installing ] || ! $venv/bin/python -c 'import pip' 2>/dev/null; then rm -rf $venv; fi
[ -d $venv ] || "$python" -m venv $venv
touch $venv/.installing
rm -f $venv/.ready
echo "set-up: installing $(grep -c == "$lock") pinned packages into $venv (about a minute, 3.5 GB)"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! $venv/bin/python -m pip install --quiet --no-deps --disable-pip-version-check -r "$lock" > "$log" 2>&1; then
  if grep -q 'No matching distribution found for torch==' "$log"; then
    echo "set-up: your package index has no CPU build of torch; set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index (see pytorch.org, Get Started) and repeat" >&2
  else
    grep -v '^WARNING: Location' "$log" >&2
  fi
  exit 1
fi
# What an older lock installed and this one leaves out must go: a CUDA-built torchvision breaks every transformers model import.
for package in torchvision torchaudio torchcodec; do
  if [ "$kind" = cpu ] && [ -d $venv/lib/python3.11/site-packages/$package ]; then
    $venv/bin/python -m pip uninstall --quiet --yes $package
  fi
done
$venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --disable-pip-version-check -e .
DS_ACCELERATOR=cpu $venv/bin/python - <<'PY'
import deepspeed, ray, torch, transformers, vllm  # one import of each proves the set before anything relies on it
PY
rm -f $venv/.installing
echo "$want" > $venv/.ready
echo "set-up: done in $(( $(date +%s) - start )) s"
