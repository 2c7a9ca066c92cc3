import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lfm_templates
import pytest
import tiny_tokenizers
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfm_mlx.errors import CheckpointError, ContextLengthError, OptionError
from lfm_mlx.tokenizer import Tokenizer, load_tokenizer, special

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe? 日本 🙂 <|im_end|> <think> It's 12345"},
]


def write_added(folder: Path, **files: Any) -> Path:
    """An LFM2 folder with further JSON files, given by the name before `.json`."""
    tiny_tokenizers.write_json_tokenizer(folder, config=files.pop("tokenizer_config", None))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def test_a_text_that_is_far_too_long_is_refused_by_its_beginning(json_tokenizer: Tokenizer) -> None:
    text = "The quick brown fox, 12345. " * 400
    num_tokens = len(json_tokenizer.encode(text, add_bos=False))
    with pytest.raises(ContextLengthError, match=r"tokens in the first 8,192 of them, expected fewer than 40 tokens"):
        json_tokenizer.check_length(text, 40)
    json_tokenizer.check_length(text, num_tokens)
    # Nothing is refused that would fit: not a text of few long tokens either.
    for long_tokens in (special.TURN_END * 5000, " " * 50_000):
        num_tokens = len(json_tokenizer.encode(long_tokens, add_bos=False))
        json_tokenizer.check_length(long_tokens, num_tokens)


