#!/usr/bin/env bash
# Measures the speed of training on one GPU, in under ten minutes: tests/benchmarks/gpu.sh [--help]
# Needs what tests/gpu/run.sh needs. Prints a table of tokens per second, model FLOPs utilisation, and the share of a step
# outside the model; writes gpu_speed.json. --device cpu tries it out at a tiny size.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/gpu/python.sh
exec "$python" -m tests.benchmarks.gpu "$@"
