"""A front before two servers, all in threads of this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from running_front import Fronted, fronting
from running_server import TINY, Running, new_service, running


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Running, Running]]:
    """Two servers of the same model."""
    if not (TINY / "model.safetensors").exists():
        pytest.skip("examples/tiny has no weights; `make tiny` trains them")
    with (
        running(new_service(max_rows=1, max_waiting=1)) as first,
        running(new_service(max_rows=1, max_waiting=1)) as second,
    ):
        yield first, second


@pytest.fixture(scope="module")
def fronted(pair: tuple[Running, Running]) -> Iterator[Fronted]:
    """A front of both."""
    with fronting(*(one.url for one in pair)) as front:
        yield front
