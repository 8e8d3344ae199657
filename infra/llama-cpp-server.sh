#!/usr/bin/env bash
# Builds llama-cpp-python's server into .cocoon-llama (once; about five minutes), for the tests that
# serve a real engine of another kind. Its own environment: it is no dependency of Cocoon.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.cocoon-llama"
[ -e "$venv/.complete" ] && exit 0
rm -rf "$venv"
"$root/.venv/bin/python" -m venv "$venv"
# Without these flags the build takes instructions that some hosts' CPUs lack.
export CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
"$venv/bin/python" -m pip install -q --disable-pip-version-check "llama-cpp-python[server]==0.3.36" "gguf==0.19.0"
touch "$venv/.complete"
