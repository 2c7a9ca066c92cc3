"""One model on several machines: each rank holds a part of every layer, and `mlx.distributed` adds the parts up."""

from lfm_mlx.distributed.cut import Cut, Mode, RankPart, check_size, cut_of, local_config, part_bytes
from lfm_mlx.distributed.link import Link, Note
from lfm_mlx.distributed.part_file import read_ranges
from lfm_mlx.distributed.ranks import Ranks, agree, free_bytes, join_link, join_ranks, part_name, ranks_of, set_ranks
from lfm_mlx.distributed.shard import shard
from lfm_mlx.distributed.sharded_weights import ShardedWeights, take_part
from lfm_mlx.distributed.world import World, check_alone, is_first_rank, launched_world

__all__ = [
    "Cut",
    "Link",
    "Mode",
    "Note",
    "RankPart",
    "Ranks",
    "ShardedWeights",
    "World",
    "agree",
    "check_alone",
    "check_size",
    "cut_of",
    "free_bytes",
    "is_first_rank",
    "join_link",
    "join_ranks",
    "launched_world",
    "local_config",
    "part_bytes",
    "part_name",
    "ranks_of",
    "read_ranges",
    "set_ranks",
    "shard",
    "take_part",
]
