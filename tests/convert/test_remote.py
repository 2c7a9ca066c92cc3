"""A repo converted file by file, from a small hub on this machine, and conversions uploaded to it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import COMMITS, Hub, Repo

from lfm_mlx.convert import convert
from lfm_mlx.convert.manifest import check_manifest

ROOT = Path(__file__).resolve().parents[2]
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
FULL_DISK = """
import shutil
from lfm_mlx.convert import staging
from lfm_mlx.convert.__main__ import command
from lfm_mlx.terminal import run

usage = shutil.disk_usage(".")
staging.shutil.disk_usage = lambda path: usage._replace(free=1000)
run(command, "convert")
"""
WATCHED = """
import sys, threading
from pathlib import Path
from lfm_mlx.convert.__main__ import command
from lfm_mlx.convert import remote
from lfm_mlx.terminal import run

seen = []
begin = remote.RemoteFeed._fetch

def fetch(self, file):
    begin(self, file)
    here = [each.name for each in self.folder.iterdir() if not each.is_symlink()]
    seen.append(len(here))

remote.RemoteFeed._fetch = fetch
try:
    run(command, "convert")
finally:
    print("most files at once:", max(seen, default=0), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def hub():
    running = Hub()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def files(sources):
    """A checkpoint in three shards as a repo holds it."""
    return {path.name: path.read_bytes() for path in sources["moe"].iterdir()}


@pytest.fixture(scope="module")
def local(sources, tmp_path_factory):
    """What the folder of the same files is converted to."""
    return convert(sources["moe"], tmp_path_factory.mktemp("local") / "out", task_bytes=20_000).folder


@pytest.fixture
def command(hub, tmp_path):
    """Starts the command in another process, with a cache of its own."""

    def start(*flags, program=None, **environment):
        kept = {name: value for name, value in os.environ.items() if not re.match("(?i)hf_|.*proxy", name)}
        settings = {
            "HOME": str(tmp_path / "home"),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        module = ["-m", "lfm_mlx.convert"] if program is None else ["-c", program]
        arguments = [sys.executable, *module, *map(str, flags)]
        arguments += [] if flags[0] == "upload" else ["--quiet"]
        return subprocess.Popen(
            arguments,
            env=kept | settings | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )

    return start


def finish(process):
    output, error = process.communicate(timeout=120)
    return process.returncode, output, error


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def cached(tmp_path):
    return {path.name for path in (tmp_path / "hf").rglob("*.safetensors")}


def test_a_repo_is_converted_file_by_file_and_stays_in_the_cache(hub, files, local, command, tmp_path):
    repo = hub.add(files)
    code, _, error = finish(command("--model", repo, "--out", tmp_path / "out"))
    assert code == 0, error
    assert weights_of(tmp_path / "out") == weights_of(local)
    assert check_manifest(tmp_path / "out") > 0
    manifest, expected = (json.loads((each / "manifest.json").read_text()) for each in (tmp_path / "out", local))
    assert manifest["source"] == expected["source"]
    assert cached(tmp_path) == set(SHARDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    headers = [request for request in hub.asked(repo) if request.range == "bytes=0-131071"]
    assert len(headers) == len(SHARDS)
    assert repo in (tmp_path / "out" / "README.md").read_text()
    hub.requests.clear()
    code, _, error = finish(command("--model", repo, "--out", tmp_path / "again", "--discard-source"))
    assert code == 0, error
    assert weights_of(tmp_path / "again") == weights_of(local)
    assert cached(tmp_path) == set(SHARDS)
    assert not hub.downloaded(repo) & set(SHARDS)


def test_discarded_files_are_at_most_two_at_once_and_none_is_left(hub, files, local, command, tmp_path):
    repo = hub.add(files)
    code, _, error = finish(
        command("--model", repo, "--out", tmp_path / "out", "--discard-source", "--jobs", "1", program=WATCHED)
    )
    assert code == 0, error
    most = re.search(r"most files at once: (\d)", error)
    assert most is not None
    assert most[1] in "12"
    assert weights_of(tmp_path / "out") == weights_of(local)
    assert not cached(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]) == len(files)


def begun(command, hub, repo, tmp_path):
    """A conversion that was killed while it downloaded the second file, the first one converted and deleted."""
    process = command("--model", repo, "--out", tmp_path / "out", "--discard-source", "--jobs", "1")
    try:
        assert hub.repos[repo].stalled.wait(60), process.stderr.read()
        deadline = time.monotonic() + 60
        while not (done := list(tmp_path.glob(".out.partial-*/.journal"))) or SHARDS[0] not in done[0].read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        while list(tmp_path.glob(f".out.download-*/weights/{SHARDS[0]}")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    hub.repos[repo].released.set()
    hub.requests.clear()


def test_a_killed_download_goes_on_and_what_was_converted_is_not_downloaded_again(hub, files, local, command, tmp_path):
    repo = hub.add(files, stalled_file=SHARDS[1])
    begun(command, hub, repo, tmp_path)
    code, _, error = finish(command("--model", repo, "--out", tmp_path / "out", "--discard-source", "--resume"))
    assert code == 0, error
    assert weights_of(tmp_path / "out") == weights_of(local)
    assert SHARDS[0] not in hub.downloaded(repo)
    again = [each.range for each in hub.asked(repo) if each.method == "GET" and each.path.endswith(SHARDS[1])]
    assert [re.fullmatch(r"bytes=[1-9]\d*-", each or "") is not None for each in again] == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_file_that_was_changed_at_the_hub_meanwhile_is_named(hub, files, local, command, tmp_path):
    repo = hub.add(dict(files), stalled_file=SHARDS[1])
    begun(command, hub, repo, tmp_path)
    changed = hub.repos[repo]
    changed.main = "c" * 40
    changed.files[SHARDS[2]] = changed.files[SHARDS[2]][:-1] + b"x"
    flags = ("--model", repo, "--out", tmp_path / "out", "--discard-source")
    code, _, error = finish(command(*flags, "--resume"))
    assert code == 1
    assert f"the source has changed since this conversion was interrupted ({SHARDS[2]})" in error
    assert "start again without --resume" in error
    changed.files[SHARDS[2]] = files[SHARDS[2]]
    code, _, error = finish(command(*flags, "--resume"))
    assert code == 0, error
    assert weights_of(tmp_path / "out") == weights_of(local)


def test_a_file_that_was_damaged_on_its_way_is_found_and_nothing_looks_finished(hub, files, command, tmp_path):
    repo = hub.add(files, damaged_file=SHARDS[1])
    code, _, error = finish(command("--model", repo, "--out", tmp_path / "out", "--discard-source"))
    assert code == 1
    assert re.search(rf"{SHARDS[1]} has SHA-256 \w+\.\.\., expected \w+\.\.\.; it was damaged", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_disk_needs_room_for_the_result_and_two_files_or_all(hub, files, command, tmp_path):
    repo = hub.add(files)
    flags = ("--model", repo, "--out", tmp_path / "out")
    expected = {}
    for more in ((), ("--discard-source",)):
        code, _, error = finish(command(*flags, *more, program=FULL_DISK))
        assert code == 1
        needed = re.search(r"1,000 bytes free, expected ([\d,]+) for out", error)
        assert needed is not None
        expected[more] = int(needed[1].replace(",", ""))
        assert ("(--discard-source)" in error) == (not more)
    sizes = [len(files[name]) for name in SHARDS]
    saved = sum(sizes) - max(sizes[0] + sizes[1], sizes[1] + sizes[2])
    assert expected[()] - expected[("--discard-source",)] == saved > 0
    assert not list(tmp_path.glob("*out*"))


def test_files_of_a_path_are_never_deleted(sources, command, tmp_path):
    code, _, error = finish(command("--model", sources["moe"], "--out", tmp_path / "out", "--discard-source"))
    assert code == 1
    assert "is a path of yours; leave it out, nothing there is ever deleted" in error
    assert len(list(sources["moe"].glob("*.safetensors"))) == 3
    code, _, error = finish(command("--model", "org/repo0", "--out", tmp_path / "out", "--discard-source", "--report"))
    assert code == 1
    assert "read the source more than once" in error


# Uploads


def test_a_conversion_is_uploaded_with_all_its_files(hub, sources, command, tmp_path):
    flags = ("--model", sources["moe"], "--out", tmp_path / "out", "--upload-repo", "org/converted")
    code, output, error = finish(command(*flags, HF_TOKEN="hf_secret"))
    assert code == 0, error
    assert f"{hub.address}/org/converted/commit/{COMMITS['main']}" in output
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.repos["org/converted"].files == expected
    asked = [each for each in hub.requests if "org/converted" in each.path and each.path.startswith("/api")]
    assert {each.authorization for each in asked} == {"Bearer hf_secret"}


def test_without_a_token_nothing_is_begun(sources, command, tmp_path):
    code, _, error = finish(command("--model", sources["moe"], "--out", tmp_path / "out", "--upload-repo", "org/none"))
    assert code == 1
    assert error == "error: org/none: no token, expected one that may write to it; set HF_TOKEN, or run hf auth login\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "answers", "message"),
    [
        ("org/forbidden", {"status": 403}, "refused it (HTTP 403); expected a token that may write to org/forbidden"),
        ("org/dropped", {"drops_commits": True}, "the connection to http"),
    ],
)
def test_an_upload_that_fails_is_one_line_and_loses_nothing(hub, local, command, name, answers, message):
    hub.repos[name] = Repo({}, **answers)
    code, _, error = finish(command("upload", local, name, HF_TOKEN="hf_secret"))
    assert code == 1
    assert message in error
    assert "hf_secret" not in error
    assert [line[:7] for line in error.splitlines()] == ["error: "]
    assert check_manifest(local) > 0
    retry = re.search(r"python -m lfm_mlx\.convert (upload .*)", error)
    assert retry is not None
    hub.repos[name] = Repo({})
    assert finish(command(*retry[1].split(), HF_TOKEN="hf_secret"))[0] == 0
    assert set(hub.repos[name].files) == {path.name for path in local.iterdir()}
