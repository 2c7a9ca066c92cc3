"""The functions of a Python file as tools."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lfm_mlx.chat import FunctionTool
from lfm_mlx.errors import OptionError
from lfm_mlx.shell.interrupts import Interrupts

MODULE = "lfm_mlx_tool_file"
"""What a file of tools is imported as, whatever it is called: `json.py` must not stand in for json."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoppableTool(FunctionTool):
    """A tool that Ctrl-C stops; what it prints goes to standard error, which is not the answer."""

    interrupts: Interrupts

    def call(self, arguments: Mapping[str, Any]) -> str:
        """As `FunctionTool.call`. Raises InterruptedError if the user stopped it."""
        try:
            with self.interrupts.breaking(), contextlib.redirect_stdout(sys.stderr):
                return super().call(arguments)
        except KeyboardInterrupt:
            raise InterruptedError("stopped by the user") from None
        except SystemExit as error:
            raise RuntimeError(f"it tried to end the program with {error.code!r}") from None


def read_tools(path: Path, interrupts: Interrupts) -> list[FunctionTool]:
    """The functions that a file defines, those with a leading underscore and imported ones left out.

    Args:
        path: a Python file; it is run, and may import files beside it.
        interrupts: stops a tool that is being run.

    Raises:
        OptionError: the file cannot be imported, defines no function, or one that cannot be a tool.
    """
    found: dict[int, FunctionTool] = {}
    for name, value in vars(_import(path)).items():
        function = value.function if isinstance(value, FunctionTool) else value
        is_own = inspect.isfunction(function) and function.__module__ == MODULE
        if is_own and not name.startswith("_"):
            found.setdefault(id(function), _as_stoppable(value, path, interrupts))
    if not found:
        raise OptionError(
            f"{path}: defines no function, expected one for each tool; names with _ in front are left out"
        )
    return list(found.values())


def _as_stoppable(value: Any, path: Path, interrupts: Interrupts) -> StoppableTool:
    try:
        tool = value if isinstance(value, FunctionTool) else FunctionTool.from_function(value)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error
    return StoppableTool(**vars(tool), interrupts=interrupts)


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise OptionError(f"{path}: is no file, expected a Python file that defines functions")
    spec = importlib.util.spec_from_loader(MODULE, loader=None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[MODULE] = module  # Type hints that are strings are looked up there.
    sys.path.append(str(path.resolve().parent))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        text = str(error).partition("\n")[0]
        raise OptionError(f"{path}: cannot be imported ({type(error).__name__}: {text}); correct the file") from error
    return module
