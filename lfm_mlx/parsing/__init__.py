"""What generated text means."""

from lfm_mlx.parsing.stop_strings import StopStrings

__all__ = ["StopStrings"]
