from __future__ import annotations

import pytest
from chat_checkpoints import write_chat_checkpoint

from lfm_mlx import load
from lfm_mlx.load import Loaded


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A tiny model and its tokenizer, with a chat template; tests leave them as they are."""
    return load(write_chat_checkpoint(tmp_path_factory.mktemp("chat")))
