"""Whether a checkpoint's tokenizer and template can do what tool calling needs."""

from lfm_mlx.errors import TemplateError
from lfm_mlx.tokenizer import special
from lfm_mlx.tokenizer.tokenizer import Tokenizer

PUBLISHED_VOCAB_SIZE = 65_536
"""Published models have at least so many ids; smaller ones are made up and may lack the markers."""

_MARKERS = (
    special.TURN_START,
    special.TURN_END,
    special.TOOL_CALL_START,
    special.TOOL_CALL_END,
)
_NAME = "look_up_the_moon"
_TOOL = {"name": _NAME, "description": "Says where it is.", "parameters": {"type": "object", "properties": {}}}
_MESSAGES = [{"role": "user", "content": "Where is it?"}]


def tool_problems(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """What keeps this tokenizer and its template from working with tools, a sentence each.

    The tokenizer of LFM2.5-8B-A1B was replaced after its release, because tool calls went wrong with the first one: a
    marker that is not one token of its own, or not marked as special, cannot be found in what the model writes.

    Args:
        tokenizer: the checkpoint's.
        vocab_size: of the model.
    """
    problems = []
    if vocab_size >= PUBLISHED_VOCAB_SIZE:
        broken = [marker for marker in _MARKERS if not _is_whole(tokenizer, marker)]
        if broken:
            problems.append(
                f"the tokenizer does not know {', '.join(broken)} as special tokens of their own, so tool calls go "
                "wrong: it is outdated (that of LFM2.5-8B-A1B was replaced after its release); fetch tokenizer.json "
                "and tokenizer_config.json again"
            )
    if tokenizer.has_template and not _shows_tools(tokenizer):
        problems.append(
            "the chat template does not show tools to the model, so it cannot call any; take the chat_template.jinja "
            "of the original repository"
        )
    return problems


def _is_whole(tokenizer: Tokenizer, marker: str) -> bool:
    token_id = tokenizer.token_id(marker)
    return (
        token_id is not None
        and tokenizer.is_special(token_id)
        and tokenizer.encode(marker, add_bos=False) == [token_id]
    )


def _shows_tools(tokenizer: Tokenizer) -> bool:
    try:
        return _NAME in tokenizer.render(_MESSAGES, tools=[_TOOL])
    except TemplateError:
        return False
