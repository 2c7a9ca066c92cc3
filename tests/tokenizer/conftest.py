from pathlib import Path

import lfm_templates
import pytest
import sentencepiece
import tiny_tokenizers
import tokenizers

from lfm_mlx.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def json_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    return tiny_tokenizers.write_json_tokenizer(folder, template=lfm_templates.LFM2)


@pytest.fixture(scope="session")
def json_tokenizer(json_folder: Path) -> Tokenizer:
    return load_tokenizer(json_folder)


@pytest.fixture(scope="session")
def json_backend(json_folder: Path) -> tokenizers.Tokenizer:
    """The oracle for byte-level BPE."""
    return tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizers.write_sentencepiece_tokenizer(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_folder: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_folder)


@pytest.fixture(scope="session")
def sentencepiece_backend(sentencepiece_folder: Path) -> sentencepiece.SentencePieceProcessor:
    """The oracle for sentencepiece."""
    return sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
