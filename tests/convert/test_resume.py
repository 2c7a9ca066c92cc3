"""A conversion may be killed at any moment; gone on with, it ends like one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lfm_mlx.convert import convert
from lfm_mlx.convert.journal import NAME, Journal, has_progress
from lfm_mlx.errors import CheckpointError, ConversionError

TASK_BYTES = 20_000
SLOW = """
import sys, time
from pathlib import Path
from lfm_mlx.convert import convert

source, out, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("begun", flush=True)
convert(source, out, jobs=jobs, resume=True, task_bytes=20_000, progress=lambda *_: time.sleep(0.01))
"""


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """What an uninterrupted run makes."""
    return contents_of(convert(sources["moe"], tmp_path_factory.mktemp("whole") / "out").folder)


def half_done(source, out, **options):
    """A conversion that was interrupted in the middle; returns the folder it left."""

    def interrupt(done_bytes, total_bytes):
        if done_bytes > total_bytes / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=interrupt, task_bytes=TASK_BYTES, **options)
    (partial,) = out.parent.glob(".out.partial-*")
    return partial


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_at_random_moments_and_resumed_the_result_is_the_same(sources, whole, tmp_path, jobs):
    dice = random.Random(jobs)
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, str(sources["moe"]), str(out), str(jobs)]
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "begun\n"
            time.sleep(dice.uniform(0, 0.3) * jobs)
            process.kill()
        if out.exists():
            break
    result = convert(sources["moe"], out, resume=True, task_bytes=TASK_BYTES, force=True)
    assert contents_of(result.folder) == whole
    assert os.listdir(tmp_path) == ["out"]


def test_work_that_was_damaged_meanwhile_is_done_again(sources, whole, tmp_path):
    partial = half_done(sources["moe"], tmp_path / "out")
    tasks = Journal.resume(partial, identity_in(partial)).tasks
    file = partial / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20_000:300_000] = bytes(len(data[20_000:300_000]))
    file.write_bytes(data)
    result = convert(sources["moe"], tmp_path / "out", resume=True, task_bytes=TASK_BYTES)
    assert result.num_resumed_tasks < len(tasks)
    assert contents_of(result.folder) == whole


def identity_in(partial):
    return json.loads((partial / NAME).read_text().splitlines()[0])["conversion"]


def test_a_source_that_changed_in_between_is_refused_by_name(sources, tmp_path):
    source = shutil.copytree(sources["moe"], tmp_path / "source")
    half_done(source, tmp_path / "out")
    os.utime(source / "model-00002-of-00003.safetensors", ns=(1, 1))
    with pytest.raises(ConversionError, match=r"source has changed .*\(model-00002-of-00003.safetensors\)"):
        convert(source, tmp_path / "out", resume=True, task_bytes=TASK_BYTES)


def test_other_options_are_refused_by_name(sources, tmp_path):
    half_done(sources["moe"], tmp_path / "out")
    with pytest.raises(ConversionError, match=r"was begun with recipe .*same options"):
        convert(sources["moe"], tmp_path / "out", recipe="8bit", resume=True, task_bytes=TASK_BYTES)


def test_without_resume_the_conversion_starts_anew(sources, whole, tmp_path):
    half_done(sources["moe"], tmp_path / "out")
    result = convert(sources["moe"], tmp_path / "out", task_bytes=TASK_BYTES)
    assert result.num_resumed_tasks == 0
    assert "--resume would have gone on with it" in result.notes[0]
    assert contents_of(result.folder) == whole


def test_a_source_that_changes_while_it_is_read_is_an_error_and_leaves_nothing(sources, tmp_path):
    source = shutil.copytree(sources["moe"], tmp_path / "source")

    def change(done_bytes, total_bytes):
        os.utime(source / "model-00003-of-00003.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="was changed while it was being converted"):
        convert(source, tmp_path / "out", progress=change, task_bytes=TASK_BYTES)
    assert os.listdir(tmp_path) == ["source"]


def test_a_shard_that_is_cut_while_it_is_read_is_an_error_and_leaves_nothing(sources, tmp_path):
    source = shutil.copytree(sources["moe"], tmp_path / "source")
    shard = source / "model-00001-of-00003.safetensors"
    times = shard.stat()

    def cut(done_bytes, total_bytes):
        os.truncate(shard, times.st_size // 2)

    with pytest.raises(CheckpointError, match=r"model-00001.*(ends .* bytes early|was changed)"):
        convert(source, tmp_path / "out", progress=cut, task_bytes=TASK_BYTES)
    assert os.listdir(tmp_path) == ["source"]


def test_a_killed_worker_is_an_error_and_resume_goes_on(sources, whole, tmp_path):
    def kill(done_bytes, total_bytes):
        if done_bytes > 0:
            for pid in children_of(os.getpid()):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(ConversionError, match=r"worker process ended with SIGKILL.*--resume"):
        convert(sources["moe"], tmp_path / "out", jobs=2, progress=kill, task_bytes=TASK_BYTES)
    result = convert(sources["moe"], tmp_path / "out", resume=True, task_bytes=TASK_BYTES)
    assert result.num_resumed_tasks > 0
    assert contents_of(result.folder) == whole


def children_of(pid):
    listed = subprocess.run(["ps", "-axo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [int(row[0]) for row in rows if int(row[1]) == pid and "lfm_mlx.convert.worker" in row[2]]


def test_a_torn_line_of_the_journal_costs_one_task_only(tmp_path):
    journal = Journal.begin(tmp_path, {"recipe": 1})
    assert not has_progress(tmp_path)
    journal.add_task(0, "aa")
    with (tmp_path / NAME).open("a") as stream:
        stream.write('{"task": 1, "sha')
    Journal.resume(tmp_path, {"recipe": 1}).add_task(2, "cc")
    assert Journal.resume(tmp_path, {"recipe": 1}).tasks == {0: "aa", 2: "cc"}
    assert has_progress(tmp_path)
