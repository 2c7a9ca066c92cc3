"""A server on two ranks, each with the whole model."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from launching import PATIENCE_S, launched, outputs
from running_front import Fronted
from running_server import TINY

from lfm_mlx.errors import OptionError, RankError
from lfm_mlx.server import __main__ as server

SERVER = ["-m", "lfm_mlx.server", "--model", str(TINY), "--port", "0"]


def test_two_ranks_answer_behind_one_address_and_end_together(tmp_path: Path) -> None:
    with launched(tmp_path, *SERVER, "--data-parallel", "2") as ranks:
        assert ranks[0].stdout is not None
        line = ranks[0].stdout.readline()
        assert line.startswith("2 of 2 replicas at http")
        with httpx.Client(base_url=line.split()[-1], timeout=PATIENCE_S) as http:
            for number in range(2):
                answer = http.post("/v1/completions", json={"prompt": f"{number} " * 20, "max_tokens": 3})
                assert answer.status_code == 200, answer.text
            text = http.get("/metrics").text
            assert re.findall(r"router_requests_total{.*} (.*)", text) == ["1.0", "1.0"]
            found = re.search(r'num_requests_running{.*replica="(.*?)"', text)
            assert found is not None
            assert httpx.get(f"http://{found[1]}/v1/models").status_code == 401, "a replica answers its front only"
        ranks[0].terminate()
        assert [code for code, _, _ in outputs(ranks)] == [0, 0]


def test_clients_are_told_when_a_rank_is_gone(fronted: Fronted) -> None:
    body = {"messages": [{"role": "user", "content": "Write."}], "guided_regex": "[a-z ]{3000}", "temperature": 2}
    with fronted.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as open_:
        lines = open_.iter_lines()
        next(lines)
        assert fronted.front.lose(RankError("rank 1 is gone: it failed")) > 0
        assert '"message":"rank 1 is gone: it failed"' in "".join(lines)
    refused = fronted.chat()
    assert refused.status_code == fronted.http.get("/health/ready").status_code == 503
    assert "rank 1 is gone" in refused.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replica", "http://a", "--kv-bits", "8"], "--kv-bits was given with --replica"),
        (["--replica", "http://a", "--model", "b"], "--model was given with --replica"),
        (["--replica", "http://a", "--data-parallel", "2"], "--data-parallel was given with --replica"),
        (["--replica", "a:80"], "the replica 'a:80' is no URL of a server"),
        (["--replica-key-file", __file__], "without --replica"),
        (["--data-parallel", "2", "--tensor-parallel", "2"], "--data-parallel was given with --tensor-parallel"),
        (["--data-parallel", "2"], "--data-parallel is 2, but 1 process was launched"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "set_up_log", lambda level: None)  # Other tests read this process's log.
    with pytest.raises(OptionError, match=message):
        server.command.main([*options, "--port", "0"], standalone_mode=False)


@pytest.mark.parametrize(
    ("rank", "message"), [(0, "no-key: cannot be read"), (1, "--data-parallel is 3, but 2 processes were launched")]
)
def test_files_of_the_front_have_to_be_where_rank_0_is(
    rank: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    monkeypatch.setenv("MLX_RANK", str(rank))
    monkeypatch.setattr(server, "set_up_log", lambda level: None)
    files = ["--api-key-file", str(tmp_path / "no-key")]
    if rank > 0:
        files += ["--tls-cert", str(tmp_path / "none"), "--tls-key", str(tmp_path / "none")]
    with pytest.raises(OptionError, match=message):
        server.command.main([*files, "--data-parallel", "3", "--port", "0"], standalone_mode=False)
