"""Requests made up from the OpenAPI description: none of them may be the server's fault."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from running_server import Running

EXAMPLES = 30
"""Over all operations; `schemathesis run` against a running server tries more."""

SHORT = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""What limits an answer, which is kept short: what is tested is what is taken."""


def shortened(body: Any, path: str) -> Any:
    """A body whose answer is short, where it asks for one."""
    if not isinstance(body, dict):
        return body
    wrong = {name: body[name] for name in SHORT if name in body and type(body[name]) is not int}
    return {
        "max_output_tokens" if path == "/v1/responses" else "max_tokens": 2,
        **body,
        **{name: min(body[name], 2) for name in SHORT if name in body and name not in wrong},
    }


def test_no_request_that_the_description_suggests_is_the_servers_fault(served: Running) -> None:
    # Takes a second to import.
    schemathesis = pytest.importorskip("schemathesis")
    checks = pytest.importorskip("schemathesis.checks")
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 10
    statuses: dict[str, set[int]] = {}

    @seed(0)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def ask(data: st.DataObject) -> None:
        operation = data.draw(st.sampled_from(operations))
        mode = data.draw(st.sampled_from(list(schemathesis.GenerationMode)))
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if operation.path.startswith("/v1") and operation.method == "post" and "count" not in operation.path:
            case.body = shortened(case.body, operation.path)
        response = case.call(base_url=served.url, timeout=60)
        statuses.setdefault(operation.label, set()).add(response.status_code)
        case.validate_response(response, checks=[checks.not_a_server_error])

    ask()
    assert any(200 in found for found in statuses.values())
    assert any(400 in found for found in statuses.values())
    served.check_alive()
