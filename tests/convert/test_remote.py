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
SESSION = """
import contextlib, io, json, os, shutil, sys
from lfm_mlx.convert import remote, staging
from lfm_mlx.convert.__main__ import command
from lfm_mlx.terminal import run

seen = []
fetch = remote.RemoteFeed._fetch

def watched(self, file):
    fetch(self, file)
    seen.append(sum(not each.is_symlink() for each in self.folder.iterdir()))

remote.RemoteFeed._fetch = watched
usage = shutil.disk_usage
for line in sys.stdin:
    arguments, environment, free = json.loads(line)
    seen.clear()
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(environment)
    staging.shutil.disk_usage = usage if free is None else lambda path: usage(path)._replace(free=free)
    sys.argv = ["convert", *arguments]
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        try:
            run(command, "convert")
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, output.getvalue(), error.getvalue(), max(seen, default=0)]), flush=True)
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


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What processes take for the user's folder."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def start(hub, home):
    """Starts Python with the hub's address and a cache of its own; the client reads both when it is imported."""

    def call(*arguments):
        kept = {name: value for name, value in os.environ.items() if not re.match("(?i)hf_|.*proxy", name)}
        settings = {
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": hub.address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, *map(str, arguments)]
        return subprocess.Popen(command, env=kept | settings, text=True, cwd=ROOT, **pipes)

    return call


@pytest.fixture(scope="module")
def session(start):
    """Runs commands in another process, which imports everything once: exit code, output, error, files at once."""
    process = start("-c", SESSION)

    def call(*flags, free=None, **environment):
        quiet = [] if flags[0] == "upload" else ["--quiet"]
        process.stdin.write(json.dumps([[*map(str, flags), *quiet], environment, free]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, process.stderr.read()
        return tuple(json.loads(answer))

    yield call
    process.stdin.close()
    process.wait(60)
    for pipe in (process.stdout, process.stderr):
        pipe.close()


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def cached(home, repo):
    return {path.name for path in home.glob(f"hf/hub/models--{repo.replace('/', '--')}/snapshots/*/*.safetensors")}


def test_a_repo_is_converted_file_by_file_and_stays_in_the_cache(hub, files, local, session, home, tmp_path):
    repo = hub.add(files)
    code, _, error, _ = session("--model", repo, "--out", tmp_path / "out")
    assert code == 0, error
    assert weights_of(tmp_path / "out") == weights_of(local)
    assert check_manifest(tmp_path / "out") > 0
    manifest, expected = (json.loads((each / "manifest.json").read_text()) for each in (tmp_path / "out", local))
    assert manifest["source"] == expected["source"]
    assert cached(home, repo) == set(SHARDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    headers = [request for request in hub.asked(repo) if request.range == "bytes=0-131071"]
    assert len(headers) == len(SHARDS)
    assert repo in (tmp_path / "out" / "README.md").read_text()
    hub.requests.clear()
    code, _, error, _ = session("--model", repo, "--out", tmp_path / "again", "--discard-source")
    assert code == 0, error
    assert weights_of(tmp_path / "again") == weights_of(local)
    assert cached(home, repo) == set(SHARDS)
    assert not hub.downloaded(repo) & set(SHARDS)


def test_discarded_files_are_at_most_two_at_once_and_none_is_left(hub, files, local, session, home, tmp_path):
    repo = hub.add(files)
    code, _, error, most = session("--model", repo, "--out", tmp_path / "out", "--discard-source", "--jobs", "1")
    assert code == 0, error
    assert most in (1, 2)
    assert weights_of(tmp_path / "out") == weights_of(local)
    assert not cached(home, repo)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]) == len(files)


def begun(start, hub, repo, tmp_path):
    """A conversion that was killed while it downloaded the second file, the first one converted and deleted."""
    flags = ("--model", repo, "--out", tmp_path / "out", "--discard-source", "--jobs", "1", "--quiet")
    process = start("-m", "lfm_mlx.convert", *flags)
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


def test_a_killed_download_goes_on_and_what_was_converted_stays(start, hub, files, local, session, tmp_path):
    repo = hub.add(files, stalled_file=SHARDS[1])
    begun(start, hub, repo, tmp_path)
    code, _, error, _ = session("--model", repo, "--out", tmp_path / "out", "--discard-source", "--resume")
    assert code == 0, error
    assert weights_of(tmp_path / "out") == weights_of(local)
    assert SHARDS[0] not in hub.downloaded(repo)
    again = [each.range for each in hub.asked(repo) if each.method == "GET" and each.path.endswith(SHARDS[1])]
    assert [re.fullmatch(r"bytes=[1-9]\d*-", each or "") is not None for each in again] == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_file_that_was_changed_at_the_hub_meanwhile_is_named(start, hub, files, local, session, tmp_path):
    repo = hub.add(dict(files), stalled_file=SHARDS[1])
    begun(start, hub, repo, tmp_path)
    changed = hub.repos[repo]
    changed.main = "c" * 40
    changed.files[SHARDS[2]] = changed.files[SHARDS[2]][:-1] + b"x"
    flags = ("--model", repo, "--out", tmp_path / "out", "--discard-source")
    code, _, error, _ = session(*flags, "--resume")
    assert code == 1
    assert f"the source has changed since this conversion was interrupted ({SHARDS[2]})" in error
    assert "start again without --resume" in error
    changed.files[SHARDS[2]] = files[SHARDS[2]]
    code, _, error, _ = session(*flags, "--resume")
    assert code == 0, error
    assert weights_of(tmp_path / "out") == weights_of(local)


def test_a_file_that_was_damaged_on_its_way_is_found_and_nothing_looks_finished(hub, files, session, tmp_path):
    repo = hub.add(files, damaged_file=SHARDS[1])
    code, _, error, _ = session("--model", repo, "--out", tmp_path / "out", "--discard-source")
    assert code == 1
    assert re.search(rf"{SHARDS[1]} has SHA-256 \w+\.\.\., expected \w+\.\.\.; it was damaged", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_disk_needs_room_for_the_result_and_two_files_or_all(hub, files, session, tmp_path):
    repo = hub.add(files)
    flags = ("--model", repo, "--out", tmp_path / "out")
    expected = {}
    for more in ((), ("--discard-source",)):
        code, _, error, _ = session(*flags, *more, free=1000)
        assert code == 1
        needed = re.search(r"1,000 bytes free, expected ([\d,]+) for out", error)
        assert needed is not None
        expected[more] = int(needed[1].replace(",", ""))
        assert ("(--discard-source)" in error) == (not more)
    sizes = [len(files[name]) for name in SHARDS]
    saved = sum(sizes) - max(sizes[0] + sizes[1], sizes[1] + sizes[2])
    assert expected[()] - expected[("--discard-source",)] == saved > 0
    assert not list(tmp_path.glob("*out*"))


def test_files_of_a_path_are_never_deleted(sources, session, tmp_path):
    code, _, error, _ = session("--model", sources["moe"], "--out", tmp_path / "out", "--discard-source")
    assert code == 1
    assert "is a path of yours; leave it out, nothing there is ever deleted" in error
    assert len(list(sources["moe"].glob("*.safetensors"))) == 3
    code, _, error, _ = session("--model", "org/repo0", "--out", tmp_path / "out", "--discard-source", "--report")
    assert code == 1
    assert "read the source more than once" in error


# Uploads


def test_a_conversion_is_uploaded_with_all_its_files(hub, sources, session, tmp_path):
    flags = ("--model", sources["moe"], "--out", tmp_path / "out", "--upload-repo", "org/converted")
    code, output, error, _ = session(*flags, HF_TOKEN="hf_secret")
    assert code == 0, error
    assert f"{hub.address}/org/converted/commit/{COMMITS['main']}" in output
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.repos["org/converted"].files == expected
    asked = [each for each in hub.requests if "org/converted" in each.path and each.path.startswith("/api")]
    assert {each.authorization for each in asked} == {"Bearer hf_secret"}


def test_without_a_token_nothing_is_begun(sources, session, tmp_path):
    code, _, error, _ = session("--model", sources["moe"], "--out", tmp_path / "out", "--upload-repo", "org/none")
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
def test_an_upload_that_fails_is_one_line_and_loses_nothing(hub, local, session, name, answers, message):
    hub.repos[name] = Repo({}, **answers)
    code, _, error, _ = session("upload", local, name, HF_TOKEN="hf_secret")
    assert code == 1
    assert message in error
    assert "hf_secret" not in error
    assert [line[:7] for line in error.splitlines()] == ["error: "]
    assert check_manifest(local) > 0
    retry = re.search(r"python -m lfm_mlx\.convert (upload .*)", error)
    assert retry is not None
    hub.repos[name] = Repo({})
    assert session(*retry[1].split(), HF_TOKEN="hf_secret")[0] == 0
    assert set(hub.repos[name].files) == {path.name for path in local.iterdir()}
