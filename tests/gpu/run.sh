#!/usr/bin/env bash
# Checks on one NVIDIA GPU what tests on a CPU cannot, in under ten minutes: tests/gpu/run.sh [CHECK ...]
# Needs this repository and a Python (or $PYTHON) with torch 2.11 or newer built for CUDA, which is left unchanged; it
# installs missing packages by pip. Prints a table, writes gpu.json, and exits with 1 if a check failed.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/gpu/python.sh
exec "$python" -m tests.gpu "$@"
