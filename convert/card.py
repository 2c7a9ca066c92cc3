"""The model card: README.md of a converted folder, as the hub shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm_mlx.config import read_json_object
from lfm_mlx.terminal import format_bytes

NAME = "README.md"

_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(/[^/]+)?$")
_LICENSE_KEYS = ("license", "license_name", "license_link")
_DEFAULT_LICENSE = {"license": "other", "license_name": "lfm1.0", "license_link": "LICENSE"}
_NOTICE = (
    "The weights derive from Liquid AI's and stay under their licence, for LFM2 and LFM2.5 the **LFM Open License "
    "v1.0**. It limits commercial use: companies with a yearly revenue of 10 million US dollars or more need an "
    "agreement with Liquid AI. Read the licence before you use or pass on these files."
)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a source came from.

    Args:
        name: repo id, or the folder's or file's own name.
        revision: the commit, None for what is no repo.
    """

    name: str
    revision: str | None

    @classmethod
    def of(cls, source: Path) -> Origin:
        """The origin that a path tells: the hub's cache names repo and commit."""
        match = _SNAPSHOT.search(source.as_posix())
        if match is None:
            return cls(name=source.name, revision=None)
        organisation, name, revision, inside = match.groups()
        return cls(name=f"{organisation}/{name}{inside or ''}", revision=revision)


def write_card(folder: Path, source: Path, options: Mapping[str, Any], num_bytes: int, bits_per_weight: float) -> None:
    """Write the card of the checkpoint in `folder`.

    Args:
        folder: the converted checkpoint; quality.json there goes into the card.
        source: what was converted.
        options: ``recipe`` as JSON, and ``dtype``.
        num_bytes: bytes of its tensors.
        bits_per_weight: bits for each value.
    """
    origin, recipe = Origin.of(source), options["recipe"]
    front = {"library_name": "mlx", **_license(source), "pipeline_tag": "text-generation"}
    if origin.revision is not None:
        front |= {"base_model": "/".join(origin.name.split("/")[:2])}
    lines = ["---", *(f"{key}: {value}" for key, value in front.items()), "tags:", "- mlx", "- lfm2", "---", ""]
    lines += [f"# {origin.name.split('/')[-1]}, {recipe['name']}", ""]
    revision = "" if origin.revision is None else f" at revision `{origin.revision}`"
    lines += [
        f"Made from `{origin.name}`{revision} by lfm_mlx with recipe `{recipe['name']}` (rounding: "
        f"{recipe['rounding']}): {format_bytes(num_bytes)}, {bits_per_weight:.3f} bits per weight. `manifest.json` has "
        "the recipe and the SHA-256 of every file read and written.",
        "",
        "```sh",
        'python -m lfm_mlx.generate --model FOLDER --prompt "Why is the sky blue?"',
        'mlx_lm.generate --model FOLDER --prompt "Why is the sky blue?"',
        "```",
        "",
        *_quality_lines(folder),
        "## Licence",
        "",
        _NOTICE,
        "",
    ]
    (folder / NAME).write_text("\n".join(lines), encoding="utf-8")


def _license(source: Path) -> dict[str, str]:
    """What the source's own card says about its licence, the published models' where it says nothing."""
    try:
        card = (source / NAME).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return _DEFAULT_LICENSE
    front = card.split("\n---", 1)[0] if card.startswith("---\n") else ""
    found = dict(re.findall(rf"^({'|'.join(_LICENSE_KEYS)}): *(\S.*)$", front, re.MULTILINE))
    return found or _DEFAULT_LICENSE


def _quality_lines(folder: Path) -> list[str]:
    quality = read_json_object(folder / "quality.json")
    if quality is None:
        return []
    lines = ["## Quality", "", "Against the unquantised source; more in [QUALITY.md](QUALITY.md).", ""]
    lines += ["| | KL divergence, mean | same likeliest token |", "|---|---|---|"]
    for name, key in (("text", "text"), ("answers with tools", "answers")):
        if found := quality.get(key):
            lines.append(f"| {name} | {found['kl_mean']:.5f} | {found['top1_agreement']:.2%} |")
    calls = quality.get("calls")
    if calls:
        lines += ["", f"Tool calls the same as the source's: {calls['num_alike']} of {calls['num_calling']}."]
    return [*lines, ""]
