"""Several servers of one model behind one address: each request goes where most of its prompt was computed before."""

from lfm_mlx.replicas.data_parallel import serving_rank, share_key
from lfm_mlx.replicas.fleet import Fleet
from lfm_mlx.replicas.front import Front, FrontSettings, make_front_app
from lfm_mlx.replicas.front_server import serve_front
from lfm_mlx.replicas.prefix_index import PrefixIndex
from lfm_mlx.replicas.prompt_trace import PromptTrace, trace_of
from lfm_mlx.replicas.replica import Replica

__all__ = [
    "Fleet",
    "Front",
    "FrontSettings",
    "PrefixIndex",
    "PromptTrace",
    "Replica",
    "make_front_app",
    "serve_front",
    "serving_rank",
    "share_key",
    "trace_of",
]
