"""Reads the files of a folder that say something about its tokenizer, besides the vocabulary itself."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from lfm_mlx.errors import CheckpointError

_NAMED_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What the small files beside tokenizer.json or tokenizer.model say.

    Args:
        config: tokenizer_config.json, completed from special_tokens_map.json.
        special_tokens: "bos_token", "eos_token", ... -> the token's string, as a chat template sees them.
        declared_tokens: (id, token) of `added_tokens_decoder`, in the order of their ids.
        named_tokens: (id or None, token) of added_tokens.json, the special tokens and the extra ones.
        generation_eos_ids: `eos_token_id` of generation_config.json.
        template_sources: template name ("default", "tool_use", ...) -> (file it stands in, its text).
    """

    config: Mapping[str, Any]
    special_tokens: Mapping[str, str]
    declared_tokens: tuple[tuple[int, AddedToken], ...]
    named_tokens: tuple[tuple[int | None, AddedToken], ...]
    generation_eos_ids: tuple[int, ...]
    template_sources: Mapping[str, tuple[Path, str]]


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json and templates.

    Each of them may be missing.

    Raises:
        CheckpointError: a file cannot be read or holds something else than expected.
    """
    config_path = folder / "tokenizer_config.json"
    config = _read_object(config_path)
    declared = _declared_tokens(config_path, config)
    special_tokens_map = _read_object(folder / "special_tokens_map.json")
    # As in transformers: the older file counts where tokenizer_config.json does not list its added tokens.
    config = {**special_tokens_map, **config} if declared else {**config, **special_tokens_map}
    special = _special_tokens(config_path, config)
    return TokenizerFiles(
        config=config,
        special_tokens={key: token.content for key, token in special.items()},
        declared_tokens=declared,
        named_tokens=_named_tokens(folder, config, special),
        generation_eos_ids=_generation_eos_ids(folder / "generation_config.json"),
        template_sources=_template_sources(folder, config),
    )


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} when there is no such file."""
    if not path.exists():
        return {}
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object; fetch the file again")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text: {error}; fetch the file again") from error


def _declared_tokens(path: Path, config: Mapping[str, Any]) -> tuple[tuple[int, AddedToken], ...]:
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict) or not all(key.isdecimal() for key in entries):
        raise CheckpointError(f"{path}: added_tokens_decoder is not a table of ids; fetch the file again")
    return tuple(
        (int(token_id), _added_token(path, f"added_tokens_decoder[{token_id}]", entries[token_id], is_special=False))
        for token_id in sorted(entries, key=int)
    )


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The tokens under a `..._token` key, the standard ones first; other models add `image_token` and the like."""
    extra = config.get("extra_special_tokens")
    named = {**config, **extra} if isinstance(extra, dict) else config
    keys = [*_NAMED_KEYS, *(key for key in named if key.endswith("_token") and key not in _NAMED_KEYS)]
    if isinstance(extra, dict):
        keys += [key for key in extra if key not in keys]
    # A number or a flag such as `add_bos_token` is no token; under a standard key it is an error.
    tokens = [key for key in keys if isinstance(named.get(key), (str, dict)) or key in _NAMED_KEYS]
    return {key: _added_token(path, key, named[key]) for key in tokens if named.get(key) is not None}


def _named_tokens(
    folder: Path, config: Mapping[str, Any], special: Mapping[str, AddedToken]
) -> tuple[tuple[int | None, AddedToken], ...]:
    path = folder / "added_tokens.json"
    entries = _read_object(path)
    for text, token_id in entries.items():
        if not _is_id(token_id):
            raise CheckpointError(f"{path}: {text!r} has the id {token_id!r}, expected a number; fetch the file again")
    special_texts = {token.content for token in special.values()}
    tokens: dict[str, tuple[int | None, AddedToken]] = {
        text: (entries[text], AddedToken(text, special=text in special_texts))
        for text in sorted(entries, key=entries.__getitem__)
    }
    for token in (*special.values(), *_extra_tokens(folder / "tokenizer_config.json", config)):
        tokens.setdefault(token.content, (None, token))
    return tuple(tokens.values())


def _extra_tokens(path: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    key = "extra_special_tokens" if config.get("extra_special_tokens") else "additional_special_tokens"
    extra = config.get(key) or []
    return [_added_token(path, key, token) for token in extra] if isinstance(extra, list) else []


def _added_token(path: Path, key: str, value: object, *, is_special: bool = True) -> AddedToken:
    if isinstance(value, str) and value:
        return AddedToken(value, special=True)
    # `is_special` is for entries that do not say; added_tokens_decoder's usually do.
    flags = {key: flag for key, flag in value.items() if key != "__type"} if isinstance(value, dict) else {}
    try:
        if isinstance(flags.get("content"), str) and flags["content"]:
            return AddedToken(**{"special": is_special, **flags})
    except TypeError:
        pass  # an unknown flag, or one of a wrong type: told below
    raise CheckpointError(
        f"{path}: {key} is {value!r}, expected a token's string or its content and flags; fetch the file again"
    )


def _generation_eos_ids(path: Path) -> tuple[int, ...]:
    value = _read_object(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_id(token_id) for token_id in ids):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}, expected a token id or a list of them; correct it")
    return tuple(ids)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _template_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[Path, str]]:
    """Template files first, then tokenizer_config.json, then the chat_template.json of older vision models."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: (path, _read_text(path)) for name, path in files.items()}
    for path, value in (
        (folder / "tokenizer_config.json", config.get("chat_template")),
        (folder / "chat_template.json", _read_object(folder / "chat_template.json").get("chat_template")),
    ):
        if value is not None:
            return {name: (path, text) for name, text in _named_templates(path, value).items()}
    return {}


def _named_templates(path: Path, value: object) -> dict[str, str]:
    named = {"default": value} if isinstance(value, str) else value
    if isinstance(named, list) and all(isinstance(entry, dict) for entry in named):
        named = {entry.get("name"): entry.get("template") for entry in named}
    if not isinstance(named, dict) or not all(isinstance(text, str) for item in named.items() for text in item):
        raise CheckpointError(
            f"{path}: chat_template is a {type(value).__name__}, expected a string or a list of "
            '{"name": ..., "template": ...}; fetch the file again'
        )
    return named
