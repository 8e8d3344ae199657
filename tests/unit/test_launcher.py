"""`./cocoon` makes its environment once, however many start, and leaves nothing beside it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A Python whose environments hold a Python that says what it runs.
PYTHON = """#!/bin/sh
[ "$1" = -m ] || exit 0
[ "$(ls -A "$3")" = .cocoon-lock ] || echo "not bare: $(ls -A "$3")" >> made
sleep 0.3
mkdir -p "$3/bin"
cat > "$3/bin/python" <<'END'
#!/bin/sh
case "$2" in pip) ;; cocoon.cli) echo "ran $3" ;; *) echo . ;; esac
END
printf '#!/bin/sh\\n' > "$3/bin/uv"
chmod +x "$3/bin/python" "$3/bin/uv"
echo once >> made
"""


def test_two_first_starts_make_one_environment_and_leave_no_lock_beside_it(tmp_path: Path) -> None:
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    for folder in (checkout, programs, checkout / ".venv"):
        folder.mkdir()
    (checkout / ".venv" / "old").touch()
    (programs / "python3.11").write_text(PYTHON)
    (programs / "python3.11").chmod(0o755)
    shutil.copy(ROOT / "cocoon", checkout)
    (checkout / "requirements.lock").touch()
    (checkout / ".venv.lock").touch()  # an earlier version's
    starts = [
        subprocess.Popen(
            [str(checkout / "cocoon"), "version"], cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={"PATH": f"{programs}:/usr/bin:/bin"},
        )
        for _ in range(2)
    ]  # fmt: skip
    ends = [start.communicate(timeout=30) for start in starts]
    assert [out for out, _ in ends] == ["ran version\n"] * 2, ends
    assert (tmp_path / "made").read_text() == "once\n"
    names = sorted(path.name for path in checkout.iterdir())
    assert names == [".venv", "cocoon", "requirements.lock"]
