"""The SVG of a recorded timeline, written by hand; it follows the reader's light or dark scheme."""

from typing import Any

WIDTH, LEFT, RIGHT, ROW, PANEL, TOP, AXIS = 960, 84, 16, 26, 150, 34, 34
LANES = ("link", "read back", "expand", "experts", "compute")
STYLE = """
text{font:13px system-ui,sans-serif;fill:#24292f}.small{font-size:11px;fill:#57606a}.back{fill:#fff}
.lane{fill:#f0f3f6}.link{fill:#0969da;stroke:#fff}.expand,.experts{fill:#bf8700}.read-back{fill:#8250df}.compute{fill:#1a7f37}
.number{font-size:11px;fill:#fff;text-anchor:middle}.middle{text-anchor:middle}.tick{stroke:#57606a}
.token{stroke:#cf222e}.right{text-anchor:end}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.back{fill:#0d1117}.lane{fill:#1c2229}
.link{fill:#1f6feb;stroke:#0d1117}.expand,.experts{fill:#d29922}.read-back{fill:#ab7df8}.compute{fill:#3fb950}.number{fill:#fff}.tick{stroke:#9198a1}.token{stroke:#ff7b72}}
"""


def draw(result: dict[str, Any]) -> str:
    """A panel for each quantization, one above the other."""
    parts, top = [], 0.0
    for quant, recorded in result["quants"].items():
        parts += panel(result["model"], quant, recorded, top)
        top += max(PANEL, TOP + ROW * len(_lanes(recorded)) + AXIS)
    size = f'viewBox="0 0 {WIDTH} {top:.0f}" width="{WIDTH}" height="{top:.0f}"'
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>'
    return "\n".join([opened, f'<rect class="back" width="{WIDTH}" height="{top:.0f}"/>', *parts, "</svg>\n"])


def _lanes(recorded: dict[str, Any]) -> list[str]:
    return [lane for lane in LANES if recorded.get(lane)]


def panel(model: str, quant: str, recorded: dict[str, Any], top: float) -> list[str]:
    """Rows of spans over a time axis from the first token to the last."""
    length = recorded.get("end_us", recorded["tokens_us"][-1])
    scale = (WIDTH - LEFT - RIGHT) / length
    lanes = _lanes(recorded)
    bottom = top + TOP + ROW * len(lanes)
    busy = sum(min(at + took, length) - max(at, 0) for at, took, *_ in recorded["link"]) / length
    part = "an expert" if "expert_bytes" in recorded else "a layer"
    megabytes = recorded.get("expert_bytes", recorded.get("slab_bytes")) / 1e6
    title = f"{model}, {quant}: {megabytes:.0f} MB {part}; the link is busy {busy:.1%} of the time"
    parts = [f'<text x="{LEFT}" y="{top + 20:.0f}">{title}</text>']
    parts.append(
        f'<text class="small right" x="{WIDTH - RIGHT}" y="{top + 20:.0f}">red: the token of a step is known</text>'
    )
    for row, lane in enumerate(lanes):
        parts += spans(lane, recorded[lane], length, scale, top + TOP + row * ROW)
    for at in recorded["tokens_us"]:
        parts.append(f'<path class="token" d="M{LEFT + at * scale:.1f} {top + TOP - 6:.0f}V{bottom + 4:.0f}"/>')
    return [*parts, *axis(length, scale, bottom)]


def spans(lane: str, recorded: list[list[float]], length: float, scale: float, y: float) -> list[str]:
    """A row: what the lane did, cut off where the axis begins and ends, with layers' numbers where they have room."""
    high = f'y="{y + 2:.0f}" height="{ROW - 4}"'
    parts = [f'<text class="right" x="{LEFT - 8}" y="{y + 17:.0f}">{lane}</text>']
    parts.append(f'<rect class="lane" x="{LEFT}" width="{length * scale:.1f}" {high}/>')
    kind, least = lane.replace(" ", "-"), 2.0 if lane == "read back" else 0.5  # a few µs that should be seen
    for at, took, *layer in recorded:
        x, wide = LEFT + max(at, 0) * scale, (min(at + took, length) - max(at, 0)) * scale
        parts.append(f'<rect class="{kind}" x="{x:.2f}" width="{max(wide, least):.2f}" {high}/>')
        if layer and wide > 12:
            parts.append(f'<text class="number" x="{x + wide / 2:.1f}" y="{y + 17:.0f}">{layer[0]}</text>')
    return parts


def axis(length: float, scale: float, y: float) -> list[str]:
    """Ticks with milliseconds."""
    step = next(each for each in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1 << 40) if length / 1e3 / each <= 14)
    parts = []
    for ms in range(0, int(length / 1e3) + 1, step):
        x, unit = LEFT + ms * 1e3 * scale, "" if ms else " ms"
        parts.append(f'<path class="tick" d="M{x:.1f} {y + 4:.0f}v4"/>')
        parts.append(f'<text class="small middle" x="{x:.1f}" y="{y + 20:.0f}">{ms}{unit}</text>')
    return parts
