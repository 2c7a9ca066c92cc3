"""``python -m lfm_mlx.chat``: the same as ``lfm-mlx chat``, a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from lfm_mlx.chat import AnswerOptions, Chat, FunctionTool
from lfm_mlx.cli import (
    generation_options,
    is_parallel,
    load_model,
    loading_options,
    model_option,
    read_standard_input,
    read_text,
)
from lfm_mlx.errors import OptionError
from lfm_mlx.generate import check_options
from lfm_mlx.generate.generation import with_overrides
from lfm_mlx.load import Loaded
from lfm_mlx.shell import (
    Commands,
    Interrupts,
    Rendering,
    Shell,
    answer_all,
    ask,
    call_text,
    has_styles,
    is_dumb,
    make_console,
    make_keyboard,
    read_tools,
    set_system,
)
from lfm_mlx.terminal import run
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.types import ToolCall


@click.command(name="chat")
@model_option
@click.option("--system", help="System message.")
@click.option("--tools", type=click.Path(path_type=Path), help="Python file whose functions the model may call.")
@click.option("--file", type=click.Path(path_type=Path), help="File whose text is the first message.")
@click.option("--load", "saved", type=click.Path(path_type=Path), help="Go on from a conversation that /save wrote.")
@generation_options
@click.option("--thinking-budget", type=int, help="Most tokens of reasoning in an answer; 0 is none.")
@click.option("--no-loop-guard", is_flag=True, help="Let an answer go round in circles.")
@click.option("--no-color", is_flag=True, help="No escape codes in answers; so too with NO_COLOR or TERM=dumb.")
@loading_options
def command(
    model: str,
    system: str | None,
    tools: Path | None,
    file: Path | None,
    saved: Path | None,
    generation: dict[str, Any],
    thinking_budget: int | None,
    no_loop_guard: bool,
    no_color: bool,
    loading: dict[str, Any],
) -> int:
    """Talk to a model; /help shows what can be typed.

    Text that is piped in is one message. The answer then goes to standard output, reasoning and tool calls to standard
    error.
    """
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    is_interactive = is_terminal or is_parallel(loading)  # mlx.launch hands on lines that are typed, and no terminal.
    interrupts = Interrupts()
    sampling = dict(generation)
    options: dict[str, Any] = {
        "max_tokens": sampling.pop("max_tokens", None),
        "thinking_budget": thinking_budget,
        "guards_loops": not no_loop_guard,
    }
    AnswerOptions(**options)  # Loading may take a minute.
    check_options(**sampling)
    functions = read_tools(tools, interrupts) if tools is not None else []
    if saved is not None and not saved.is_file():
        raise OptionError(f"{saved}: is no file, expected one that /save wrote")
    messages = _messages(file, is_piped=not is_interactive)
    loaded = load_model(model, **loading)
    rendering = _rendering(loaded.tokenizer, is_interactive=is_interactive, is_styled=has_styles(no_color=no_color))

    def confirm(call: ToolCall) -> bool:
        if is_interactive:
            return ask(f"run {call_text(call)}?", rendering, interrupts)
        rendering.note("it changes something, and there is nobody to ask")
        return False

    chat = Chat(
        *loaded,
        tools=functions,
        confirm=confirm,
        sampling=with_overrides(loaded.model.sampling, sampling),
        **options,
    )
    shell = Shell(chat, rendering, interrupts)
    if saved is not None:
        shell.commands.load(str(saved))
    if system is not None:
        set_system(chat, system)
    if not is_interactive:
        return answer_all(chat, messages, rendering, interrupts)
    rendering.note(_greeting(model, loaded, functions))
    for message in messages:
        shell.say(message)
    keyboard = make_keyboard(Commands.words(), is_dumb=is_dumb() or not is_terminal)
    return shell.run(keyboard, ends_at_interrupt=is_parallel(loading))  # mlx.launch hands nothing on any more.


def _messages(file: Path | None, *, is_piped: bool) -> list[str]:
    """What there is to say before anybody types: a file's text, and standard input's."""
    texts = [read_text(file)] if file is not None else []
    if is_piped:
        texts.append(read_standard_input())
    messages = [text.strip() for text in texts if text.strip()]
    if not messages and texts:
        source = "standard input" if file is None else str(file)
        raise OptionError(f"{source} is empty, expected the text of a message")
    return messages


def _rendering(tokenizer: Tokenizer, *, is_interactive: bool, is_styled: bool) -> Rendering:
    answers = make_console(is_styled=is_styled)
    notes = answers if is_interactive else make_console(is_styled=is_styled, is_error=True)
    return Rendering(answers, notes, count_tokens=lambda text: len(tokenizer.encode(text, add_bos=False)))


def _greeting(model: str, loaded: Loaded, functions: list[FunctionTool]) -> str:
    tools = f", {len(functions)} tool{'s' * (len(functions) > 1)}" if functions else ""
    return f"{model}: context {loaded.model.max_context:,} tokens{tools}; /help shows what can be typed"


if __name__ == "__main__":
    run(command, "python -m lfm_mlx.chat")
