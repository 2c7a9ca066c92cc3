"""One server with the embedded checkpoint for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from running_server import TINY, Running, new_service, running


@pytest.fixture(scope="session")
def served() -> Iterator[Running]:
    """The server that most tests ask."""
    if not (TINY / "model.safetensors").exists():
        pytest.skip("examples/tiny has no weights; `make tiny` trains them")
    limits = {"read_timeout_s": 1.0, "send_buffer_bytes": 4096}
    with running(new_service(max_body_bytes=2_000_000, keep_alive_s=0.2), **limits) as one:
        yield one
