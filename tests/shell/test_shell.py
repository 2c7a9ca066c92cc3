"""The terminal chat as a user meets it: a process in a pseudo-terminal, and one with pipes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pexpect
import pytest

from lfm_mlx import Chat, Reply, load
from lfm_mlx.chat.__main__ import command
from lfm_mlx.terminal import run

TINY = Path(__file__).parents[2] / "examples" / "tiny"
QUESTION = "What is the capital of France?"
WEATHER_QUESTION = "What's the weather in Paris?"

READY, SENT = "\x1b[?2004h", "\x1b[?2004l"
"""What the line editor writes when it begins to read, and when it has a message."""

WEATHER = '''
def get_weather(city: str) -> dict:
    """Tell the current weather of a city.

    Args:
        city: the city
    """
    print("printed by the tool")
    return {"temperature": 21, "condition": "sunny"}
'''
SLOW_WEATHER = '''
import os, time
from lfm_mlx import tool

@tool(changes=True)
def get_weather(city: str) -> dict:
    """Tell the current weather of a city.

    Args:
        city: the city
    """
    if not os.path.exists("asked"):
        open("asked", "w").close()
        print("this will take an hour")
        time.sleep(3600)
    return {"temperature": 21, "condition": "sunny"}
'''

pytestmark = pytest.mark.skipif(
    not (TINY / "model.safetensors").exists(), reason="examples/tiny/model.safetensors is not there yet"
)


class Terminal:
    """A chat in a pseudo-terminal; what it remembers of messages goes to `folder`."""

    def __init__(self, folder: Path, *arguments: str, model: Path = TINY, **environment: str) -> None:
        self._environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        self._environment |= {"TERM": "xterm-256color", "XDG_STATE_HOME": str(folder / "state"), **environment}
        self.ready, self.sent = (READY, SENT) if self._environment["TERM"] != "dumb" else ("\n> ", "\r\n")
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "lfm_mlx.chat", "--model", str(model), *arguments],
            env=self._environment,  # type: ignore[arg-type]
            encoding="utf-8",
            timeout=60,
            dimensions=(24, 200),
            cwd=folder,
        )
        self.child.delaybeforesend = None
        self.greeting = self.wait(self.ready)

    def wait(self, text: str) -> str:
        """What comes before `text`."""
        self.child.expect_exact(text)
        return str(self.child.before).replace("\r\n", "\n")

    def send(self, keys: str) -> None:
        """Type a message, and Enter."""
        self.child.send(keys + "\r")
        self.wait(self.sent)

    def say(self, keys: str) -> str:
        """Type a message or a command; returns all that is written until the next one can be typed."""
        self.send(keys)
        return self.wait(self.ready)

    def messages(self, folder: Path) -> list[dict[str, str]]:
        """The conversation, as /save writes it."""
        self.say(f"/save {folder / 'saved.json'}")
        found: list[dict[str, str]] = json.loads((folder / "saved.json").read_text())["messages"]
        return found

    def leave(self) -> int | None:
        """Ctrl-D; returns the exit code."""
        self.child.sendeof()
        self.child.expect(pexpect.EOF)
        self.child.close()
        code: int | None = self.child.exitstatus
        return code


@pytest.fixture(scope="module")
def expected() -> Reply:
    """What the model answers to QUESTION."""
    return Chat(*load(TINY)).send(QUESTION)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """A chat that several tests use, one after the other."""
    terminal = Terminal(tmp_path_factory.mktemp("state"))
    yield terminal
    terminal.child.close(force=True)


@pytest.fixture
def terminal(chatting: Terminal) -> Terminal:
    """The chat, at the beginning of a conversation."""
    assert "a new conversation" in chatting.say("/reset")
    return chatting


def unstyled(text: str) -> str:
    """Text without the codes around dimmed and red letters."""
    return text.replace("\x1b[2m", "").replace("\x1b[31m", "").replace("\x1b[0m", "")


def test_it_greets_with_one_line_and_answers_with_dimmed_reasoning(tmp_path: Path, expected: Reply) -> None:
    terminal = Terminal(tmp_path)
    assert f"{TINY}: context 4,096 tokens; /help" in terminal.greeting
    assert terminal.greeting.count("\n") == 1
    shown = terminal.say(QUESTION)
    assert expected.reasoning
    assert unstyled(shown) == f"{expected.reasoning}\n{expected.content}\n\n"
    reasoning, content = shown.split("\n")[:2]
    assert reasoning.startswith("\x1b[2m")
    assert "\x1b" not in content
    assert terminal.leave() == 0
    assert f"+{QUESTION}" in (tmp_path / "state" / "lfm_mlx" / "history").read_text()


def test_reasoning_can_be_folded_shown_again_and_turned_off(terminal: Terminal, expected: Reply) -> None:
    assert expected.reasoning
    terminal.say("/think fold")
    lines = unstyled(terminal.say(QUESTION)).splitlines()
    assert lines[0].startswith("thinking ... thought for ")
    assert lines[0].endswith(" tokens")
    assert lines[1] == expected.content
    assert expected.reasoning in terminal.say("/think show")
    assert "at most 3 tokens" in terminal.say("/think 3")
    assert "expected on, off, fold" in terminal.say("/think hard")
    terminal.say("/think off")
    terminal.say("/reset")
    assert "\x1b[2m" not in terminal.say(QUESTION)
    assert "without limit, shown" in terminal.say("/think on")


def test_regen_writes_the_last_answer_anew(terminal: Terminal, tmp_path: Path) -> None:
    assert "there is no message" in terminal.say("/regen")
    terminal.say(QUESTION)
    assert "The capital of France is" in terminal.say("/regen")
    assert [message["role"] for message in terminal.messages(tmp_path)] == ["user", "assistant"]


def test_stats_tell_tokens_speed_context_and_memory(terminal: Terminal) -> None:
    terminal.say(QUESTION)
    lines = unstyled(terminal.say("/stats")).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "last turn",
        lines[1].partition(": ")[0],
        "context",
        "memory",
    ]
    for part in ("prompt ", "cached", "reasoning", "tokens/s"):
        assert part in lines[0]
    assert "of 4,096 tokens" in lines[2]
    assert lines[3].endswith("B at most")


@pytest.mark.parametrize(
    "keys", ["one\x1b\rtwo", "one\\\rtwo", "\x1b[200~one\rtwo\x1b[201~"], ids=["alt", "\\", "paste"]
)
def test_a_message_may_have_several_lines(terminal: Terminal, tmp_path: Path, keys: str) -> None:
    terminal.say(keys)
    assert terminal.messages(tmp_path)[0] == {"role": "user", "content": "one\ntwo"}


def test_a_wrong_command_names_the_nearest_and_a_path_is_no_command(terminal: Terminal, tmp_path: Path) -> None:
    assert "unknown command /stat; did you mean /stats?" in terminal.say("/stat")
    assert "/regen" in terminal.say("/help")
    assert "unknown command" not in terminal.say("/usr/bin is what?")
    terminal.say(" /stat")
    sent = [message["content"] for message in terminal.messages(tmp_path) if message["role"] == "user"]
    assert sent == ["/usr/bin is what?", "/stat"]


def test_tab_completes_and_ctrl_c_clears_the_line(terminal: Terminal, tmp_path: Path) -> None:
    terminal.child.send("never sent")
    terminal.child.sendintr()
    assert "no system message" in terminal.say("/sys\t")
    terminal.child.sendintr()
    assert "Ctrl-D or /quit leaves" in terminal.wait(terminal.ready)
    assert terminal.messages(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/load nowhere.json", "nowhere.json: cannot be read"),
        ("/load", "expected /load FILE"),
        ("/save /", "is a folder"),
        ("/save state/lfm_mlx/history/x", "cannot be written"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(terminal: Terminal, line: str, message: str) -> None:
    shown = terminal.say(line)
    assert message in shown
    assert shown.count("\n") == 1


def test_a_turn_that_does_not_fit_is_one_line_and_the_conversation_stays(terminal: Terminal, tmp_path: Path) -> None:
    terminal.say(QUESTION)
    before = terminal.messages(tmp_path)
    (tmp_path / "long.json").write_text(
        json.dumps(
            {
                "format": "lfm_mlx chat 1",
                "messages": [{"role": "user", "content": "word " * 5000}, {"role": "assistant", "content": "Yes."}],
            }
        )
    )
    terminal.say(f"/load {tmp_path / 'long.json'}")
    for line in ("And now?", "/regen"):
        shown = terminal.say(line)
        assert "error: " in shown
        assert shown.count("\n") == 1
    assert len(terminal.messages(tmp_path)) == 2
    terminal.say("/reset")
    terminal.say(QUESTION)
    assert terminal.messages(tmp_path) == before


def test_a_tool_call_is_shown_and_its_result_is_used(tmp_path: Path) -> None:
    (tmp_path / "weather.py").write_text(WEATHER)
    terminal = Terminal(tmp_path, "--tools", "weather.py")
    assert "1 tool;" in terminal.greeting
    assert "get_weather(city)  Tell the current weather" in terminal.say("/tools")
    shown = unstyled(terminal.say(WEATHER_QUESTION))
    called, result = '-> get_weather(city="Paris")\n', '<- {"temperature": 21, "condition": "sunny"}\n'
    assert shown.index(called) < shown.index("printed by the tool\n") < shown.index(result)
    assert "21" in shown.partition(result)[2]
    assert terminal.leave() == 0


def test_a_tool_that_changes_something_is_asked_for_and_ctrl_c_stops_it(tmp_path: Path) -> None:
    (tmp_path / "weather.py").write_text(SLOW_WEATHER)
    terminal = Terminal(tmp_path, "--tools", "weather.py")
    question = 'run get_weather(city="Paris")? [y/N] '
    terminal.send(WEATHER_QUESTION)
    terminal.wait(question)
    terminal.child.send("n\r")
    assert "<- The user declined this call." in terminal.wait(READY)
    terminal.say("/reset")
    terminal.send(WEATHER_QUESTION)
    terminal.wait(question)
    terminal.child.send("y\r")
    terminal.wait("this will take an hour")
    terminal.child.sendintr()
    stopped = terminal.wait(READY)
    assert "stopped by the user" in stopped
    assert "[stopped]" in stopped
    terminal.say("/reset")
    terminal.send(WEATHER_QUESTION)
    terminal.wait(question)
    terminal.child.sendintr()
    assert "[stopped]" in terminal.wait(READY)
    terminal.say("/reset")
    terminal.send(WEATHER_QUESTION)
    terminal.wait(question)
    terminal.child.send("y\r")
    assert "21" in terminal.wait(READY).partition("sunny")[2]
    assert terminal.leave() == 0


@pytest.fixture(scope="module")
def endless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without the tokens that end an answer."""
    folder = tmp_path_factory.mktemp("endless")
    for file in TINY.glob("*.j*"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = mx.load(str(TINY / "model.safetensors"))
    assert isinstance(tensors, dict)
    tensors["model.embed_tokens.weight"][mx.array(sorted(load(TINY).tokenizer.stop_ids))] = 0.0
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    return folder


def test_ctrl_c_stops_the_answer_keeps_what_was_written_and_the_next_question_works(
    tmp_path: Path, endless_folder: Path
) -> None:
    terminal = Terminal(tmp_path, "--no-loop-guard", model=endless_folder)
    for question, begin in (("Tell me a story.", "Once"), (QUESTION, "The capital")):
        terminal.send(question)
        terminal.wait(begin)
        terminal.child.sendintr()
        assert "[stopped]" in terminal.wait(READY)
    messages = terminal.messages(tmp_path)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[1]["content"].startswith("Once")
    assert messages[3]["content"].startswith("The capital")
    assert terminal.leave() == 0


def test_a_saved_conversation_is_resumed_by_another_process_without_one_escape_code(
    tmp_path: Path, expected: Reply
) -> None:
    terminal = Terminal(tmp_path, "--system", "Be brief.", NO_COLOR="1")
    shown = terminal.say(QUESTION)
    assert shown.startswith("thinking: ")
    assert "\x1b" not in shown
    messages = terminal.messages(tmp_path)
    assert terminal.leave() == 0
    resumed = Terminal(tmp_path, "--load", "saved.json", TERM="dumb")
    assert "saved.json: 3 messages" in resumed.greeting
    assert f"user: {QUESTION}" in resumed.greeting
    (tmp_path / "saved.json").unlink()
    assert resumed.messages(tmp_path) == messages
    resumed.send("And of \\")
    resumed.say("Spain?")
    later = resumed.messages(tmp_path)
    assert later[:3] == messages
    assert later[3] == {"role": "user", "content": "And of \nSpain?"}
    assert "saved.json: 5 messages" in resumed.say("/load saved.json")
    resumed.child.sendintr()
    assert "Ctrl-D or /quit leaves" in resumed.wait("\n> ")
    assert resumed.leave() == 0
    assert "\x1b" not in resumed.greeting


class Result:
    """What a program left behind."""

    def __init__(self, *arguments: str, stdin: bytes = b"") -> None:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", ["chat", "--model", str(TINY), *arguments])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            with pytest.raises(SystemExit) as ended:
                run(command, "chat")
        self.code = ended.value.code
        self.out, self.err = (
            stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
            for stream in (out, err)
            if stream.flush() is None
        )


def test_piped_text_is_one_message_and_only_its_answer_goes_to_standard_output(expected: Reply, tmp_path: Path) -> None:
    result = Result(stdin=f"\n{QUESTION}\n".encode())
    assert (result.code, result.out) == (0, f"{expected.content}\n")
    assert result.err == f"thinking: {expected.reasoning}\n"
    (tmp_path / "question.txt").write_text(QUESTION)
    assert Result("--file", str(tmp_path / "question.txt")).out == result.out


def test_calls_of_a_piped_message_go_to_standard_error_and_nobody_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "weather.py"
    file.write_text(WEATHER)
    result = Result("--tools", str(file), stdin=WEATHER_QUESTION.encode())
    assert result.code == 0
    assert "21" in result.out
    assert "printed by the tool" not in result.out
    assert '-> get_weather(city="Paris")\nprinted by the tool\n<- {' in result.err
    file.write_text(SLOW_WEATHER)
    assert "The user declined this call." in Result("--tools", str(file), stdin=WEATHER_QUESTION.encode()).err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "standard input is empty"),
        (["--file", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--load", "nowhere.json"], "nowhere.json: is no file"),
        (["--tools", "nowhere.py"], "nowhere.py: is no file"),
        (["--thinking-budget", "-1"], "thinking_budget is -1"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--temp", "-1"], "temperature is -1"),
        (["--max-context", "9999"], "max_context is 9999"),
    ],
)
def test_a_wrong_option_ends_in_one_clear_line(flags: list[str], message: str) -> None:
    result = Result(*flags, stdin=QUESTION.encode() if flags else b" \n")
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_an_interrupt_ends_a_piped_answer_with_what_was_written(endless_folder: Path) -> None:
    arguments = [sys.executable, "-m", "lfm_mlx.chat", "--model", str(endless_folder), "--no-loop-guard"]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(b"Tell me a story.")
        running.stdin.close()
        begun = running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        rest, err = running.stdout.read(), running.stderr.read() if running.stderr else b""
        assert running.wait(timeout=60) == 130
    assert (begun + rest).startswith(b"O")
    assert rest.endswith(b"\n")
    assert b"[stopped]" in err
    assert b"Traceback" not in err
