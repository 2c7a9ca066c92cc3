import pytest
import small_tokenizers

from lfm_mlx.constrain import GrammarTokenizer, grammar_tokenizer
from lfm_mlx.tokenizer import Tokenizer

PADDING_IDS = 21


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small BPE with LFM2's special tokens."""
    return small_tokenizers.small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Tokenizer) -> GrammarTokenizer:
    """The same for grammars, as wide as an embedding with padding rows."""
    return grammar_tokenizer(tokenizer, tokenizer.vocab_size + PADDING_IDS)
