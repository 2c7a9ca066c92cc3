"""A GGUF file of LFM2 as a checkpoint: llama.cpp's names and metadata seen as ours.

Names and keys: gguf-py's constants and llama.cpp's converter for ``Lfm2ForCausalLM`` and ``Lfm2MoeForCausalLM``, which
permutes nothing: rotary embeddings are in the same order as in the original.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.errors import CheckpointError, ConversionError
from lfm_mlx.names import EMBEDDING, FINAL_NORM, HEAD, Shape, dense_matrices, expected_tensors, is_matrix

from .gguf_blocks import import_gguf
from .segments import Parts, Segment

ARCHITECTURES = {"lfm2": "lfm2", "lfm2moe": "lfm2_moe"}
"""Our model types by GGUF's architectures."""

_PLAIN = ("F32", "F16", "BF16")
_SHARED = {
    "operator_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "conv.in_proj.weight": "shortconv.in_proj.weight",
    "conv.conv.weight": "shortconv.conv.weight",
    "conv.out_proj.weight": "shortconv.out_proj.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.out_proj.weight": "attn_output.weight",
    "self_attn.q_layernorm.weight": "attn_q_norm.weight",
    "self_attn.k_layernorm.weight": "attn_k_norm.weight",
    "feed_forward.gate.weight": "ffn_gate_inp.weight",
    "feed_forward.expert_bias": "exp_probs_b.bias",
    "feed_forward.switch_mlp.gate_proj.weight": "ffn_gate_exps.weight",
    "feed_forward.switch_mlp.up_proj.weight": "ffn_up_exps.weight",
    "feed_forward.switch_mlp.down_proj.weight": "ffn_down_exps.weight",
}
_FINAL_NORMS = ("output_norm.weight", "token_embd_norm.weight")
"""The final norm's name, which older files call by the embedding."""

# The pre-tokenizer that llama.cpp calls "lfm2"; tokenizer.json of the 65,536-token models has it too.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4


