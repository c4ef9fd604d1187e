# Sourced by the scripts that need a GPU, in the repository's root. Sets $python to a Python with torch, which is left
# unchanged, and installs missing packages by pip.
python=${PYTHON:-python3}
torch=$("$python" -c 'import torch; print(torch.__version__)') || {
    echo "$python has no torch; install one built for CUDA (pytorch.org), or name another Python in PYTHON." >&2
    exit 2
}
missing=$("$python" - <<'END'
import importlib.util
modules = {"accelerate": "accelerate>=1.15", "safetensors": "safetensors>=0.5", "tokenizers": "tokenizers>=0.21",
           "numpy": "numpy>=1.26", "tqdm": "tqdm>=4.66", "yaml": "pyyaml>=6.0"}
print(*(wanted for module, wanted in modules.items() if importlib.util.find_spec(module) is None))
END
)
if [ -n "$missing" ]; then
    read -ra packages <<<"$missing"
    "$python" -m pip install --constraint <(echo "torch==$torch") "${packages[@]}" || {
        echo "$python lacks $missing, and pip could not install it." >&2
        exit 2
    }
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
