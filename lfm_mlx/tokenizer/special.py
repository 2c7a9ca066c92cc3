"""The special-token strings of LFM2 and LFM2.5, written once.

The strings are the same in both vocabularies (65,536 and 128,000 ids); their ids are not: ask the tokenizer for them.
"""

from typing import Final

PAD: Final = "<|pad|>"
BOS: Final = "<|startoftext|>"
END_OF_TEXT: Final = "<|endoftext|>"

TURN_START: Final = "<|im_start|>"
"""Opens a turn; the role and a newline follow."""
TURN_END: Final = "<|im_end|>"
"""Closes a turn; what the model writes last, so the usual stop token."""

THINK_START: Final = "<think>"
THINK_END: Final = "</think>"

TOOL_LIST_START: Final = "<|tool_list_start|>"
TOOL_LIST_END: Final = "<|tool_list_end|>"
TOOL_CALL_START: Final = "<|tool_call_start|>"
TOOL_CALL_END: Final = "<|tool_call_end|>"
TOOL_RESPONSE_START: Final = "<|tool_response_start|>"
TOOL_RESPONSE_END: Final = "<|tool_response_end|>"
