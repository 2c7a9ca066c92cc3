"""One file per question asked of the machine; each ends in one JSON line."""

from lfm_mlx.bench.decode_speed import ask_decode_speed
from lfm_mlx.bench.false_alarms import ask_false_alarms
from lfm_mlx.bench.host_time import ask_host_time
from lfm_mlx.bench.kernel_trials import ask_kernel_trials
from lfm_mlx.bench.launch_count import ask_launches
from lfm_mlx.bench.mask_time import ask_mask_time
from lfm_mlx.bench.memory_use import ask_memory
from lfm_mlx.bench.prefill_speed import ask_prefill_speed
from lfm_mlx.bench.report import Report
from lfm_mlx.bench.serving_speed import ask_serving
from lfm_mlx.bench.subject import Subject

__all__ = [
    "Report",
    "Subject",
    "ask_decode_speed",
    "ask_false_alarms",
    "ask_host_time",
    "ask_kernel_trials",
    "ask_launches",
    "ask_mask_time",
    "ask_memory",
    "ask_prefill_speed",
    "ask_serving",
]
