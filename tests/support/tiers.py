"""Three tiers of tests: `unit` starts no process, `process` does, `browser` opens Chromium.

A test that has no such marker of its own, or of its module, gets one for the names that it, its
fixtures and the functions of its module use. Should that miss a process, the test fails as it
starts one, and says how to mark it. Tests that take seconds in this process, because they train
whole runs or load another library, are marked `process` too: `unit` is the tier to wait for.
"""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator
from multiprocessing import util as multiprocessing_util
from types import CodeType, FunctionType
from typing import Any

import pytest

TIERS = ("unit", "process", "browser")
BROWSER_NAMES = {"chromium", "webdriver"}
PROCESS_NAMES = {
    "spawn", "run_apart", "forked_commands", "subprocess", "multiprocessing", "fork",
    "run fit", "fit_until_done",
}  # fmt: skip
START_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}


def mark(item: pytest.Function) -> None:
    """Give a test its tier, unless it says so itself."""
    if any(item.get_closest_marker(tier) for tier in TIERS):
        _forgive_the_clock(item)
        return
    functions = [item.function]
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        functions += [definition.func for definition in definitions]
    names = set().union(item.fixturenames, *(_names_in(function) for function in functions))
    tier = "process" if names & PROCESS_NAMES else "unit"
    item.add_marker("browser" if names & BROWSER_NAMES else tier)
    _forgive_the_clock(item)


def _forgive_the_clock(item: pytest.Function) -> None:
    """What waits for other processes is tried once more; the summary names what needed it."""
    if not item.get_closest_marker("unit"):
        item.add_marker(pytest.mark.flaky(reruns=1))


def _names_in(function: Any) -> set[str]:
    """What a function, and those of its module that it calls, refer to by name."""
    names: set[str] = set()
    left, seen = [function], set()
    while left:
        function = left.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        codes = [function.__code__]
        for code in codes:
            names |= {*code.co_names, *code.co_freevars}
            if "run" in code.co_names and "fit" in code.co_consts:
                names.add("run fit")
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        known = function.__globals__
        mine = (known[name] for name in names if name in known)
        left += [f for f in mine if getattr(f, "__module__", None) == function.__module__]
    return names


class _Guard:
    """Whether a process may start now. Python keeps an audit hook for ever: one looks here."""

    test: str | None = None
    is_installed = False


@contextlib.contextmanager
def no_processes(item: pytest.Item) -> Iterator[None]:
    """While it lasts, whoever starts a process fails the test."""
    if not _Guard.is_installed:
        platform.processor()  # asks `uname` once; whoever asks later is told without
        sys.addaudithook(_refuse)
        # The one way that has no event: multiprocessing's "spawn" and "forkserver".
        start = multiprocessing_util.spawnv_passfds

        def audited(path: Any, args: Any, passfds: Any) -> int:
            _refuse("os.posix_spawn", (path, args))
            return start(path, args, passfds)

        multiprocessing_util.spawnv_passfds = audited
        _Guard.is_installed = True
    _Guard.test = item.nodeid
    try:
        yield
    finally:
        _Guard.test = None


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if _Guard.test is None or event not in START_EVENTS:
        return
    what = arguments[1] if event == "subprocess.Popen" else event
    # No Exception: code under test would take it for a failure of its own and go on.
    pytest.fail(f"a test of the tier `unit` starts a process ({what}): mark it `process`")
