"""What several tests are given, and which of their cases are slow ones."""

import gc
import signal
from collections.abc import Callable, Sequence

import pytest


def pytest_configure() -> None:
    """Let SIGINT interrupt, also where a shell has started the tests in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Of a test that is marked `few(n)`, n cases, spread over all, are in the fast suite; the others are slow ones."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_test in cases.values():
        (count,) = of_test[0].get_closest_marker("few").args  # type: ignore[union-attr]
        fast = {n * len(of_test) // count for n in range(count)}
        for number, item in enumerate(of_test):
            if number not in fast:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def parity(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Notes how far from an independent implementation a system was: `parity(system, what was compared, difference)`.
    `python -m benchmarks.parity` makes a table of it."""

    def note(system: str, compared: str, difference: object) -> None:
        record_property("parity", (system, compared, float(difference)))  # type: ignore[arg-type]  # a tensor is a number

    return note


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the garbage collector pass over what was imported and collected: every training run calls it."""
    gc.collect()
    gc.freeze()
