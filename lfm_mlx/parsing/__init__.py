"""What generated text means."""

from lfm_mlx.parsing.output import OutputStream, ParsedOutput, RawStream, collect, merged, parse_output
from lfm_mlx.parsing.render import render_calls
from lfm_mlx.parsing.schemas import tool_schemas
from lfm_mlx.parsing.stop_strings import StopStrings

__all__ = [
    "OutputStream",
    "ParsedOutput",
    "RawStream",
    "StopStrings",
    "collect",
    "merged",
    "parse_output",
    "render_calls",
    "tool_schemas",
]
