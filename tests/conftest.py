"""What several tests are given."""

from collections.abc import Callable

import pytest


@pytest.fixture
def parity(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Notes how far from an independent implementation a system was: `parity(system, what was compared, difference)`.
    `python -m benchmarks.parity` makes a table of it."""

    def note(system: str, compared: str, difference: object) -> None:
        record_property("parity", (system, compared, float(difference)))  # type: ignore[arg-type]  # a tensor is a number

    return note
