from pathlib import Path

import pytest

from lfm_mlx.tokenizer import Tokenizer, special

STRINGS = {name: value for name, value in vars(special).items() if name.isupper()}


@pytest.mark.parametrize("name", STRINGS)
def test_every_special_string_is_one_token_of_an_lfm2_vocabulary(name: str, json_tokenizer: Tokenizer) -> None:
    ids = json_tokenizer.encode(STRINGS[name], add_bos=False)
    assert ids == [json_tokenizer.token_id(STRINGS[name])]
    assert json_tokenizer.is_special(ids[0])
    assert len(json_tokenizer.encode(STRINGS[name][:-1], add_bos=False)) > 1


def test_special_strings_are_written_in_one_file_of_the_tokenizer_only() -> None:
    files = Path(special.__file__).parent.glob("*.py")
    text_of = {path.name: path.read_text(encoding="utf-8") for path in files}
    writers = {name for name, text in text_of.items() if f'"{special.TURN_END}"' in text or '"<think>"' in text}
    assert writers == {"special.py"}
