#!/usr/bin/env bash
# Makes the virtual environment. Without a GPU it takes the CPU build of torch wherever one is to be had, so that no CUDA is pulled.
set -euo pipefail

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=2.13.0

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Pilotfish needs Python 3.11 or newer; $PYTHON is $("$PYTHON" -V 2>&1). Run: make PYTHON=python3.11 …" >&2
    exit 1
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/pip" install --quiet --upgrade "pip>=26"
if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null; then
        "$VENV/bin/pip" install --quiet "torch==$TORCH"
    elif ! "$VENV/bin/pip" install --quiet "torch==$TORCH+cpu" 2>/dev/null; then
        echo "No CPU build of torch $TORCH on your package index: taking the default build, which may bring CUDA." >&2
        echo "To avoid that, point pip at PyTorch's CPU index (PIP_EXTRA_INDEX_URL) and run this again." >&2
        "$VENV/bin/pip" install --quiet "torch==$TORCH"
    fi
fi
"$VENV/bin/pip" install --quiet --editable ".[evaluate,train,serve,postgresql,otel]" --group dev
