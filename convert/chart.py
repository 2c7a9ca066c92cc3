"""The picture of a quality report: error and changed experts by layer, as SVG, which needs no library."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from .divergence import LayerError

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 280, 56, 36, 40


def layer_chart(layers: Sequence[LayerError], title: str) -> str:
    """An SVG: a bar for each layer's relative error, a dot for the share of tokens with other experts."""
    most = max([layer.error for layer in layers] + [layer.changed_experts or 0.0 for layer in layers] + [1e-6])
    step = (_WIDTH - _LEFT - 16) / max(1, len(layers))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="13">{escape(title)}</text>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share * most, most)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * most:.1%}</text>')
    for i, layer in enumerate(layers):
        x, y = _LEFT + i * step, _y(layer.error, most)
        parts.append(
            f'<rect x="{x + step * 0.15:.1f}" y="{y:.1f}" width="{step * 0.7:.1f}" '
            f'height="{_HEIGHT - _BOTTOM - y:.1f}" fill="#4477aa"/>'
        )
        if layer.changed_experts is not None:
            y = _y(layer.changed_experts, most)
            parts.append(f'<circle cx="{x + step / 2:.1f}" cy="{y:.1f}" r="3.5" fill="#ee6677"/>')
        parts.append(f'<text x="{x + step / 2:.1f}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">{i}</text>')
    legend = "layer; bars: relative error of its output; dots: share of tokens with other experts"
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{legend}</text></svg>')
    return "\n".join(parts) + "\n"


def _y(value: float, most: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / most