class GgufSource:
    """A GGUF file as a `lfm_mlx.convert.segments.WeightSource`.

    Args:
        file: the whole model in one file.

    Raises:
        CheckpointError: it is damaged, or tensors are missing or misshapen.
        ConversionError: it is another kind of model, or the `gguf` package is not installed.
    """

    def __init__(self, file: Path) -> None:
        gguf = import_gguf()
        self.file = file
        self.files: tuple[Path, ...] = (file,)
        try:
            reader = gguf.GGUFReader(file)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"{file}: cannot be read as GGUF ({error}); fetch it again") from error
        self._fields = {name: field.contents() for name, field in reader.fields.items()}
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        self.config = ModelConfig.from_dict(self._config())
        self._names = self._table()
        self._check()

    @property
    def tensors(self) -> dict[str, Shape]:
        """Our tensors with their unquantised shapes, in the order of the forward pass."""
        return {name: shape for name, shape in expected_tensors(self.config).items() if name in self._names}

    @property
    def block_types(self) -> list[str]:
        """The quantised types in the file."""
        types = {tensor.tensor_type.name for tensor in self._stored.values()}
        return sorted(types - set(_PLAIN))

    def dtype(self, name: str) -> str:
        """The type of the values; blocks give F32."""
        stored = self._stored[self._names[name]].tensor_type.name
        return stored if stored in _PLAIN else "F32"

    def stored_as(self, name: str) -> Quantization | None:
        """None: GGUF's blocks are not MLX's."""
        return None

    def segments(self, name: str) -> Iterator[Parts]:
        """All rows of our tensor in order."""
        tensor = self._stored[self._names[name]]
        shape = self.tensors[name]
        num_rows = math.prod(shape[:-1]) if is_matrix(name) else 1
        yield (
            Segment(
                file=self.file,
                offset=int(tensor.data_offset),
                num_rows=num_rows,
                row_bytes=int(tensor.n_bytes) // num_rows,
                dtype=tensor.tensor_type.name,
            ),
        )

    def _table(self) -> dict[str, str]:
        """GGUF's names of our tensors, of those that the file has."""
        config = self.config
        final_norm = next((name for name in _FINAL_NORMS if name in self._stored), _FINAL_NORMS[0])
        table = {EMBEDDING: "token_embd.weight", FINAL_NORM: final_norm, HEAD: "output.weight"}
        dense = dict(zip(dense_matrices(config), ("ffn_gate", "ffn_up", "ffn_down"), strict=True))
        shared = {**_SHARED, **{f"feed_forward.{ours}.weight": f"{theirs}.weight" for ours, theirs in dense.items()}}
        for layer in range(config.num_layers):
            table |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in shared.items()}
        return {ours: theirs for ours, theirs in table.items() if theirs in self._stored}

    def _check(self) -> None:
        quants = import_gguf().quants
        for name, shape in expected_tensors(self.config).items():
            if name not in self._names:
                raise CheckpointError(f"{self.file}: {name} is missing, expected {shape}; fetch the file again")
            tensor = self._stored[self._names[name]]
            if int(tensor.n_elements) != math.prod(shape):
                found = tuple(int(size) for size in reversed(tensor.shape))
                raise CheckpointError(f"{self.file}: {tensor.name} is {found}, expected {shape}; fetch the file again")
            kind = tensor.tensor_type
            if kind.name not in _PLAIN and kind not in quants._type_traits:
                raise ConversionError(
                    f"{self.file}: {tensor.name} is stored as {kind.name}, which the gguf package cannot read; "
                    "use a file of another type, such as Q8_0"
                )

    def _config(self) -> dict[str, Any]:
        kind = self._fields.get("general.architecture")
        if kind not in ARCHITECTURES:
            known = " or ".join(ARCHITECTURES)
            raise ConversionError(f"{self.file}: general.architecture is {kind!r}, expected {known}; use another file")
        if int(self._fields.get("split.count", 1)) > 1:
            raise ConversionError(f"{self.file}: is one of several parts; join them with llama-gguf-split --merge")
        is_moe = kind == "lfm2moe"

        def of(key: str) -> Any:
            value = self._fields.get(f"{kind}.{key}")
            if value is None:
                raise CheckpointError(f"{self.file}: {kind}.{key} is missing from its metadata; fetch the file again")
            return value

        kv_heads = of("attention.head_count_kv")
        kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * of("block_count")
        rope_theta = float(of("rope.freq_base"))
        hidden, width = int(of("embedding_length")), int(of("feed_forward_length"))
        raw: dict[str, Any] = {
            "model_type": ARCHITECTURES[kind],
            "architectures": ["Lfm2MoeForCausalLM" if is_moe else "Lfm2ForCausalLM"],
            "vocab_size": int(self._fields.get(f"{kind}.vocab_size", self._stored["token_embd.weight"].shape[1])),
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_hidden_layers": int(of("block_count")),
            "num_attention_heads": int(of("attention.head_count")),
            "num_key_value_heads": max(int(heads) for heads in kv_heads),
            "layer_types": ["full_attention" if heads else "conv" for heads in kv_heads],
            "max_position_embeddings": int(of("context_length")),
            "norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),
            "conv_L_cache": int(of("shortconv.l_cache")),
            "conv_bias": False,
            "rope_theta": rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
            "tie_word_embeddings": "output.weight" not in self._stored,
            "torch_dtype": "bfloat16",
        }
        for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
            raw[key] = self._fields.get(f"tokenizer.ggml.{name}_token_id")
        if not is_moe:
            return raw | {"block_ff_dim": width, "block_dim": hidden, "block_auto_adjust_ff_dim": False}
        return raw | {
            "moe_intermediate_size": int(of("expert_feed_forward_length")),
            "num_experts": int(of("expert_count")),
            "num_experts_per_tok": int(of("expert_used_count")),
            "num_dense_layers": int(of("leading_dense_block_count")),
            "use_expert_bias": any(name.endswith("exp_probs_b.bias") for name in self._stored),
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        }

    def sidecars(self) -> dict[str, bytes]:
        """The files beside the weights, made from the metadata: tokenizer and chat template, where it has them."""
        tokens = self._fields.get("tokenizer.ggml.tokens")
        if tokens is None or self._fields.get("tokenizer.ggml.model") != "gpt2":
            return {}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
            number = self._fields.get(f"tokenizer.ggml.{key}_token_id")
            if number is not None:
                settings[role] = tokens[int(number)]
        made = {"tokenizer.json": self._tokenizer(tokens), "tokenizer_config.json": settings}
        files = {name: json.dumps(value, ensure_ascii=False, indent=1).encode() for name, value in made.items()}
        template = self._fields.get("tokenizer.chat_template")
        return files if template is None else {**files, "chat_template.jinja": template.encode()}

    def _tokenizer(self, tokens: list[str]) -> dict[str, Any]:
        kinds = self._fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        added = [
            {"id": i, "content": token, "special": kind == _CONTROL}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": {**byte_level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in self._fields.get("tokenizer.ggml.merges", [])],
            },
        }
