import random
import time

import pytest
import sentencepiece
import tiny_tokenizers
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfm_mlx.errors import OptionError
from lfm_mlx.tokenizer import StreamingDetokenizer, Tokenizer, load_tokenizer, special

# The fixtures are read only, so one value may serve all examples.
many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

TEXT = st.text(
    st.one_of(st.sampled_from("aé日🙂\u200d👩🇯🇵 \n▁\x00\ufffd'<|>"), st.characters(exclude_categories=["Cs"])),
    max_size=40,
)


def stream(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = False) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special=skip_special)
    return [detokenizer.add(token_id) for token_id in ids] + [detokenizer.finish()]


def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """byte -> id of the token that stands for this byte alone."""
    ids = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    is_byte_piece = {i: tokenizer.token_id(f"<0x{tokenizer.token_bytes(i)[0]:02X}>") == i for i in ids}
    return {tokenizer.token_bytes(i)[0]: i for i in sorted(ids, key=is_byte_piece.__getitem__)}


@pytest.fixture(params=["json", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(f"{request.param}_tokenizer")


@many
@given(data=st.data())
def test_streamed_text_of_random_ids_is_what_tokenizers_decodes(
    data: st.DataObject, json_tokenizer: Tokenizer, json_backend: tokenizers.Tokenizer
) -> None:
    ids = data.draw(st.lists(st.integers(0, json_tokenizer.vocab_size - 1), max_size=60))
    skip_special = data.draw(st.booleans())
    expected = json_backend.decode(ids, skip_special_tokens=skip_special)
    assert "".join(stream(json_tokenizer, ids, skip_special=skip_special)) == expected
    assert json_tokenizer.decode(ids, skip_special=skip_special) == expected


@many
@given(data=st.binary(max_size=40), marker_at=st.integers(0, 40))
def test_streamed_text_of_random_bytes_is_what_tokenizers_decodes(
    data: bytes, marker_at: int, json_tokenizer: Tokenizer, json_backend: tokenizers.Tokenizer
) -> None:
    id_of = byte_ids(json_tokenizer)
    ids = [id_of[byte] for byte in data]
    ids[marker_at:marker_at] = [json_tokenizer.token_id(special.TURN_END)]
    assert "".join(stream(json_tokenizer, ids)) == json_backend.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["ill-formed", "cut", "surrogate", "overlong", "too high", "restart", "added token"])
def test_broken_bytes_become_as_many_replacement_characters_as_tokenizers_writes(
    name: str, json_tokenizer: Tokenizer, json_backend: tokenizers.Tokenizer
) -> None:
    data = {
        "ill-formed": b"a\xff\xfeb", "cut": b"\xf0\x9f\x99", "surrogate": b"\xed\xa0\x80", "overlong": b"\xc0\xaf",
        "too high": b"\xf4\x90\x80\x80", "restart": b"\xe3\x81\xe3\x81\x82", "added token": b"\xc3",
    }[name]  # fmt: skip
    ids = [byte_ids(json_tokenizer)[byte] for byte in data]
    ids += [json_tokenizer.token_id(token) for token in ("日本 café", "éÃ")] if name == "added token" else []
    text = json_tokenizer.decode(ids)
    assert text == "".join(stream(json_tokenizer, ids)) == json_backend.decode(ids, skip_special_tokens=False)
    assert "\ufffd" in text
    assert text != data.decode("utf-8", errors="ignore")


@many
@given(data=st.data())
def test_streamed_text_of_random_pieces_is_what_sentencepiece_decodes(
    data: st.DataObject,
    sentencepiece_tokenizer: Tokenizer,
    sentencepiece_backend: sentencepiece.SentencePieceProcessor,
) -> None:
    pieces = [i for i in range(sentencepiece_backend.piece_size()) if not sentencepiece_tokenizer.is_special(i)]
    ids = data.draw(st.lists(st.sampled_from(pieces), max_size=60))
    expected = sentencepiece_backend.decode(ids)
    assert "".join(stream(sentencepiece_tokenizer, ids)) == expected
    assert sentencepiece_tokenizer.decode(ids) == expected


@pytest.mark.parametrize("remove_extra_whitespaces", [True, False])
@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_opening_spaces_are_dropped_as_sentencepiece_drops_them(
    add_dummy_prefix: bool, remove_extra_whitespaces: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny_tokenizers.write_sentencepiece_tokenizer(
        tmp_path_factory.mktemp("spaces"),
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
    )
    tokenizer = load_tokenizer(folder)
    backend = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    space, word = tokenizer.token_id("▁"), tokenizer.encode("the", add_bos=False)
    byte_space = tokenizer.token_id("<0x20>")
    kept = set()
    for ids in ([space], [space, space], [space, *word], [space, space, *word], [byte_space, space], [*word, space]):
        assert "".join(stream(tokenizer, ids)) == backend.decode(ids)
        kept.add(backend.decode(ids))
    assert len(kept) > 2


@many
@given(data=st.binary(max_size=30))
def test_broken_bytes_become_as_many_replacement_characters_as_sentencepiece_writes(
    data: bytes, sentencepiece_tokenizer: Tokenizer, sentencepiece_backend: sentencepiece.SentencePieceProcessor
) -> None:
    ids = [sentencepiece_tokenizer.token_id(f"<0x{byte:02X}>") for byte in data]
    assert "".join(stream(sentencepiece_tokenizer, ids)) == sentencepiece_backend.decode(ids)


def test_sentencepiece_replaces_each_byte_of_a_cut_character_and_byte_level_the_whole(
    json_tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer
) -> None:
    """The control of the two tests above: the two rules differ."""
    cut = b"\xf0\x9f\x99"
    assert json_tokenizer.decode([byte_ids(json_tokenizer)[byte] for byte in cut]) == "\ufffd"
    assert sentencepiece_tokenizer.decode([byte_ids(sentencepiece_tokenizer)[byte] for byte in cut]) == "\ufffd" * 3


@many
@given(text=TEXT)
def test_any_text_survives_encoding_and_streaming(text: str, tokenizer: Tokenizer) -> None:
    expected = text if tokenizer.token_id("▁") is None else text.replace("▁", " ")
    ids = tokenizer.encode(text, add_bos=False)
    if expected.startswith(" ") and expected != text:
        return  # a literal U+2581 at the start is a space to sentencepiece
    assert "".join(stream(tokenizer, ids)) == expected


@many
@given(text=TEXT)
def test_a_character_is_returned_with_the_token_that_completes_it(text: str, json_tokenizer: Tokenizer) -> None:
    id_of = byte_ids(json_tokenizer)
    detokenizer = json_tokenizer.detokenizer()
    for character in text:
        *first, last = [id_of[byte] for byte in character.encode()]
        assert [detokenizer.add(token_id) for token_id in first] == [""] * len(first)
        assert detokenizer.add(last) == character
    assert detokenizer.finish() == ""


def test_a_character_in_pieces_is_held_back_and_then_whole(tokenizer: Tokenizer) -> None:
    ids = [byte_ids(tokenizer)[byte] for byte in "a🙂".encode()]
    assert stream(tokenizer, ids) == ["a", "", "", "", "🙂", ""]
    assert stream(tokenizer, ids[:-1])[-1].strip("\ufffd") == ""
    assert stream(tokenizer, ids[:-1])[-1] != ""


@pytest.mark.parametrize("cut", range(12))
def test_a_detokenizer_begins_anew_after_finish(cut: int, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The fox 日本 🙂", add_bos=False)
    detokenizer = tokenizer.detokenizer()
    first = "".join([detokenizer.add(i) for i in ids[:cut]]) + detokenizer.finish()
    second = "".join([detokenizer.add(i) for i in ids[cut:]]) + detokenizer.finish()
    assert (first, second) == (tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:]))


def test_special_tokens_are_left_out_on_request_and_do_not_end_the_opening_space(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("the fox", add_bos=False), tokenizer.token_id(special.TURN_END)]
    assert "".join(stream(tokenizer, ids, skip_special=True)) == "the fox"
    assert "".join(stream(tokenizer, ids)).replace(" ", "").endswith("thefox<|im_end|>")


@pytest.mark.parametrize("token_id", [-1, 10_000, 2**40, "7", 1.5, None])
def test_an_id_that_does_not_exist_is_refused(token_id: object, tokenizer: Tokenizer) -> None:
    with pytest.raises(OptionError, match="token id is "):
        tokenizer.detokenizer().add(token_id)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="token id is "):
        tokenizer.decode([tokenizer.encode("a")[-1], token_id])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="token id is "):
        tokenizer.detokenizer(skip_special=True).add(token_id)  # type: ignore[arg-type]


def test_a_token_costs_the_same_late_in_a_long_text(json_tokenizer: Tokenizer) -> None:
    """Broken bytes are the hard case: a detokenizer that decodes a window again never gets rid of them."""
    rng = random.Random(0)
    id_of = byte_ids(json_tokenizer)
    ids = [id_of[rng.randrange(0x80, 0x100)] for _ in range(200_000)]

    def seconds(detokenizer: StreamingDetokenizer, ids: list[int]) -> float:
        start = time.perf_counter()
        for token_id in ids:
            detokenizer.add(token_id)
        return time.perf_counter() - start

    detokenizer = json_tokenizer.detokenizer()
    early, _, late = (min(seconds(detokenizer, ids[i : i + 5000]) for i in range(at, at + 20_000, 5000))
                      for at in (0, 90_000, 180_000))  # fmt: skip
    assert late < 10 * early
