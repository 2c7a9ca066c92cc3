"""Training of the tiny checkpoint: a fast forward pass over transformers' own parameters, Muon and the schedule.

Shapes: B rows, L tokens, D hidden, H query heads, G key-value heads, P head width, E experts, F expert width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

__all__ = ["Batch", "Schedule", "batch_loss", "train"]

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids (B, L + 1), loss weights (B, L) of the tokens to predict, and positions (B, L)."""

    ids: Tensor
    weights: Tensor
    positions: Tensor


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of the training and its learning rates; the rates are constant to `hold`, then linear to zero.

    With `minutes` set, the clock ends the training instead of `num_steps`.
    """

    num_steps: int
    minutes: float = 0.0
    num_threads: int = 2
    hold: float = 0.45
    warmup: int = 60
    muon: float = 0.02
    adam: float = 3e-3
    embedding: float = 6e-3
    bias: float = 3e-3
    quantize_from: float = 0.7

    def progress(self, step: int, spent_s: float) -> float:
        """How much of the training is done, by steps, or by the clock where `minutes` limits it."""
        return spent_s / (60 * self.minutes) if self.minutes else step / self.num_steps

    def factor(self, step: int, done: float) -> float:
        """The multiple of the learning rates at `step`, a fraction `done` of the training."""
        fall = 1.0 if done < self.hold else (1.0 - done) / (1.0 - self.hold)
        return min(1.0, (step + 1) / self.warmup) * fall


def _rounded(weight: Tensor) -> Tensor:
    """`weight` rounded to 4 bits in groups of 64."""
    groups = weight.reshape(-1, 64)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-8)
    return (((groups - low) / scale).round() * scale + low).reshape(weight.shape)


def _prepare(model: Lfm2MoeForCausalLM, quantize: bool) -> Weights:
    """Copies of the parameters in bf16 as leaves, the large ones rounded to 4 bits when `quantize`.

    The gradient of a rounded weight is taken for that of the weight itself.
    """
    weights = {}
    for name, parameter in model.model.named_parameters():
        value = parameter.detach()
        if quantize and value.ndim >= 2 and value.shape[-1] % 64 == 0 and "feed_forward.gate." not in name:
            value = _rounded(value)
        weights[name] = value.to(torch.bfloat16, copy=True).requires_grad_()
    return weights


class _Norm(torch.autograd.Function):
    """RMSNorm with its gradient by hand: a third of the passes over memory that autograd would make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """`x` over its root mean square, times `weight`."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (size.square() / x.shape[-1] + 1e-5).rsqrt().to(x.dtype)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        result: Tensor = unit * weight
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `x` and `weight`."""
        unit, scale, weight = ctx.saved_tensors
        product = gradient * unit
        along = (product @ weight).unsqueeze(-1) / weight.shape[0]
        return (gradient * weight).addcmul_(unit, along, value=-1).mul_(scale), product.flatten(0, -2).sum(0)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return _Norm.apply(x, weight)  # type: ignore[no-any-return,no-untyped-call]


