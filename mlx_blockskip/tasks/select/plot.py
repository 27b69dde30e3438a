"""The picture of a block selection: the sum of Eq. 2 over (n, m) with the chosen plans, or distances by window.

Drawn by matplotlib, which is in the extra `plot`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_blockskip.engine import files

ABSENT = "no picture was drawn, since matplotlib is not installed: pip install 'mlx-blockskip[plot]'"
CHOSEN = "#b23a2e"


def write(path: Path, record: Mapping[str, Any], kinds: Sequence[str]) -> bool:
    """Draw what selection.json holds into a PNG file; False where matplotlib is absent. kinds: of the model's blocks,
    in order.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 7), layout="constrained")
    draw = _windows if "windows" in record else _heat_map
    draw(figure.subplots(), record, kinds)
    with files.atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True


def _heat_map(axes: Any, record: Mapping[str, Any], kinds: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    first, last = (np.array(record[end]) for end in ("first", "last"))
    n, m = np.indices((len(first), len(last)))
    table = np.where(n + m < len(first), first[:, None] + last[None, :], np.nan)
    shown = axes.imshow(table, cmap="Blues")
    for plan in record["plans"].values():
        place = plan["m"] - 0.5, plan["n"] - 0.5
        axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=CHOSEN, linewidth=2))
    axes.figure.colorbar(shown, label="distance")
    axes.set(
        title=f"The first n and the last m of {record['depth']} blocks masked;\nframed: the least for its n + m",
        xlabel="m, last blocks", ylabel="n, first blocks",
    )  # fmt: skip


def _windows(axes: Any, record: Mapping[str, Any], kinds: Sequence[str]) -> None:
    windows = record["windows"]
    for kind in dict.fromkeys(kinds):
        own = [window for window in windows if kinds[window["start"]] == kind]
        starts, distances = [window["start"] for window in own], [window["distance"] for window in own]
        axes.bar(starts, distances, label=f"{kind} block")
    axes.legend()
    axes.set(
        title=f"{windows[0]['stop'] - windows[0]['start']} consecutive blocks masked",
        xlabel="first block of the window", ylabel="distance",
    )  # fmt: skip
