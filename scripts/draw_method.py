#!/usr/bin/env python
"""Draw the README's picture: the backbone, its exits, and the three losses as arrows.

python scripts/draw_method.py        # writes scripts/results/method.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import figures

WIDTH, HEIGHT = 11.0, 5.4  # inches, and the unit of all positions
COLUMNS = (3.3, 5.0, 6.7, 8.4)  # of the backbone's stages
LEFT, RIGHT = 1.6, 10.05  # beside them: what goes in, what is kept
STAGE, EXIT, FEATURE, PREDICTION, LABEL = 0.35, 1.2, 2.4, 3.85, 5.0  # rows
BELOW_FEATURE, ABOVE_FEATURE, BELOW_PREDICTION = 1.82, 2.93, 3.37  # lines from the final classifier to the exits
FONT = 11.5  # points: on a page 830 pixels wide as large as its text
HALF = 0.22  # of a box's height
BESIDE = 0.36  # from the middle of a box to where the losses' arrows end, beside the network's own
# Okabe and Ito's colours, distinguishable by the colour-blind; the green is darker, so that text is legible.
PSKD, BYOT, DML, NETWORK = "#0072b2", "#d55e00", "#007a55", "#555555"


def draw_box(axis, x: float, y: float, text: str, width=1.3, height=2 * HALF, edge=NETWORK, face="#f4f4f4") -> None:
    from matplotlib.patches import FancyBboxPatch  # here: matplotlib may be missing

    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.08"
    axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, edgecolor=edge, facecolor=face, zorder=5))
    axis.text(x, y, text, ha="center", va="center", fontsize=FONT, zorder=6)


def draw_arrow(axis, points: list[tuple[float, float]], colour=NETWORK, both=False) -> None:
    """A line through the points, with a head at its end and, if `both`, at its start. Losses interrupt what they
    cross of the network."""
    layer = 1 if colour == NETWORK else 3
    x, y = zip(*points, strict=True)
    axis.plot(x, y, color="white", linewidth=6, zorder=layer, solid_capstyle="butt")
    axis.plot(x, y, color=colour, linewidth=1.8, zorder=layer + 1)
    head = {"arrowstyle": "-|>,head_length=0.65,head_width=0.3", "color": colour, "linewidth": 1.8}
    head |= {"shrinkA": 0, "shrinkB": 0}
    axis.annotate("", points[-1], points[-2], arrowprops=head, zorder=layer + 1)
    if both:
        axis.annotate("", points[0], points[1], arrowprops=head, zorder=layer + 1)


def draw_name(axis, x: float, y: float, name: str, text: str, colour: str) -> None:
    """A method's name and, below it, what it does; y is the middle of both."""
    axis.text(x, y + 0.02, name, ha="center", va="bottom", color=colour, fontsize=FONT + 3, fontweight="bold")
    axis.text(x, y - 0.02, text, ha="center", va="top", color=colour, fontsize=FONT)


def draw_network(axis) -> None:
    """The stages from left to right; above each its exit, feature and prediction."""
    draw_box(axis, LEFT, STAGE, "image", width=0.9)
    draw_arrow(axis, [(LEFT + 0.45, STAGE), (COLUMNS[0] - 0.65, STAGE)])
    for i, x in enumerate(COLUMNS, start=1):
        top = STAGE + HALF
        draw_box(axis, x, STAGE, f"stage {i}", face="#dddddd")
        if i < len(COLUMNS):
            draw_arrow(axis, [(x + 0.65, STAGE), (COLUMNS[i] - 0.65, STAGE)])
            draw_box(axis, x, EXIT, f"exit {i}", face="#dddddd")
            draw_arrow(axis, [(x, top), (x, EXIT - HALF)])
            top = EXIT + HALF
        draw_arrow(axis, [(x, top), (x, FEATURE - HALF)])
        draw_box(axis, x, FEATURE, f"feature $F_{i}$")
        draw_arrow(axis, [(x, FEATURE + HALF), (x, PREDICTION - HALF)])
        draw_box(axis, x, PREDICTION, f"prediction $P_{i}$")


def draw_exits_losses(axis) -> None:
    """BYOT and DML: from the final classifier along a line to each exit."""
    *exits, final = COLUMNS
    start = final - BESIDE
    for x in exits:
        end = x + BESIDE
        for row, line, colour in (
            (PREDICTION - HALF, BELOW_PREDICTION, BYOT),
            (FEATURE + HALF, ABOVE_FEATURE, BYOT),
            (FEATURE - HALF, BELOW_FEATURE, DML),
        ):
            draw_arrow(axis, [(start, row), (start, line), (end, line), (end, row)], colour, both=colour == DML)
        draw_arrow(axis, [(x, LABEL - HALF), (x, PREDICTION + HALF)], BYOT)
    draw_name(axis, LEFT - 0.3, 3.25, "BYOT", "$P_4$, $F_4$ and the label\nteach the exits", BYOT)
    draw_name(axis, LEFT - 0.3, 1.82, "DML", "exits' features and $F_4$\nlearn from each other", DML)


def draw_labels(axis) -> None:
    """PS-KD: the label, and what the last epoch predicted, become the soft label."""
    first, final = COLUMNS[0], COLUMNS[-1]
    draw_box(axis, LEFT, LABEL, "label", width=0.9)
    draw_arrow(axis, [(LEFT + 0.45, LABEL), (first - 0.65, LABEL)])
    text = r"soft label $=\ (1 - \alpha_t)$ label $+\ \alpha_t$ prediction $P_4$ of the previous epoch"
    draw_box(axis, (first + final) / 2, LABEL, text, width=final - first + 1.3)
    draw_arrow(axis, [(final, LABEL - HALF), (final, PREDICTION + HALF)])
    draw_arrow(axis, [(final + 0.65, PREDICTION), (RIGHT - 0.6, PREDICTION)], PSKD)
    draw_box(axis, RIGHT, PREDICTION, "kept for the\nnext epoch", width=1.2, height=0.6, edge=PSKD)
    draw_arrow(axis, [(RIGHT, PREDICTION + 0.3), (RIGHT, LABEL), (final + 0.65, LABEL)], PSKD)
    draw_name(axis, RIGHT, 3.15, "PS-KD", "own predictions\nsoften the label", PSKD)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = Path(__file__).resolve().parent / "results" / "method.png"
    parser.add_argument("--out", type=Path, default=path, metavar="FILE", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        with figures.drawing() as Figure:
            figure = Figure(figsize=(WIDTH, HEIGHT), layout="none")
            axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
            axis.axis("off")
            draw_network(axis)
            draw_exits_losses(axis)
            draw_labels(axis)
            figure.savefig(args.out, dpi=140, facecolor="white", pil_kwargs={"optimize": True})
    except ImportError:
        sys.exit("error: matplotlib is missing: pip install -r scripts/requirements.txt")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