@pytest.mark.parametrize("generation", lfm_templates.ALL)
def test_a_templated_prompt_has_the_ids_that_transformers_gives(generation: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast  # takes a second

    folder = tiny_tokenizers.write_json_tokenizer(tmp_path, template=lfm_templates.ALL[generation])
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = reference.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.apply_template(MESSAGES) == expected
    assert expected.count(tokenizer.bos_id) == 1
    assert tokenizer.encode(tokenizer.render(MESSAGES), add_bos=False) == expected
    assert tokenizer.apply_template(MESSAGES, add_generation_prompt=False) != expected


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(
        st.text(st.sampled_from("aB é日🙂\u200d \n\t'12<|>_\x00"), max_size=30),
        st.lists(st.sampled_from([*tiny_tokenizers.SPECIAL_TOKENS, "日本 café", "é", " ", "\n", "fox"])).map("".join),
    )
)
def test_raw_text_has_the_ids_that_transformers_gives(
    text: str, json_tokenizer: Tokenizer, json_backend: tokenizers.Tokenizer
) -> None:
    expected = json_backend.encode(text, add_special_tokens=False).ids
    assert json_tokenizer.encode(text, add_bos=False) == expected
    with_bos = json_backend.encode(text).ids
    assert with_bos == [json_tokenizer.bos_id, *expected]
    assert json_tokenizer.encode(text) == (expected if expected[:1] == [json_tokenizer.bos_id] else with_bos)


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_bos_is_never_doubled(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    bos = tokenizer.decode([tokenizer.bos_id])
    assert tokenizer.encode(bos + "hello").count(tokenizer.bos_id) == 1
    assert tokenizer.encode("hello").count(tokenizer.bos_id) == 1
    assert tokenizer.encode("hello", add_bos=False).count(tokenizer.bos_id) == 0
    assert tokenizer.encode("") == [tokenizer.bos_id]
    assert tokenizer.encode("", add_bos=False) == []


@pytest.mark.parametrize(
    ("has_post_processor", "declared", "expected"),
    [(True, None, True), (True, False, True), (True, True, True),
     (False, None, False), (False, False, False), (False, True, True)],
)  # fmt: skip
def test_bos_is_added_when_the_post_processor_or_the_config_says_so(
    has_post_processor: bool, declared: bool | None, expected: bool, tmp_path: Path
) -> None:
    tiny_tokenizers.write_json_tokenizer(tmp_path, config={} if declared is None else {"add_bos_token": declared})
    if not has_post_processor:
        state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
        (tmp_path / "tokenizer.json").write_text(json.dumps({**state, "post_processor": None}), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.adds_bos is expected
    assert (tokenizer.encode("a")[0] == tokenizer.bos_id) is expected


@pytest.mark.parametrize(("declared", "expected"), [(None, True), (True, True), (False, False)])
def test_a_sentencepiece_model_adds_bos_unless_the_config_forbids_it(
    declared: bool | None, expected: bool, tmp_path: Path
) -> None:
    config = {} if declared is None else {"add_bos_token": declared}
    tokenizer = load_tokenizer(tiny_tokenizers.write_sentencepiece_tokenizer(tmp_path, config=config))
    assert tokenizer.adds_bos is expected


def test_truncation_and_padding_left_in_the_file_do_not_touch_a_prompt(tmp_path: Path) -> None:
    tiny_tokenizers.write_json_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "The quick brown fox jumps"
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text
    assert tokenizer.decode(tokenizer.encode("a", add_bos=False)) == "a"
    assert backend.decode(backend.encode(text).ids) != text


def test_special_strings_in_a_users_text_become_special_ids_as_in_transformers(json_tokenizer: Tokenizer) -> None:
    ids = json_tokenizer.encode("a<|im_end|>b", add_bos=False)
    assert json_tokenizer.token_id("<|im_end|>") in ids
    assert json_tokenizer.token_id("<|im_end|>") not in json_tokenizer.encode("a<|im_end |>b")


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
@pytest.mark.parametrize("text", ["a\ud800", "\udfff", b"bytes", None, 3])
def test_text_that_is_no_unicode_string_is_refused(kind: str, text: Any, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    with pytest.raises(OptionError, match=r"text (has a lone surrogate .* at character|is a )"):
        tokenizer.encode(text)


@pytest.mark.parametrize(
    ("files", "config_eos_ids", "expected"),
    [
        ({}, (), {4, 2}),
        ({}, (7, 9), {4, 2, 7, 9}),
        ({"generation_config": {"eos_token_id": 11}}, (), {4, 2, 11}),
        ({"generation_config": {"eos_token_id": [11, 12]}}, (7,), {4, 2, 11, 12, 7}),
        ({"generation_config": {"eos_token_id": None}}, (), {4, 2}),
        ({"tokenizer_config": {"eos_token": special.PAD}}, (), {0, 2}),
        ({"tokenizer_config": {"eos_token": special.PAD, "chat_template": "x<|im_end|>"}}, (), {0, 2, 4}),
        ({"tokenizer_config": {"eos_token": special.PAD, "chat_template": "x"}}, (), {0, 2}),
    ],
)
def test_an_answer_stops_at_every_id_that_some_file_declares_or_the_template_ends_a_turn_with(
    files: dict[str, Any], config_eos_ids: tuple[int, ...], expected: set[int], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(write_added(tmp_path, **files), config_eos_ids=config_eos_ids)
    assert tokenizer.stop_ids == expected


def test_named_ids_come_from_the_config(json_tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert (json_tokenizer.pad_id, json_tokenizer.bos_id, json_tokenizer.eos_id) == (0, 1, 4)
    bare = load_tokenizer(write_added(tmp_path, tokenizer_config=dict.fromkeys(tiny_tokenizers.CONFIG)))
    assert (bare.pad_id, bare.bos_id, bare.eos_id, bare.adds_bos) == (None, None, None, False)


@pytest.mark.parametrize(
    "files",
    [
        {"special_tokens_map": {"unk_token": "<new>", "eos_token": {"content": "<end>", "lstrip": False}}},
        {"added_tokens": {"<new>": 486, "<newer>": 487}},
        {"tokenizer_config": {"additional_special_tokens": ["<new>", "<|im_start|>"]}},
        {"tokenizer_config": {"extra_special_tokens": {"image_token": "<new>"}}},
        {"tokenizer_config": {"image_token": "<new>"}},
        {
            "tokenizer_config": {
                "added_tokens_decoder": {
                    "486": {"content": "<new>", "special": True, "lstrip": False, "rstrip": True, "normalized": False},
                    "11": {"content": "<think>", "special": False, "lstrip": False, "rstrip": False,
                           "normalized": False, "single_word": False},
                }
            },
            "special_tokens_map": {"eos_token": "<ignored>"},
        },
    ],
)  # fmt: skip
def test_tokens_that_other_files_declare_get_the_ids_and_flags_that_transformers_gives(
    files: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast  # takes a second

    folder = write_added(tmp_path, **files)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    text = "a <new> b<newer><end><think>x<|im_end|> <new>"
    assert tokenizer.encode(text) == reference.encode(text)
    ids = reference.encode(text)
    assert tokenizer.decode(ids, skip_special=True) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.eos_id == reference.eos_token_id
    assert tokenizer.vocab_size == len(reference)
    source = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ image_token }}"
    (folder / "chat_template.jinja").write_text(source)
    rendered = load_tokenizer(folder).render([{"role": "user"}])
    assert rendered == reference.apply_chat_template([{"role": "user"}], chat_template=source, tokenize=False)
    bare = load_tokenizer(tiny_tokenizers.write_json_tokenizer(tmp_path / "bare"))
    control = [
        bare.encode(text),
        bare.decode(ids[:1], skip_special=True),
        bare.decode(bare.encode(text), skip_special=True),
    ]
    assert control != [ids, "", tokenizer.decode(ids, skip_special=True)]


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_token_bytes_joined_are_the_bytes_of_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    text = "the Größe 日本 🙂\n<|im_start|>user\n  x<|im_end|>"
    ids = tokenizer.encode(text, add_bos=False)
    assert b"".join(tokenizer.token_bytes(i) for i in ids).removeprefix(b" ") == text.encode()
    assert any(not tokenizer.token_bytes(i).isascii() for i in ids)


def test_rows_beyond_the_last_token_have_no_text(json_folder: Path, json_tokenizer: Tokenizer) -> None:
    tokenizer = load_tokenizer(json_folder, model_vocab_size=1000)
    assert tokenizer.vocab_size == 1000
    assert tokenizer.token_bytes(999) == b""
    assert tokenizer.decode([tokenizer.encode("a")[-1], 999, json_tokenizer.vocab_size]) == "a"
    assert not tokenizer.is_special(999)
    with pytest.raises(OptionError, match="token id is 999, expected 0 to 485"):
        json_tokenizer.decode([999])
    with pytest.raises(OptionError, match="token id is 1000"):
        tokenizer.is_special(1000)


def test_a_model_smaller_than_the_tokenizer_hides_no_token(json_folder: Path, json_tokenizer: Tokenizer) -> None:
    assert load_tokenizer(json_folder, model_vocab_size=3).vocab_size == json_tokenizer.vocab_size


class TestSentencePiece:
    def test_special_tokens_of_every_origin_are_single_ids(self, sentencepiece_tokenizer: Tokenizer) -> None:
        tokenizer = sentencepiece_tokenizer
        text = "<s><|im_start|>user\nthe fox<|im_end|>"
        ids = tokenizer.encode(text, add_bos=False)
        assert ids[:2] == [tokenizer.token_id("<s>"), 700]
        assert ids[-1] == tokenizer.token_id("<|im_end|>") == tokenizer.eos_id
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special=True) == "<|im_start|>user\nthe fox"
        assert tokenizer.vocab_size == 701
        assert tokenizer.decode([699]) == ""

    def test_plain_text_has_the_ids_that_sentencepiece_gives(
        self, sentencepiece_tokenizer: Tokenizer, sentencepiece_backend: Any
    ) -> None:
        for text in ("the fox", " the  fox ", "日本 🙂", "\n\n", "x"):
            assert sentencepiece_tokenizer.encode(text, add_bos=False) == sentencepiece_backend.encode(text)
        assert sentencepiece_backend.encode("<|im_end|>") != sentencepiece_tokenizer.encode("<|im_end|>")

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(parts=st.lists(st.sampled_from(["<s>", "<|im_start|>", "<|im_end|>", " ", "the", "日", "\n", "<|im", "é"])))
    def test_text_around_special_tokens_comes_back_unchanged(
        self, parts: list[str], sentencepiece_tokenizer: Tokenizer
    ) -> None:
        text = "".join(parts)
        assert sentencepiece_tokenizer.decode(sentencepiece_tokenizer.encode(text, add_bos=False)) == text

    def test_the_longest_special_token_wins(self, tmp_path: Path) -> None:
        tiny_tokenizers.write_sentencepiece_tokenizer(tmp_path)
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<a>": 700, "<a><b>": 701, "<a>!": 702}))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.encode("<a><b><a>!<a>", add_bos=False) == [701, 702, 700]

    def test_a_declared_token_takes_the_place_of_a_reserved_piece(self, tmp_path: Path) -> None:
        entry = {"content": "<call>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
        config = {"added_tokens_decoder": {"300": entry}, "unk_token": None}
        tokenizer = load_tokenizer(tiny_tokenizers.write_sentencepiece_tokenizer(tmp_path, config=config))
        assert tokenizer.encode("<call>", add_bos=False) == [300]
        assert tokenizer.decode([300]) == "<call>"
        assert tokenizer.decode([0]) == " ⁇ "

    def test_flags_that_cannot_be_honoured_are_refused(self, tmp_path: Path) -> None:
        entry = {"content": "<call>", "rstrip": True}
        folder = tiny_tokenizers.write_sentencepiece_tokenizer(
            tmp_path, config={"added_tokens_decoder": {"300": entry}}
        )
        with pytest.raises(CheckpointError, match=r"'<call>' has lstrip, rstrip or single_word set"):
            load_tokenizer(folder)

    def test_a_chat_template_works_beside_a_sentencepiece_model(self, tmp_path: Path) -> None:
        folder = tiny_tokenizers.write_sentencepiece_tokenizer(
            tmp_path, config={"chat_template": lfm_templates.LFM25, "added_tokens_decoder": {}}
        )
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.apply_template(MESSAGES)
        assert tokenizer.decode(ids) == tokenizer.render(MESSAGES)
        assert ids[0] == tokenizer.bos_id
        assert tokenizer.stop_ids == {tokenizer.token_id("<|im_end|>")}


def byte_fallback_backend() -> tokenizers.Tokenizer:
    """A sentencepiece model converted to JSON, as Llama's is."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    model = tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("ab é日🙂"), max_size=12))
def test_a_converted_sentencepiece_model_decodes_as_tokenizers_does(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    backend = byte_fallback_backend()
    folder = tmp_path_factory.mktemp("converted")
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text)
    assert ids == backend.encode(text).ids
    assert tokenizer.decode(ids) == backend.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == (" " + text if text else "")


def test_a_file_without_a_decoder_joins_tokens_with_spaces_as_tokenizers_does(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).decode([0, 1, 2]) == backend.decode([0, 1, 2]) == "a b ?"


def test_a_decoder_that_cannot_be_streamed_exactly_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tiny_tokenizers.byte_level_json())
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the decoder is .*WordPiece.*, expected ByteLevel"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json is not a readable tokenizer"),
        (
            "tokenizer.json",
            "version https://git-lfs.github.com/spec/v1",
            r"tokenizer\.json is not a readable tokenizer",
        ),
        ("tokenizer.json", '{"model": {}}', r"tokenizer\.json is not a readable tokenizer"),
        ("tokenizer_config.json", "{'a': 1}", r"tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", "[" * 100_000, r"tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds a list, expected a JSON object"),
        ("tokenizer_config.json", '{"bos_token": {"x": 1}}', r"tokenizer_config\.json: bos_token is \{'x': 1\}"),
        (
            "tokenizer_config.json",
            '{"eos_token": 7}',
            r"tokenizer_config\.json: eos_token is 7, expected a token's string",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": {}}}', r"added_tokens_decoder is not a table of ids"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 2}}', r"added_tokens_decoder\[1\] is 2"),
        ("special_tokens_map.json", "", r"special_tokens_map\.json is not JSON"),
        ("added_tokens.json", '{"a": "b"}', r"added_tokens\.json: 'a' has the id 'b'"),
        ("generation_config.json", '{"eos_token_id": "7"}', r"generation_config\.json: eos_token_id is '7'"),
        ("generation_config.json", '{"eos_token_id": [7, -1]}', r"generation_config\.json: eos_token_id is \[7, -1\]"),
        ("generation_config.json", '{"eos_token_id": true}', r"generation_config\.json: eos_token_id is True"),
    ],
)
def test_a_damaged_file_is_named(name: str, text: str, expected: str, tmp_path: Path) -> None:
    tiny_tokenizers.write_json_tokenizer(tmp_path)
    load_tokenizer(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=expected):
        load_tokenizer(tmp_path)


def test_a_damaged_sentencepiece_model_is_named(tmp_path: Path) -> None:
    tiny_tokenizers.write_sentencepiece_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a readable sentencepiece model"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    tiny_tokenizers.write_json_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read as UTF-8 text"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_importing_the_tokenizer_imports_nothing_slow() -> None:
    package = Path(special.__file__).parent.parent
    program = (
        "import sys, types\n"
        "sys.modules['lfm_mlx'] = package = types.ModuleType('lfm_mlx')\n"  # without what lfm_mlx/__init__.py imports
        f"package.__path__ = [{str(package)!r}]\n"
        "import lfm_mlx.tokenizer\n"
        "slow = {'transformers', 'torch', 'mlx_lm', 'mlx', 'numpy', 'sentencepiece'} & set(sys.modules)\n"
        "assert 'jinja2' in sys.modules\n"
        "assert not slow, slow"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
