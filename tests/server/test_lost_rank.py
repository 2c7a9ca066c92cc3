"""A server on two ranks, one of which is killed."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
from launching import PATIENCE_S, launched

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}


def test_a_server_says_that_a_rank_is_gone_and_ends(tmp_path: Path) -> None:
    command = ["-m", "lfm_mlx.server", "--model", str(TINY), "--tensor-parallel", "2", "--port", "0"]
    with launched(tmp_path, *command) as ranks:
        assert ranks[0].stdout is not None
        url = ranks[0].stdout.readline().split()[-1]
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
            answer = http.post("/v1/chat/completions", json={**QUESTION, "max_tokens": 3})
            assert answer.status_code == 200
            assert answer.json()["choices"][0]["message"]["reasoning"].startswith("The")
            with http.stream(
                "POST", "/v1/chat/completions", json={**QUESTION, "stream": True, "temperature": 2}
            ) as open_:
                lines = open_.iter_lines()
                next(lines)
                ranks[1].send_signal(signal.SIGKILL)
                assert "rank 1 is gone" in "".join(lines)
            ranks[0].terminate()  # As the launcher does.
            refused = http.post("/v1/chat/completions", json=QUESTION)
            assert refused.status_code == 503
            assert http.get("/health/ready").status_code == 503
        assert ranks[0].wait(PATIENCE_S) == 1
