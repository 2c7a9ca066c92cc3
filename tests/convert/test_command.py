import os
import re
import signal
import subprocess
import sys

import pytest

from lfm_mlx.convert import convert, verify
from lfm_mlx.convert.__main__ import command
from lfm_mlx.terminal import run as run_command

PAUSED = """
import time
from lfm_mlx.convert import attempt
from lfm_mlx.convert.__main__ import command
from lfm_mlx.terminal import run

def pause(*arguments):
    print("written", flush=True)
    time.sleep(60)

attempt.write_index = pause
run(command, "convert")
"""
EARLY = PAUSED.replace("write_index", "allocate")
LIMITED = """
import resource
from lfm_mlx.convert.__main__ import command
from lfm_mlx.terminal import run

resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
run(command, "convert")
"""


@pytest.fixture
def run(sources, capfd, monkeypatch):
    """Run the command in this process on the MoE source; returns exit code, standard output and error."""

    def call(*flags, model=None):
        monkeypatch.setattr(sys, "argv", ["convert", "--model", str(model or sources["moe"]), *map(str, flags)])
        with pytest.raises(SystemExit) as exit_info:
            run_command(command, "convert")
        return exit_info.value.code, *capfd.readouterr()

    return call


def bits_of(folder):
    default = verify(folder).config.quantization.default
    return default.mode, default.bits, default.group_size


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("affine", 4, 64)),
        (["--bits", "8", "--group-size", "32"], ("affine", 8, 32)),
        (["--mode", "mxfp4"], ("mxfp4", 4, 32)),
        (["--recipe", "6bit"], ("affine", 6, 64)),
    ],
)
def test_flags_choose_how_matrices_are_stored(run, tmp_path, flags, expected):
    code, _, _ = run("--out", tmp_path / "out", *flags)
    assert code == 0
    assert bits_of(tmp_path / "out") == expected


def test_no_quantize_keeps_full_precision(run, tmp_path):
    code, output, _ = run("--out", tmp_path / "out", "--no-quantize")
    assert code == 0
    assert verify(tmp_path / "out").config.quantization is None
    assert "16.0" in output


def test_summary_names_folder_bytes_bits_and_seconds(run, tmp_path):
    code, output, _ = run("--out", tmp_path / "out")
    pattern = (
        rf"{re.escape(str(tmp_path / 'out'))}: [\d.]+ kB -> [\d.]+ kB in 1 shard, 4\.\d+ bits per weight, [\d.]+ s\n"
    )
    assert code == 0
    assert re.fullmatch(pattern, output)


def test_quiet_prints_nothing(run, tmp_path):
    assert run("--out", tmp_path / "out", "--quiet") == (0, "", "")


def test_progress_bar_shows_bytes_and_time_left(sources, tmp_path, monkeypatch):
    pty = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "lfm_mlx.convert", "--model", str(sources["moe"]), "--out", str(tmp_path / "out")]
    subprocess.run(command, stderr=terminal, stdout=subprocess.DEVNULL, check=True, timeout=60)
    os.close(terminal)
    shown = os.read(controller, 100_000).decode()
    os.close(controller)
    assert re.search(r"converting +\[#+-+\] +\d+% +(\d\d:\d\d:\d\d +)?[\d.]+ kB of [\d.]+ kB", shown)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "7"], "bits is 7, expected 2, 3, 4, 5, 6, 8"),
        (["--group-size", "16"], "group_size is 16, expected 32, 64, 128"),
        (["--mode", "mxfp4", "--bits", "8"], "bits is 8, expected 4 in mode mxfp4"),
        (["--mode", ""], "mode is ''"),
        (["--recipe", "4bits"], "nearest: 4bit"),
        (["--recipe", "4bit", "--bits", "4"], "--bits and --recipe exclude each other"),
        (["--no-quantize", "--group-size", "32"], "--group-size and --no-quantize exclude each other"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--revision", "main"], "revision is 'main'"),
    ],
)
def test_refused_values_are_one_line_and_exit_code_1(run, tmp_path, flags, message):
    code, output, error = run("--out", tmp_path / "out", *flags)
    assert (code, output) == (1, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "x", "--bits", "four"], "'four' is not a valid integer"),
        (["--out", "x", "--router-bits", "4"], "No such option"),
        ([], "Missing option '--out'"),
        (["folder", "other"], "'folder' is none of the commands dequantize"),
    ],
)
def test_wrong_usage_is_explained_and_exit_code_2(run, flags, message):
    code, output, error = run(*flags)
    assert (code, output) == (2, "")
    assert message in error
    assert "Traceback" not in error


