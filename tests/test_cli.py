from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from chat_checkpoints import chat_config, write_chat_checkpoint

from lfm_mlx import Token, TokenStream, __version__, cli, generate, load
from lfm_mlx.load import LoadProgress
from lfm_mlx.terminal import run

QUESTION = "What is the capital of France?"

JSON_KEYS = [
    "model",
    "text",
    "finish_reason",
    "prompt_tokens",
    "generated_tokens",
    "time_to_first_token_s",
    "prompt_tokens_per_s",
    "generated_tokens_per_s",
    "peak_memory_bytes",
    "seed",
]

TOOL = {"name": "get_weather", "description": "Tell the weather.", "parameters": {"type": "object", "properties": {}}}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a program left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def endless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never draws a stop token when it is greedy, with a long context."""
    folder = write_chat_checkpoint(tmp_path_factory.mktemp("endless"), chat_config(max_position_embeddings=100_000))
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    stop_ids = mx.array(sorted(load(folder).tokenizer.stop_ids))
    tensors["model.embed_tokens.weight"][stop_ids] = 0.0
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    return folder


def lfm_mlx(*arguments: str, stdin: bytes = b"") -> Result:
    """Run the program in this process, as its entry point does."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["lfm-mlx", *arguments])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            run(cli.group, "lfm-mlx")
    out.flush()
    err.flush()
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    assert isinstance(ended.value.code, int)
    return Result(code=ended.value.code, out=texts[0], err=texts[1])


def answer(folder: Path, *arguments: str, stdin: bytes = b"") -> Result:
    """Run `lfm-mlx generate` on a model, at most eight tokens."""
    return lfm_mlx("generate", "--model", str(folder), "--max-tokens", "8", *arguments, stdin=stdin)


