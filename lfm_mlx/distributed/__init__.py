"""One model on several machines: each rank holds a part of every layer, and `mlx.distributed` adds the parts up."""

from lfm_mlx.distributed.cut import Cut, Mode, Part, check_size, cut_of, local_config, part_bytes
from lfm_mlx.distributed.part_file import read_ranges
from lfm_mlx.distributed.shard import shard
from lfm_mlx.distributed.sharded_weights import ShardedWeights, take_part

__all__ = [
    "Cut",
    "Mode",
    "Part",
    "ShardedWeights",
    "check_size",
    "cut_of",
    "local_config",
    "part_bytes",
    "read_ranges",
    "shard",
    "take_part",
]
