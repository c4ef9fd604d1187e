#!/usr/bin/env bash
# Checks on one NVIDIA GPU what tests on a CPU cannot, in under ten minutes: tests/gpu/run.sh [CHECK ...]
# Needs this folder and a Python (or $PYTHON) with torch 2.11 or newer built for CUDA, which it leaves as it is; what else
# is lacking, it installs with pip. Prints a table, writes gpu.json, and answers 1 if a check failed.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
torch=$("$python" -c 'import torch; print(torch.__version__)') || {
    echo "$python has no torch; install one built for CUDA (pytorch.org), or name another Python in PYTHON." >&2
    exit 2
}
lacking=$("$python" - <<'END'
import importlib.util
modules = {"accelerate": "accelerate>=1.15", "safetensors": "safetensors>=0.5", "tokenizers": "tokenizers>=0.21",
           "numpy": "numpy>=1.26", "tqdm": "tqdm>=4.66", "ruamel": "ruamel.yaml>=0.18"}
print(*(wanted for module, wanted in modules.items() if importlib.util.find_spec(module) is None))
END
)
if [ -n "$lacking" ]; then
    read -ra packages <<<"$lacking"
    "$python" -m pip install --constraint <(echo "torch==$torch") "${packages[@]}" || {
        echo "$python lacks $lacking, and pip could not install it." >&2
        exit 2
    }
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m tests.gpu "$@"
