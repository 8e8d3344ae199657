"""A pytest plugin that tries mutants: every test once without one, then a fork for each mutant.

The session is collected once; a fork inherits it and runs only the tests that reach the mutated
function, until one fails or so many seconds of tests have passed: first what noticed the mutants
before it, then the quickest. mutmut would start pytest again for each mutant, which costs ten
times as much as the tests.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import accumulate

import pytest
from _pytest.runner import runtestprotocol
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state
from mutmut.utils.format_utils import mangled_name_from_mutant_name

KILLED, SURVIVED, NO_TESTS = 1, 0, 33  # mutmut's exit codes; a negative one is a signal's
_CPU_S, _WALL_S = 5, 120  # what a mutant's tests may take beside ten times the seconds planned


class Trial:
    """Runs as the session's loop. `report` hears each mutant's exit code at once.

    seconds: how many seconds of tests a mutant meets, as they take without one.
    """

    def __init__(
        self, mutants: Iterable[str], report: Callable[[str, int], None], *, seconds: float
    ) -> None:
        self._mutants = list(mutants)
        self._seconds = seconds
        self._report = report
        self._took_s: dict[str, float] = {}
        self._reach: dict[str, list[pytest.Item]] = defaultdict(list)
        self._noticed: Counter[tuple[str, str]] = Counter()  # (function or module, test)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._without_a_mutant(session)
        set_mutant_under_test("")
        for function, reached in self._reach.items():
            self._reach[function] = self._quickest(reached)
        gc.freeze()
        for number, name in enumerate(self._mutants, start=1):
            function = mangled_name_from_mutant_name(name)
            reached = self._best_first(function)
            code = self._try(name, function, reached) if reached else NO_TESTS
            self._report(name, code)
            if number % 50 == 0:
                os.write(2, f"{number} of {len(self._mutants)} tried\n".encode())
        return True

    def _without_a_mutant(self, session: pytest.Session) -> None:
        """Every test must pass, and shows which functions it reaches."""
        set_mutant_under_test("stats")
        for item in session.items:
            state()._stats.clear()
            began = time.process_time()
            if not _passes(item):
                raise pytest.UsageError(f"{item.nodeid} fails without any mutant; mend it first")
            self._took_s[item.nodeid] = time.process_time() - began
            for function in state()._stats:
                self._reach[function].append(item)

    def _quickest(self, reached: list[pytest.Item]) -> list[pytest.Item]:
        reached = sorted(reached, key=lambda item: self._took_s[item.nodeid])
        ends_s = accumulate(self._took_s[item.nodeid] for item in reached)
        within = [
            item for item, end_s in zip(reached, ends_s, strict=True) if end_s < self._seconds
        ]
        return within or reached[:1]

    def _best_first(self, function: str) -> list[pytest.Item]:
        module = function.rpartition(".")[0]

        def worth(item: pytest.Item) -> tuple[int, int, float]:
            noticed = (self._noticed[where, item.nodeid] for where in (function, module))
            return (*(-count for count in noticed), self._took_s[item.nodeid])  # type: ignore[return-value]

        return sorted(self._reach.get(function, []), key=worth)

    def _try(self, name: str, function: str, reached: list[pytest.Item]) -> int:
        limit_s = _CPU_S + int(10 * self._seconds)
        heard, tell = os.pipe()
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 1))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            set_mutant_under_test(name)
            for number, item in enumerate(reached):
                if not _passes(item):
                    os.write(tell, b"%d" % number)
                    os._exit(KILLED)
            os._exit(SURVIVED)
        os.close(tell)
        done = os.pidfd_open(child)
        if not select.select([done], [], [], _WALL_S + 10 * limit_s)[0]:
            os.kill(child, signal.SIGXCPU)
        os.close(done)
        if noticed := os.read(heard, 16):
            for where in (function, function.rpartition(".")[0]):
                self._noticed[where, reached[int(noticed)].nodeid] += 1
        os.close(heard)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _passes(item: pytest.Item) -> bool:
    # each alone: fixtures wider than a test end with it, as mutants reach them through any test
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))
