"""A recipe that meets a size: bytes go where they save most, matrix by matrix."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lfm_mlx.config import Quantization
from lfm_mlx.errors import OptionError
from lfm_mlx.names import is_matrix

from .recipes import Recipe, Rule
from .rounding_cost import Costs, choices_for, measure_costs
from .segments import WeightSource
from .sensitivity import Sensitivity
from .write import plan_tensors

_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Matrices that are one matrix at run time, as long as they are stored alike."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A way to store a group of matrices, with its bytes and its cost."""

    how: Quantization | None
    num_bytes: int
    cost: float


def find_recipe(
    source: WeightSource,
    dtypes: Mapping[str, str],
    sensitivities: Mapping[str, Sequence[Sensitivity]] | None,
    *,
    target_bpw: float,
    rounding: str,
) -> Recipe:
    """The recipe of least divergence that has at most `target_bpw` bits per weight.

    Args:
        source: the checkpoint.
        dtypes: by our name the type of a tensor's values and scales, as safetensors spells it.
        sensitivities: from `lfm_mlx.convert.sensitivity`; None goes by relative errors and kinds of matrices.
        target_bpw: bits for each value of the model, all tensors together.
        rounding: the recipe's.

    Raises:
        OptionError: the size is out of reach; the message has the sizes that are not.
    """
    sizes = {
        name: {how: _num_bytes(name, shape, dtypes[name], how) for how in _choices(name, shape)}
        for name, shape in source.tensors.items()
    }
    num_parameters = sum(math.prod(shape) for shape in source.tensors.values())
    _check_reach(sizes, num_parameters, target_bpw)
    costs = measure_costs(source, dtypes, sensitivities)
    options = {names: _options(names, sizes, costs) for names in _groups(costs)}
    fixed = sum(each[None] for name, each in sizes.items() if name not in costs)
    chosen = choose(options, math.floor(target_bpw * num_parameters / 8) - fixed)
    stored = {name: option.how for names, option in chosen.items() for name in names}
    return _recipe(stored, f"{target_bpw:g}bpw", rounding)


def _choices(name: str, shape: Sequence[int]) -> list[Quantization | None]:
    return choices_for(name, shape[-1]) if is_matrix(name) else [None]


def _num_bytes(name: str, shape: tuple[int, ...], dtype: str, how: Quantization | None) -> int:
    return sum(tensor.num_bytes for tensor in plan_tensors(name, shape, dtype, how))


def _check_reach(
    sizes: Mapping[str, Mapping[Quantization | None, int]], num_parameters: int, target_bpw: float
) -> None:
    least, most = (8 * sum(f(each.values()) for each in sizes.values()) / num_parameters for f in (min, max))
    if not least <= target_bpw < most:
        raise OptionError(
            f"target_bpw is {target_bpw:g}, expected {math.ceil(least * 1000) / 1000:.3f} to less than {most:.3f} bits "
            "per weight for this model (3 bits in groups of 128, up to unquantised); choose another size"
        )


def _groups(costs: Costs) -> Iterator[tuple[str, ...]]:
    """Matrices that are stored alike because they are one matrix at run time."""
    done: set[str] = set()
    for name in costs:
        if name in done:
            continue
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        kinds = next((joined for joined in _JOINED if kind in joined), (kind,))
        group = tuple(other for each in kinds if (other := f"{stem}.{each}.weight") in costs)
        done |= set(group)
        yield group


def _options(
    names: Sequence[str], sizes: Mapping[str, Mapping[Quantization | None, int]], costs: Costs
) -> list[Option]:
    shared = [how for how in costs[names[0]] if all(how in costs[name] for name in names)]
    return [
        Option(
            how=how,
            num_bytes=sum(sizes[name][how] for name in names),
            cost=sum(costs[name][how] for name in names),
        )
        for how in shared
    ]


def choose(options: Mapping[tuple[str, ...], Sequence[Option]], budget_bytes: int) -> dict[tuple[str, ...], Option]:
    """One option for each group: the step that saves most cost a byte first, until no step fits any more.

    Args:
        options: by group; the smallest ones fit together.
        budget_bytes: most bytes of all options chosen.
    """
    chosen = {names: min(each, key=lambda option: (option.num_bytes, option.cost)) for names, each in options.items()}
    left = budget_bytes - sum(option.num_bytes for option in chosen.values())
    waiting: list[tuple[float, int, tuple[str, ...], Option]] = []
    order = {names: i for i, names in enumerate(options)}

    def offer(names: tuple[str, ...]) -> None:
        step = _best_step(chosen[names], options[names], left)
        if step is not None:
            heapq.heappush(waiting, (-_saving(chosen[names], step), order[names], names, step))

    for names in options:
        offer(names)
    while waiting:
        _, _, names, step = heapq.heappop(waiting)
        more = step.num_bytes - chosen[names].num_bytes
        if more <= left:
            chosen[names] = step
            left -= more
        offer(names)
    return chosen


def _best_step(now: Option, options: Sequence[Option], left: int) -> Option | None:
    """The larger option that fits and saves most a byte."""
    better = [
        option
        for option in options
        if option.cost < now.cost and now.num_bytes < option.num_bytes <= now.num_bytes + left
    ]
    return max(better, key=lambda option: _saving(now, option), default=None)


def _saving(now: Option, step: Option) -> float:
    return (now.cost - step.cost) / (step.num_bytes - now.num_bytes)


def _recipe(stored: Mapping[str, Quantization | None], name: str, rounding: str) -> Recipe:
    """A recipe that names every matrix which is not stored as most are."""
    default = Counter(how for how in stored.values() if how is not None).most_common(1)[0][0]
    paths: dict[Quantization | None, list[str]] = {}
    for tensor, how in stored.items():
        if how != default:
            paths.setdefault(how, []).append(tensor.removesuffix(".weight"))
    rules = tuple(Rule(match=tuple(each), how=how) for how, each in paths.items())
    return Recipe(name=name, default=default, rules=rules, rounding=rounding)
