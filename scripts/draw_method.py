#!/usr/bin/env python
"""Draw the README's picture: the backbone, its exits, and the three losses as arrows.

python scripts/draw_method.py        # writes scripts/results/method.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import figures
from utils.parser import Parser

# All positions are in inches; x and y of a box are its middle.
SIZE = 11.2, 5.4
EXITS = 3.4, 5.1, 6.8  # columns: stages 1 to 3, with their exits
FINAL = 8.5  # stage 4, with the final classifier
LEFT, RIGHT = 1.4, 10.4  # what goes in, and what is kept
STAGE, EXIT, FEATURE, PREDICTION, LABEL = 0.35, 1.2, 2.4, 3.85, 5.0  # rows
BELOW_FEATURE, ABOVE_FEATURE, BELOW_PREDICTION = 1.82, 2.93, 3.37  # lines between rows, along which losses go
HALF_WIDTH, HALF_HEIGHT = 0.65, 0.25  # of a box
ASIDE = 0.36  # by which losses avoid the network's own arrows
FONT = 11.5  # points: on a page 830 pixels wide as large as its text
# Okabe and Ito's colours, distinguishable by the colour-blind; the green is darker, so that text is legible.
PSKD, BYOT, DML, NETWORK = "#0072b2", "#d55e00", "#007a55", "#555555"


def draw_box(axis, x: float, y: float, text: str, half_width=HALF_WIDTH, edge=NETWORK, face="#f4f4f4") -> None:
    from matplotlib.patches import FancyBboxPatch  # here: matplotlib may be missing

    corner = x - half_width, y - HALF_HEIGHT
    style = "round,pad=0,rounding_size=0.08"
    box = FancyBboxPatch(
        corner, 2 * half_width, 2 * HALF_HEIGHT, boxstyle=style, edgecolor=edge, facecolor=face, zorder=5
    )
    axis.add_patch(box)
    axis.text(x, y, text, ha="center", va="center", fontsize=FONT, zorder=6)


def draw_arrow(axis, points: list[tuple[float, float]], colour=NETWORK, both=False) -> None:
    """A line through the points, with a head at its end and, if `both`, at its start. Losses interrupt what they
    cross of the network."""
    layer = 1 if colour == NETWORK else 3
    x, y = zip(*points, strict=True)
    axis.plot(x, y, color="white", linewidth=6, zorder=layer, solid_capstyle="butt")
    axis.plot(x, y, color=colour, linewidth=1.8, zorder=layer + 1)
    style = "-|>,head_length=0.65,head_width=0.3"
    head = {"arrowstyle": style, "color": colour, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", points[-1], points[-2], arrowprops=head, zorder=layer + 1)
    if both:
        axis.annotate("", points[0], points[1], arrowprops=head, zorder=layer + 1)


def draw_up(axis, x: float, low: float, high: float) -> None:
    """From the box in row `low` to the one in row `high`."""
    draw_arrow(axis, [(x, low + HALF_HEIGHT), (x, high - HALF_HEIGHT)])


def draw_down(axis, x: float, high: float, low: float, colour: str) -> None:
    """From the box in row `high` to the one in row `low`."""
    draw_arrow(axis, [(x, high - HALF_HEIGHT), (x, low + HALF_HEIGHT)], colour)


def draw_right(axis, left: float, right: float, y: float, colour=NETWORK) -> None:
    """From the box in column `left` to the one in column `right`."""
    draw_arrow(axis, [(left + HALF_WIDTH, y), (right - HALF_WIDTH, y)], colour)


def draw_to_exits(axis, edge: float, line: float, colour: str, both=False) -> None:
    """From the final classifier's box, whose edge is at y = `edge`, along the height `line` to each exit's box."""
    start = FINAL - ASIDE
    for x in EXITS:
        end = x + ASIDE
        draw_arrow(axis, [(start, edge), (start, line), (end, line), (end, edge)], colour, both)


def draw_name(axis, x: float, y: float, name: str, text: str, colour: str) -> None:
    """A method's name and, below y, what it does."""
    axis.text(x, y, name, ha="center", va="bottom", color=colour, fontsize=FONT + 3, fontweight="bold")
    axis.text(x, y - 0.04, text, ha="center", va="top", color=colour, fontsize=FONT)


def draw_network(axis) -> None:
    """The stages from left to right; above each its exit, feature and prediction."""
    draw_box(axis, LEFT, STAGE, "image")
    before = LEFT
    for i, x in enumerate((*EXITS, FINAL), start=1):
        draw_right(axis, before, x, STAGE)
        draw_box(axis, x, STAGE, f"stage {i}", face="#dddddd")
        if x == FINAL:
            draw_up(axis, x, STAGE, FEATURE)
        else:
            draw_up(axis, x, STAGE, EXIT)
            draw_box(axis, x, EXIT, f"exit {i}", face="#dddddd")
            draw_up(axis, x, EXIT, FEATURE)
        draw_box(axis, x, FEATURE, f"feature $F_{i}$")
        draw_up(axis, x, FEATURE, PREDICTION)
        draw_box(axis, x, PREDICTION, f"prediction $P_{i}$")
        before = x


def draw_label(axis) -> None:
    """The soft label, and the final classifier's cross-entropy with it."""
    draw_box(axis, LEFT, LABEL, "label")
    draw_right(axis, LEFT, EXITS[0], LABEL)
    text = r"soft label $=\ (1 - \alpha_t)$ label $+\ \alpha_t$ prediction $P_4$ of the previous epoch"
    middle, width = (EXITS[0] + FINAL) / 2, FINAL - EXITS[0]
    draw_box(axis, middle, LABEL, text, width / 2 + HALF_WIDTH)
    draw_down(axis, FINAL, LABEL, PREDICTION, NETWORK)


def draw_losses(axis) -> None:
    draw_right(axis, FINAL, RIGHT, PREDICTION, PSKD)
    draw_box(axis, RIGHT, PREDICTION, "kept for the\nnext epoch", edge=PSKD)
    draw_arrow(axis, [(RIGHT, PREDICTION + HALF_HEIGHT), (RIGHT, LABEL), (FINAL + HALF_WIDTH, LABEL)], PSKD)
    draw_name(axis, RIGHT, 3.2, "PS-KD", "own predictions\nsoften the label", PSKD)

    for x in EXITS:
        draw_down(axis, x, LABEL, PREDICTION, BYOT)
    draw_to_exits(axis, PREDICTION - HALF_HEIGHT, BELOW_PREDICTION, BYOT)
    draw_to_exits(axis, FEATURE + HALF_HEIGHT, ABOVE_FEATURE, BYOT)
    draw_name(axis, LEFT, 3.25, "BYOT", "$P_4$, $F_4$ and the label\nteach the exits", BYOT)

    draw_to_exits(axis, FEATURE - HALF_HEIGHT, BELOW_FEATURE, DML, both=True)
    draw_name(axis, LEFT, 1.85, "DML", "exits' features and $F_4$\nlearn from each other", DML)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = Path(__file__).resolve().parent / "results" / "method.png"
    parser.add_argument("--out", type=Path, default=path, metavar="FILE", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        with figures.drawing() as Figure:
            figure = Figure(figsize=SIZE, layout="none")
            axis = figure.add_axes((0, 0, 1, 1), xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
            axis.axis("off")
            draw_network(axis)
            draw_label(axis)
            draw_losses(axis)
            figure.savefig(args.out, dpi=140, facecolor="white", pil_kwargs={"optimize": True})
    except ImportError:
        sys.exit("error: matplotlib is missing: pip install -r scripts/requirements.txt")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
