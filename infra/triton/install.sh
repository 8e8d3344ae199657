#!/usr/bin/env bash
# Makes .cocoon-triton (once; some seconds, 450 MB): a Triton Inference Server with its Python backend,
# from the hashed lock beside this file. Its own environment, because it needs an older numpy than
# the agent. Says in a sentence why it cannot, and then leaves nothing behind.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
root="$(cd "$here/../.." && pwd -P)"
venv="$root/.cocoon-triton"
lock="$here/requirements.lock"
refuse() { printf '%s\n' "$*" >&2; rm -rf "$venv"; exit 1; }

wanted() { { cat "$lock" "${BASH_SOURCE[0]}"; printf '%s' "$root"; } | sha256sum | cut -d' ' -f1; }
made() { [ "$(cat "$venv/.made-from" 2>/dev/null)" = "$(wanted)" ]; }
made && exit 0

system="$(uname -s) $(uname -m)"
[ "$system" = "Linux x86_64" ] || refuse "Triton is packaged for Linux on x86-64 only, and this is $system"
for python in "$root/.venv/bin/python" python3.11 python3.12 none; do
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && break
done
[ "$python" != none ] || refuse "Triton's Python backend needs Python 3.11 or 3.12; install one of them"
[ -x "$root/.venv/bin/uv" ] || refuse "the environment is missing; run ./cocoon version once"

exec 9>"$root/.cocoon-triton.lock"
if command -v flock >/dev/null; then flock 9; fi
made && exit 0
printf 'installing a Triton server into .cocoon-triton (once, 450 MB)\n'
rm -rf "$venv"
"$python" -m venv --without-pip "$venv" || refuse "Python could not make a virtual environment (Debian: apt install python3-venv)"
VIRTUAL_ENV="$venv" "$root/.venv/bin/uv" pip sync -q --require-hashes "$lock" ||
  refuse "Triton's packages could not be installed; look at the lines above, the connection to your package index and the free disk space"

# The server looks for a backend's library and its Python's stub in one folder.
version="$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
triton="$venv/lib/python$version/site-packages/pytriton/tritonserver"
mkdir -p "$venv/backends"
cp -r "$triton/backends/python" "$venv/backends/python"
cp "$triton/python_backend_stubs/$version/triton_python_backend_stub" "$venv/backends/python/"
libraries="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))'):$venv/lib/python$version/site-packages/nvidia_pytriton.libs"
missing="$(LD_LIBRARY_PATH="$libraries" ldd "$triton/bin/tritonserver" "$venv/backends/python/"*stub | awk '/not found/ {print $1}' | sort -u | tr '\n' ' ')"
[ -z "$missing" ] || refuse "this system lacks what Triton loads: $missing(Debian: apt install libpython$version, glibc 2.35 or newer)"
printf '%s\n%s\n' "$triton/bin/tritonserver" "$libraries" >"$venv/server"
wanted >"$venv/.made-from"
