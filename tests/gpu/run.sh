#!/usr/bin/env bash
# Checks on one NVIDIA GPU what tests on a CPU cannot, in under ten minutes: tests/gpu/run.sh [CHECK ...]
# Needs this folder and a Python (or $PYTHON) with torch 2.11 or newer built for CUDA, which it leaves as it is; what else
# is lacking, it installs with pip. Prints a table, writes gpu.json, and answers 1 if a check failed.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/gpu/python.sh
exec "$python" -m tests.gpu "$@"
