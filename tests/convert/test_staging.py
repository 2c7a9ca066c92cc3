import os
import shutil
import subprocess
import sys

import pytest

from lfm_mlx.convert import staging
from lfm_mlx.convert.staging import check_destination, check_space, staged, tidy
from lfm_mlx.errors import ConversionError


def fill(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)
    return folder


def fail_inside(out, error):
    with staged(out) as folder:
        fill(folder, "new")
        raise error


def test_folder_appears_only_when_the_block_has_ended(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out) as folder:
        fill(folder, "new")
        assert not out.exists()
        assert folder.parent == out.parent
    assert (out / "config.json").read_text() == "new"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_block_raises(tmp_path, error):
    with pytest.raises(error):
        fail_inside(tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


def test_finished_folder_has_the_usual_permissions(tmp_path):
    usual = tmp_path / "usual"
    usual.mkdir()
    with staged(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == usual.stat().st_mode


def test_existing_folder_is_replaced_as_a_whole(tmp_path):
    out = fill(tmp_path / "out", "old")
    (out / "leftover.safetensors").write_text("old")
    with staged(out) as folder:
        fill(folder, "new")
        assert (out / "config.json").read_text() == "old"
    assert os.listdir(out) == ["config.json"]
    assert (out / "config.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_existing_folder_survives_a_block_that_raises(tmp_path):
    out = fill(tmp_path / "out", "old")
    with pytest.raises(RuntimeError):
        fail_inside(out, RuntimeError)
    assert (out / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_existing_folder_is_put_back_when_the_exchange_fails(tmp_path, monkeypatch):
    out = fill(tmp_path / "out", "old")
    rename = staging.Path.rename

    def failing(self, target):
        if "partial" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(staging.Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt), staged(out) as folder:
        fill(folder, "new")
    assert (out / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_of_a_killed_run_are_removed_with_a_note(tmp_path):
    out = tmp_path / "out"
    fill(tmp_path / ".out.partial-01234567", "half")
    fill(tmp_path / ".other.partial-01234567", "not ours")
    (note,) = tidy(out)
    assert "removed" in note
    assert os.listdir(tmp_path) == [".other.partial-01234567"]
    assert tidy(out) == []


def test_folder_that_was_moved_aside_by_a_killed_run_comes_back(tmp_path):
    fill(tmp_path / ".out.replaced-01234567", "old")
    (note,) = tidy(tmp_path / "out")
    assert "restored" in note
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_copy_of_a_replaced_folder_is_removed_once_the_new_one_is_there(tmp_path):
    fill(tmp_path / "out", "new")
    fill(tmp_path / ".out.replaced-01234567", "old")
    tidy(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_folder_of_a_running_conversion_is_not_taken_for_a_leftover(tmp_path):
    code = (
        "import sys; from pathlib import Path; from lfm_mlx.convert.staging import staged\n"
        f"with staged(Path({str(tmp_path / 'out')!r})):\n    print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"ready\n"
        with pytest.raises(ConversionError, match="another conversion is writing it"):
            tidy(tmp_path / "out")
        running.stdin.close()
        running.wait(timeout=20)
    assert os.listdir(tmp_path) == ["out"]


def test_new_and_empty_destinations_are_accepted(tmp_path):
    source = fill(tmp_path / "source", "")
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "deep/new"):
        check_destination(source, tmp_path / name, force=False)


@pytest.mark.parametrize(
    ("out", "force", "message"),
    [
        ("source", True, "same folder"),
        ("source/out", True, "inside the source"),
        (".", True, "contains the source"),
        ("file", True, "is a file"),
        ("model", False, "exists already; replace it with --force"),
        ("photos", True, "is not a model folder"),
    ],
)
def test_destinations_that_would_lose_data_are_refused(tmp_path, out, force, message):
    source = fill(tmp_path / "source", "")
    fill(tmp_path / "model", "")
    (tmp_path / "file").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(ConversionError, match=message):
        check_destination(source, (tmp_path / out).resolve(), force=force)
    check_destination(source, tmp_path / "model", force=True)


def test_full_disk_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    check_space(tmp_path / "deep" / "out", 1_000)
    with pytest.raises(ConversionError, match="1,000 bytes free, expected 1,001 for out"):
        check_space(tmp_path / "deep" / "out", 1_001)