def refused(result: Result) -> str:
    """The one message of a run that had to fail."""
    assert result.code in (1, 2)
    assert result.out == ""
    assert "Traceback" not in result.err
    usage, marker, message = result.err.partition("rror: ")
    assert marker, result.err
    assert not usage or usage[-1] in "eE"
    assert "rror: " not in message
    return message


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m lfm_mlx.generate` as a process of its own."""
    command = [sys.executable, "-m", "lfm_mlx.generate", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env={**os.environ, **environment}, stdout=pipe, stderr=pipe, bufsize=0) as started:
        try:
            yield started
        finally:
            started.kill()


def test_the_answer_goes_to_standard_output_and_speed_and_memory_to_standard_error(folder: Path) -> None:
    expected = generate(*load(folder), QUESTION, max_tokens=8)
    result = answer(folder, "--prompt", QUESTION)
    assert (result.code, result.out) == (0, expected + "\n")
    assert len(result.err.splitlines()) == 1
    for part in ("prompt: ", "answer: 8 tokens, ", " tokens/s", "peak memory: ", "B"):
        assert part in result.err
    assert answer(folder, "--prompt", "Hello").out != result.out


def test_the_prompt_comes_from_an_option_a_file_or_standard_input(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("Größe?".encode())
    from_option = answer(folder, "--prompt", "Größe?")
    assert from_option.code == 0
    assert answer(folder, "--prompt-file", str(file)).out == from_option.out
    assert answer(folder, "--prompt", "-", stdin="Größe?".encode()).out == from_option.out
    assert answer(folder, "--prompt", "-", stdin=b"Groesse?").out != from_option.out


def test_options_reach_the_model(folder: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([TOOL]))
    loaded = load(folder)
    asked: list[tuple[list[str], dict[str, Any]]] = [
        (["--system", "Be brief."], {"system": "Be brief."}),
        (["--raw"], {"raw": True}),
        (["--tools", str(tools)], {"tools": [TOOL]}),
        (["--temp", "20", "--seed", "3"], {"temperature": 20.0, "seed": 3}),
        (
            ["--temp", "20", "--seed", "3", "--top-k", "2", "--top-p", "0.9", "--min-p", "0.1"],
            {"temperature": 20.0, "seed": 3, "top_k": 2, "top_p": 0.9, "min_p": 0.1},
        ),
        (["--repetition-penalty", "3"], {"repetition_penalty": 3.0}),
        (
            ["--presence-penalty", "9", "--frequency-penalty", "9", "--penalty-window", "4"],
            {"presence_penalty": 9.0, "frequency_penalty": 9.0, "penalty_window": 4},
        ),
        (["--stop", "a", "--stop", "s"], {"stop": ["a", "s"]}),
    ]
    plain = answer(folder, "--prompt", QUESTION).out
    for flags, options in asked:
        found = answer(folder, "--prompt", QUESTION, *flags).out
        assert found == generate(*loaded, QUESTION, max_tokens=8, **options) + "\n"
        assert found != plain


def test_json_is_one_line_with_every_number(folder: Path) -> None:
    result = answer(folder, "--prompt", QUESTION, "--json", "--seed", "7")
    assert result.code == 0
    assert result.err == ""
    assert result.out.count("\n") == 1
    values = json.loads(result.out)
    assert list(values) == JSON_KEYS
    assert values["text"] == generate(*load(folder), QUESTION, max_tokens=8)
    assert (values["model"], values["finish_reason"], values["seed"]) == (str(folder), "length", 7)
    assert values["generated_tokens"] == 8
    assert values["prompt_tokens"] > 8
    assert all(values[key] > 0 for key in JSON_KEYS if key.endswith(("_s", "_bytes")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --prompt"),
        (["--prompt", "a", "--prompt-file", "b"], "give either --prompt"),
        (["--prompt", "a", "--max-token", "5"], "--max-tokens"),
        (["--prompt", "a", "--temperatur", "5"], "no such option"),
        (["--prompt", "a", "--temp", "warm"], "'warm' is not a valid float"),
        (["--prompt", "a", "--temp", "-1"], "temperature is -1.0, expected a finite number of at least 0"),
        (["--prompt", "a", "--temp", "nan"], "temperature is nan"),
        (["--prompt", "a", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0"),
        (["--prompt", "a", "--top-k", "-1"], "top_k is -1"),
        (["--prompt", "a", "--min-p", "-0.5"], "min_p is -0.5"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1"),
        (["--prompt", "a", "--seed", "99999999999999999999"], "seed is 99999999999999999999"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["--prompt", "a", "--penalty-window", "0"], "penalty_window is 0"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens is 0, expected a whole number of at least 1"),
        (["--prompt", "a", "--max-tokens", "-5"], "max_tokens is -5"),
        (["--prompt", "a", "--stop", ""], "stop holds ''"),
        (["--prompt", "a", "--dtype", "int8"], "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        (["--prompt", "a", "--dtype", "bfloat16"], "float32 only"),
        (["--prompt", "a", "--revision", "main"], "is a local folder"),
        (["--prompt", "a", "--subfolder", "4bit"], "4bit"),
        (["--prompt", "a", "--raw", "--system", "b"], "system was given with"),
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", os.fsdecode(b"caf\xe9")], "lone surrogate"),
        (["--prompt", "word " * 3000], "tokens, expected fewer than 2,048"),
        (["--prompt-file", "."], "cannot be read"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: cannot be read (No such file"),
        (["--prompt", "a", "--tools", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--prompt", "a", "--tools", "."], "cannot be read"),
    ],
)
def test_a_wrong_option_ends_in_one_clear_line(folder: Path, flags: list[str], message: str) -> None:
    assert message.lower() in refused(answer(folder, *flags)).lower()


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (b"", "prompt is empty"),
        (b"caf\xe9", "standard input: byte 0xe9 at offset 3 is not UTF-8"),
        (b"\xff\xfe", "0xff"),
    ],
)
def test_standard_input_that_is_no_prompt_is_refused(folder: Path, stdin: bytes, message: str) -> None:
    assert message in refused(answer(folder, "--prompt", "-", stdin=stdin))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[", "is not JSON"),
        (b"", "is not JSON"),
        (b"{}", "expected a JSON list of tools"),
        (b"[5]", "expected a JSON list of tools"),
        (b'"get_weather"', "expected a JSON list of tools"),
        (b"[\xff]", "not UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON"),
        (b'[{"name": "\\ud800"}]', "lone surrogate"),
    ],
)
def test_a_tools_file_that_is_no_list_of_tools_is_refused(
    folder: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "tools.json"
    file.write_bytes(content)
    assert message in refused(answer(folder, "--prompt", "a", "--tools", str(file)))


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def misshape(folder: Path) -> None:
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    tensors["model.embedding_norm.weight"] = mx.zeros((5,))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def rename_type(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "llama"}))


DAMAGES = {
    "config.json": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "neither tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "model.safetensors": truncate,
    "model.embedding_norm.weight is (5,), expected (32,)": misshape,
    "model_type is 'llama', which is not supported, expected lfm2 or lfm2_moe": rename_type,
    "cannot be read as JSON": lambda folder: (folder / "config.json").write_text("{"),
    "is not a readable tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "expected a jinja chat template": lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_checkpoint_ends_in_one_clear_line(tmp_path: Path, message: str) -> None:
    folder = write_chat_checkpoint(tmp_path / "model")
    assert answer(folder, "--prompt", "a").code == 0
    DAMAGES[message](folder)
    assert message in refused(answer(folder, "--prompt", "a"))


@pytest.mark.parametrize("name", ["nowhere", "", "./nowhere/at/all", "a/b/../c"])
def test_a_model_that_does_not_exist_is_refused(name: str) -> None:
    refused(lfm_mlx("generate", "--model", name, "--offline", "--prompt", "a"))


def test_options_are_checked_before_the_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    monkeypatch.setattr(cli, "load", lambda *arguments, **options: loads.append(arguments) or load(folder))
    for flags in (["--top-p", "2"], ["--max-tokens", "0"], ["--stop", ""]):
        refused(answer(folder, "--prompt", "a", *flags))
    assert loads == []
    assert answer(folder, "--prompt", "a").code == 0
    assert len(loads) == 1


def test_help_names_the_commands_and_version_the_version() -> None:
    shown = lfm_mlx("--help")
    assert shown.code == 0
    assert "generate" in shown.out
    assert "convert" in shown.out
    assert lfm_mlx("--version").out == f"lfm-mlx, version {__version__}\n"
    assert "--max-tokens" in lfm_mlx("generate", "--help").out
    assert "No such command" in refused(lfm_mlx("generat"))


def test_the_converter_is_imported_only_when_it_is_called() -> None:
    pytest.importorskip("lfm_mlx.convert")
    code = "import sys, lfm_mlx.cli as c; print('lfm_mlx.convert' in sys.modules); c.group.get_command(None, 'convert')"
    command = [sys.executable, "-c", code + "; print('lfm_mlx.convert' in sys.modules)"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["False", "True"]


class Terminal(io.StringIO):
    """Text that believes to be shown."""

    def isatty(self) -> bool:
        return True


def test_a_long_load_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(cli, "SHOW_LOADING_FROM_BYTES", 0)
    assert "loading" not in answer(folder, "--prompt", "a").err
    monkeypatch.setattr(cli.sys, "stderr", Terminal())
    cli._show_loading(LoadProgress(done_bytes=25_000, total_bytes=100_000, elapsed_s=1.0))
    assert "loading 25.00 kB of 100.00 kB, 3 s left" in sys.stderr.getvalue()
    cli._show_loading(LoadProgress(done_bytes=100_000, total_bytes=100_000, elapsed_s=1.0))
    assert sys.stderr.getvalue().endswith(" \r")


def test_an_interrupt_ends_the_answer_with_what_was_generated(endless_folder: Path) -> None:
    flags = ["--model", str(endless_folder), "--prompt", QUESTION, "--temp", "0", "--max-tokens", "90000"]
    with process(*flags) as running:
        assert running.stdout is not None
        begun = running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        rest, err = running.communicate(timeout=20)
    assert running.returncode == 130
    assert len(begun) == 1
    assert rest.endswith(b"\n")
    assert b"Traceback" not in err
    assert b"tokens/s" in err
    shown = (begun + rest).decode().rstrip("\n")
    whole = generate(*load(endless_folder), QUESTION, temperature=0, max_tokens=len(shown.encode()))
    assert whole.startswith(shown)


def test_an_interrupt_with_json_still_prints_the_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads(answer(folder, "--prompt", QUESTION, "--json").out)
    take = TokenStream.__next__

    def interrupted(tokens: TokenStream) -> Token:
        if len(tokens.generated_ids) == 5:
            raise KeyboardInterrupt
        return take(tokens)

    monkeypatch.setattr(TokenStream, "__next__", interrupted)
    result = answer(folder, "--prompt", QUESTION, "--json")
    values = json.loads(result.out)
    assert (result.code, result.err, result.out.count("\n")) == (130, "", 1)
    assert (values["finish_reason"], values["generated_tokens"]) == ("cancelled", 5)
    assert whole["text"].startswith(values["text"])
    assert whole["text"] != values["text"]


@pytest.mark.parametrize(
    ("raised", "code", "message"), [(KeyboardInterrupt, 130, "interrupted"), (MemoryError, 1, "error: out of memory")]
)
def test_what_ends_a_load_leaves_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException], code: int, message: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise raised

    monkeypatch.setattr(cli, "load", fail)
    result = answer(folder, "--prompt", "a")
    assert (result.code, result.out) == (code, "")
    assert result.err.strip().startswith(message)
    assert result.err.strip().count("\n") == 0


def test_a_reader_that_goes_away_leaves_no_traceback(endless_folder: Path) -> None:
    flags = ["--model", str(endless_folder), "--prompt", "a", "--temp", "0", "--max-tokens", "90000"]
    with process(*flags) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.read(1)
        running.stdout.close()
        err = running.stderr.read()
        assert running.wait(timeout=20) == 1
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


@pytest.mark.parametrize(("encoding", "written"), [("ascii", "utf-8"), ("latin-1", "latin-1"), ("utf-8", "utf-8")])
def test_no_encoding_of_the_terminal_stops_the_answer(folder: Path, encoding: str, written: str) -> None:
    flags = ["--model", str(folder), "--prompt", "a", "--temp", "1.5", "--seed", "1", "--max-tokens", "40"]
    with process(*flags, PYTHONIOENCODING=encoding) as running:
        out, err = running.communicate(timeout=60)
    expected = generate(*load(folder), "a", temperature=1.5, seed=1, max_tokens=40) + "\n"
    assert "\ufffd" in expected
    assert (running.returncode, out) == (0, expected.encode(written, "replace"))
    assert b"Traceback" not in err