def _conv_layer(h: Tensor, norm: Tensor, in_proj: Tensor, kernel: Tensor, out_proj: Tensor) -> Tensor:
    b, c, value = F.linear(_norm(h, norm), in_proj).chunk(3, dim=-1)
    length = h.shape[1]
    padded = F.pad(b * value, (0, 0, 2, 0))
    mixed = (
        padded[:, :length] * kernel[:, 0, 0] + padded[:, 1 : length + 1] * kernel[:, 0, 1] + b * value * kernel[:, 0, 2]
    )
    return h + F.linear(c * mixed, out_proj)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _queries_keys_values(
    h: Tensor,
    norm: Tensor,
    projections: tuple[Tensor, Tensor, Tensor],
    norms: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in float32 (B, H, L, P), which the CPU's fused attention handles faster than bf16."""
    x = _norm(h, norm)
    width = norms[0].shape[0]
    q, k, v = (F.linear(x, weight).view(*x.shape[:-1], -1, width) for weight in projections)
    q, k = _rotate(_norm(q, norms[0]), cos, sin), _rotate(_norm(k, norms[1]), cos, sin)
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    return q.float().transpose(1, 2), k.float().transpose(1, 2), v.float().transpose(1, 2)


def _attention_layer(h: Tensor, weights: Weights, at: str, cos: Tensor, sin: Tensor) -> Tensor:
    norm, at = weights[f"{at}.operator_norm.weight"], f"{at}.self_attn"
    q_proj, k_proj, v_proj = (weights[f"{at}.{name}_proj.weight"] for name in "qkv")
    norms = weights[f"{at}.q_layernorm.weight"], weights[f"{at}.k_layernorm.weight"]
    q, k, v = _queries_keys_values(h, norm, (q_proj, k_proj, v_proj), norms, cos, sin)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return h + F.linear(mixed.transpose(1, 2).flatten(-2).to(h.dtype), weights[f"{at}.out_proj.weight"])


def _dense_layer(h: Tensor, norm: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    x = _norm(h, norm)
    return h + F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


def _experts_layer(
    h: Tensor, norm: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, bias: Tensor, active: int
) -> tuple[Tensor, Tensor]:
    """All experts on all tokens, the unchosen ones weighted zero: at this width faster than gathering rows."""
    x = _norm(h, norm)
    scores = F.linear(x, router).float().sigmoid()  # (B, L, E)
    chosen = (scores.detach() + bias).topk(active, dim=-1).indices
    mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
    share = scores * mask
    share = (share / (share.sum(-1, keepdim=True) + 1e-6)).to(h.dtype)
    experts, _, width = down.shape  # (E, D, F)
    gate = F.linear(x, gate_up[:, :width].flatten(0, 1)).view(*x.shape[:-1], experts, width)
    up = F.linear(x, gate_up[:, width:].flatten(0, 1)).view(*x.shape[:-1], experts, width)
    inner = F.silu(gate) * up * share.unsqueeze(-1)
    return h + F.linear(inner.flatten(-2), down.permute(1, 0, 2).flatten(1)), mask.mean(dim=(0, 1))


def batch_loss(
    ids: Tensor, loss_weights: Tensor, positions: Tensor, weights: Weights, biases: list[Tensor], config: Lfm2MoeConfig
) -> tuple[Tensor, Tensor]:
    """The weighted mean cross-entropy of a batch and each expert's share of the tokens, (layers, E)."""
    width = config.hidden_size // config.num_attention_heads
    assert config.rope_parameters and config.layer_types
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = positions[..., None].float() * frequency
    angle = torch.cat((angle, angle), dim=-1)[:, :, None]  # (B, L, 1, P)
    cos, sin = angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)
    h = weights["embed_tokens.weight"][ids[:, :-1]]
    loads = []
    for layer, kind in enumerate(config.layer_types):
        at = f"layers.{layer}"
        norm, ffn = weights[f"{at}.ffn_norm.weight"], f"{at}.feed_forward"
        if kind == "conv":
            parts = [
                weights[f"{at}.{name}.weight"]
                for name in ("operator_norm", "conv.in_proj", "conv.conv", "conv.out_proj")
            ]
            h = _conv_layer(h, *parts)
        else:
            h = _attention_layer(h, weights, at, cos, sin)
        if layer < config.num_dense_layers:
            h = _dense_layer(h, norm, *(weights[f"{ffn}.{name}.weight"] for name in ("w1", "w2", "w3")))
        else:
            router, gate_up, down = (
                weights[f"{ffn}.{name}"] for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
            )
            bias = biases[layer - config.num_dense_layers]
            h, load = _experts_layer(h, norm, router, gate_up, down, bias, config.num_experts_per_tok)
            loads.append(load)
    flat = loss_weights.flatten()
    counted = flat.nonzero().squeeze(1)  # the head is computed for these tokens only
    final = _norm(h.flatten(0, 1)[counted], weights["embedding_norm.weight"])
    logits = F.linear(final, weights["embed_tokens.weight"]).float()
    losses = F.cross_entropy(logits, ids[:, 1:].flatten()[counted], reduction="none")
    return (losses * flat[counted]).sum() / flat.sum(), torch.stack(loads)


def _orthogonal(update: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon (https://kellerjordan.github.io/posts/muon/) on a stack of matrices."""
    tall = bool(update.shape[-2] > update.shape[-1])
    x = (update.mT if tall else update).to(torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    result: Tensor = (x.mT if tall else x).float()
    return result


class _Muon:
    """Muon over all matrices, grouped by shape so that each iteration is one batched product."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.groups: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault((parameter.shape[-2], parameter.shape[-1]), []).append(parameter)
        self.momentum = {id(parameter): torch.zeros_like(parameter) for parameter in parameters}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for (rows, columns), parameters in self.groups.items():
            updates = []
            for parameter in parameters:
                assert parameter.grad is not None
                average = self.momentum[id(parameter)].lerp_(parameter.grad, 0.05)
                updates.append(parameter.grad.lerp(average, 0.95).reshape(-1, rows, columns))
            sizes = [update.shape[0] for update in updates]
            scale = rate * max(1.0, rows / columns) ** 0.5
            for parameter, update in zip(parameters, torch.split(_orthogonal(torch.cat(updates)), sizes), strict=True):
                parameter.mul_(1 - rate * 0.01).add_(update.reshape(parameter.shape), alpha=-scale)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and "embed_tokens" not in name and "conv.conv" not in name and "gate.weight" not in name


class _Optimizer:
    """Muon for the matrices, AdamW for the embedding, norms, routers and taps."""

    def __init__(self, model: Lfm2MoeForCausalLM, schedule: Schedule) -> None:
        named = list(model.model.named_parameters())
        self._schedule = schedule
        self._muon = _Muon([parameter for name, parameter in named if _is_matrix(name, parameter)])
        small = [
            parameter for name, parameter in named if not _is_matrix(name, parameter) and "embed_tokens" not in name
        ]
        embedding = [parameter for name, parameter in named if "embed_tokens" in name]
        groups = [{"params": small, "rate": schedule.adam}, {"params": embedding, "rate": schedule.embedding}]
        self._adam = torch.optim.AdamW(groups, lr=schedule.adam, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, factor: float) -> None:
        """Apply the gradients with learning rates multiplied by `factor`."""
        self._muon.step(self._schedule.muon * factor)
        for group in self._adam.param_groups:
            group["lr"] = group["rate"] * factor
        self._adam.step()


def _gradients(
    batch: Batch, weights: Weights, biases: list[Tensor], config: Lfm2MoeConfig
) -> tuple[float, Tensor, list[Tensor]]:
    torch.set_num_threads(1)
    loss, loads = batch_loss(batch.ids, batch.weights, batch.positions, weights, biases, config)
    return loss.item(), loads.detach(), list(torch.autograd.grad(loss, list(weights.values())))


def train(
    model: Lfm2MoeForCausalLM, batches: Iterator[Batch], schedule: Schedule, report: Callable[[str], None] = print
) -> None:
    """Train `model` in place for `schedule.num_steps` steps of `schedule.num_threads` batches.

    Each batch has a thread of its own and every operation is single-threaded: threads meet once a step instead of in
    every operation, which is what makes small matrices fast and keeps a busy machine from stalling the run.
    """
    config = model.config
    optimizer = _Optimizer(model, schedule)
    parameters = [parameter for _, parameter in model.model.named_parameters()]
    biases = [layer.feed_forward.expert_bias for layer in model.model.layers[config.num_dense_layers :]]
    ideal = config.num_experts_per_tok / config.num_experts
    torch.set_num_threads(1)
    started, mean, seen = time.monotonic(), 0.0, 0
    with ThreadPoolExecutor(schedule.num_threads) as pool:
        for step in range(schedule.num_steps):
            done = schedule.progress(step, time.monotonic() - started)
            if done >= 1.0:
                break
            factor = schedule.factor(step, done)
            weights = _prepare(model, done >= schedule.quantize_from and step % 2 == 0)
            parts = [next(batches) for _ in range(schedule.num_threads)]
            results = list(pool.map(lambda part: _gradients(part, weights, biases, config), parts))  # noqa: B023
            for parameter, *gradients in zip(parameters, *(result[2] for result in results), strict=True):
                parameter.grad = sum(gradient.float() for gradient in gradients) / len(gradients)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step(factor)
            loads = torch.stack([result[1] for result in results]).mean(0)
            for bias, load in zip(biases, loads, strict=True):
                bias.add_(schedule.bias * factor * (ideal - load).sign())
            loss = sum(result[0] for result in results) / len(results)
            mean = loss if step == 0 else 0.98 * mean + 0.02 * loss
            seen += sum(part.weights.numel() for part in parts)
            if step % 20 == 0 or step + 1 == schedule.num_steps:
                spent = time.monotonic() - started
                left = spent / 60 * (1.0 - done) / max(done, 1e-3)
                line = f"step {step + 1} ({done:.1%}) loss {mean:.4f} load {loads.min():.3f}-{loads.max():.3f}"
                report(f"{line} {seen / spent:.0f} tokens/s {left:.1f} min left")
