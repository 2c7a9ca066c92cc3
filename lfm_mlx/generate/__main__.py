"""``python -m lfm_mlx.generate``: the same as ``lfm-mlx generate``."""

from lfm_mlx.cli import generate
from lfm_mlx.terminal import run

if __name__ == "__main__":
    run(generate, "python -m lfm_mlx.generate")
