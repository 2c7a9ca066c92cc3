"""(B, V) logits -> (B,) token ids on the device, with parameters per row."""

from lfm_mlx.sampling.logprobs import TokenLogProbs, logprobs
from lfm_mlx.sampling.options import Features, Parameters
from lfm_mlx.sampling.packed_mask import WORD_BITS, unpack
from lfm_mlx.sampling.recommended import recommended_sampling
from lfm_mlx.sampling.sampler import Sampler, State, advance, choose

__all__ = [
    "WORD_BITS",
    "Features",
    "Parameters",
    "Sampler",
    "State",
    "TokenLogProbs",
    "advance",
    "choose",
    "logprobs",
    "recommended_sampling",
    "unpack",
]