def test_errors_are_one_line_and_exit_code_1(run, sources, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    cases = [
        (run("--out", sources["moe"]), "same folder"),
        (run("--out", sources["moe"] / "out"), "inside the source"),
        (run("--out", tmp_path / "file"), "is a file"),
        (run("--out", tmp_path / "file" / "out"), "is a file, expected a folder"),
        (run("--out", tmp_path / "out", model=tmp_path / "empty"), "no config.json"),
        (run("--out", sources["dense_old"]), "exists already; replace it with --force"),
    ]
    for (code, output, error), message in cases:
        assert (code, output) == (1, "")
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error


def test_full_disk_is_one_line_and_leaves_nothing(sources, tmp_path):
    command = [sys.executable, "-c", LIMITED, "--model", str(sources["moe"]), "--out", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*File too large; the conversion to .* was given up\n", done.stderr)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 143, r"stopped by SIGTERM; --resume goes on with \S+"),
        (signal.SIGHUP, 129, r"stopped by SIGHUP; --resume goes on with \S+"),
        (signal.SIGINT, 130, r"--resume goes on with \S+\s+interrupted"),
    ],
)
def test_signal_ends_with_a_word_on_what_is_left_and_resume_goes_on(run, sources, tmp_path, number, code, line):
    with paused(sources["moe"], tmp_path / "out") as process:
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert re.fullmatch(line, error.strip())
    (left,) = os.listdir(tmp_path)
    assert left in error
    assert run("--out", tmp_path / "out", "--resume", "--quiet") == (0, "", "")
    assert os.listdir(tmp_path) == ["out"]


def test_signal_before_any_task_is_done_leaves_nothing(sources, tmp_path):
    with paused(sources["moe"], tmp_path / "out", EARLY) as process:
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert error.strip() == "stopped by SIGTERM; nothing was written"
    assert os.listdir(tmp_path) == []


def test_killed_run_leaves_no_destination_and_the_next_run_tidies_up(run, sources, tmp_path):
    with paused(sources["moe"], tmp_path / "out") as process:
        process.kill()
        process.communicate(timeout=60)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out.partial-")
    assert "config.json" not in os.listdir(tmp_path / left)
    code, _, error = run("--out", tmp_path / "out")
    assert code == 0
    assert f"note: removed {tmp_path / left}, left by an interrupted conversion" in error
    assert os.listdir(tmp_path) == ["out"]


def paused(source, out, program=PAUSED):
    """A conversion in another process that waits once all weights are written."""
    command = [sys.executable, "-c", program, "--model", str(source), "--out", str(out), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    return process


def test_sizes_are_told_before_anything_is_written(run, tmp_path):
    (tmp_path / "out").mkdir()
    code, _, error = run("--out", tmp_path / "out", "--recipe", "mixed")
    assert code == 0
    assert re.search(r"recipe mixed: [\d.]+ kB -> [\d.]+ kB, \d+\.\d+ bits per weight", error)


def test_recipes_are_listed_with_bits_and_bytes(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert", "recipes"])
    with pytest.raises(SystemExit):
        run_command(command, "convert")
    output = capfd.readouterr().out
    assert re.search(r"^4bit +4\.501 bits per weight +4\.76 GB", output, re.MULTILINE)
    assert re.search(r"^unquantized +16\.000 bits per weight +16\.94 GB", output, re.MULTILINE)


def test_verify_finds_a_changed_byte(run, tmp_path, capfd, monkeypatch):
    run("--out", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["convert", "verify", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_info:
        run_command(command, "convert")
    assert exit_info.value.code == 0
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit) as exit_info:
        run_command(command, "convert")
    assert exit_info.value.code == 1
    assert "model.safetensors: is" in capfd.readouterr().err


def test_a_source_that_is_not_quantised_has_nothing_to_dequantise(sources, tmp_path, capfd, monkeypatch):
    def dequantize(source):
        monkeypatch.setattr(sys, "argv", ["convert", "dequantize", str(source), str(tmp_path / "plain")])
        with pytest.raises(SystemExit) as exit_info:
            run_command(command, "convert")
        return exit_info.value.code, capfd.readouterr().err

    code, error = dequantize(sources["moe"])
    assert code == 1
    assert "is not quantised, expected a quantised checkpoint: there is nothing to dequantise" in error
    assert os.listdir(tmp_path) == []
    quantised = convert(sources["moe"], tmp_path / "4bit").folder
    assert dequantize(quantised)[0] == 0
    assert verify(tmp_path / "plain").config.quantization is None


def test_importing_the_converter_stays_cheap():
    code = "import sys, lfm_mlx.convert.__main__\nprint([m for m in ('transformers', 'mlx_lm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
