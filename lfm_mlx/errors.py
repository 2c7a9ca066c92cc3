"""Every exception that lfm_mlx raises on purpose.

::

    LfmError
    ├── ConfigError           config.json holds a value that cannot be used
    ├── CheckpointError       a weight, tokenizer or template file is missing, damaged or does not fit
    ├── DownloadError         a repository could not be fetched
    ├── TemplateError         messages or tools cannot be rendered by the chat template
    ├── OptionError           a parameter of a call has a wrong type or value (also a ValueError)
    ├── ContextLengthError    prompt and answer do not fit into the context
    ├── MemoryPlanError       the machine does not have the bytes that were asked for
    ├── QueueFullError        too many requests wait for the engine already
    ├── EngineClosedError     the engine takes no more requests
    ├── RankError             a process of a distributed run is gone, or is not like the others
    └── ConversionError       a checkpoint cannot be converted or written

Each message says what was found, what was expected, and what to do.
"""


class LfmError(Exception):
    """Base class of every error raised on purpose by lfm_mlx."""


class ConfigError(LfmError):
    """A value in config.json cannot be used: the message names key, value and expectation."""


class CheckpointError(LfmError):
    """A checkpoint file is missing, damaged, or does not fit the config."""


class DownloadError(LfmError):
    """A repository could not be fetched from the hub."""


class TemplateError(LfmError):
    """The chat template cannot render the given messages or tools."""


class OptionError(LfmError, ValueError):
    """A parameter has a value that is refused; the message names the parameter."""


class ContextLengthError(LfmError):
    """Prompt and answer do not fit into the model's context."""


class MemoryPlanError(LfmError):
    """What was asked for needs more bytes than the machine has."""


class QueueFullError(LfmError):
    """Too many requests wait already.

    Attributes:
        retry_after_s: seconds after which a place is likely to be free.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineClosedError(LfmError):
    """The engine was closed and takes no more requests."""


class RankError(LfmError):
    """A process of a distributed run is gone, does not answer, or has another version, checkpoint or option."""


class ConversionError(LfmError):
    """A checkpoint cannot be converted or written."""
