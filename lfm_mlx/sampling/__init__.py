"""(B, V) logits -> (B,) token ids on the device, with parameters per row."""

from lfm_mlx.sampling.logprobs import TokenLogProbs, logprobs
from lfm_mlx.sampling.options import Features, Parameters, check_bias
from lfm_mlx.sampling.packed_mask import WORD_BITS, unpack
from lfm_mlx.sampling.recommended import recommended_sampling
from lfm_mlx.sampling.sampler import Sampler, State, advance, choose, fresh_seed

__all__ = [
    "WORD_BITS",
    "Features",
    "Parameters",
    "Sampler",
    "State",
    "TokenLogProbs",
    "advance",
    "check_bias",
    "choose",
    "fresh_seed",
    "logprobs",
    "recommended_sampling",
    "unpack",
]
