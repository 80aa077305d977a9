"""Small pictures for TensorBoard, drawn with Pillow: arrays in, (H, W, 3) uint8 out; nothing else happens."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.runtime import UserError

INK, FAINT = "#222222", "#dddddd"
BLUE, ORANGE, RED = "#0072b2", "#e69f00", "#a83c00"  # Okabe and Ito's, told apart by the colour-blind; red darkened
SMOOTH = 3  # drawn this many times larger and reduced, so that lines have no steps
WIDTH, HEIGHT = 560, 460  # pixels of a plot
MAX_POINTS = 1000  # of a line; more than there are columns of pixels cannot be seen


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Raises UserError with a Pillow that torchvision takes and that has no font of any size."""
    try:
        return ImageFont.load_default(SMOOTH * size)
    except TypeError:
        raise UserError("Pillow is older than 10.1: pip install --upgrade pillow") from None


class _Plot:
    """An empty plot from 0 to x_max and from 0 to y_max (both in percent), in the box left, top, right, bottom."""

    def __init__(self, title: str, width: int = WIDTH, height: int = HEIGHT):
        self.image = Image.new("RGB", (SMOOTH * width, SMOOTH * height), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.text(width / 2, 20, title, size=16, anchor="mm")

    def axes(self, box: tuple[int, int, int, int], x_max: float, y_max: float, x_label: str, y_label: str) -> None:
        """Start a frame with ticks and labels; what is drawn next is in its coordinates."""
        self.box, self.x_max, self.y_max = box, x_max, y_max
        left, top, right, bottom = box
        for value in ticks(x_max, 6):
            x, _ = self.at(value, 0)
            self.line([(x, top), (x, bottom)], FAINT)
            if x_label:
                self.text(x, bottom + 6, f"{value:g}", anchor="ma")
        for value in ticks(y_max, max(2, (bottom - top) // 40)):
            _, y = self.at(0, value)
            self.line([(left, y), (right, y)], FAINT)
            self.text(left - 7, y, f"{value:g}", anchor="rm")
        self.text((left + right) / 2, bottom + 26, x_label, anchor="ma")
        self.text(20, (top + bottom) / 2, y_label, anchor="mm", upright=True)

    def frame(self) -> None:
        """The border, last, so that nothing lies over it."""
        self.draw.rectangle([SMOOTH * edge for edge in self.box], outline=INK, width=SMOOTH)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point; what is beyond the frame is moved to its border."""
        left, top, right, bottom = self.box
        across, up = min(max(x / self.x_max, 0), 1), min(max(y / self.y_max, 0), 1)
        return left + across * (right - left), bottom - up * (bottom - top)

    def line(self, pixels: list[tuple[float, float]], colour: str, width: int = 1, dash: int = 0) -> None:
        """A line through `pixels`; with `dash`, strokes and gaps of that length."""
        pixels = SMOOTH * np.asarray(pixels, dtype=float)
        if not dash:
            self.draw.line([tuple(p) for p in pixels], fill=colour, width=SMOOTH * width, joint="curve")
            return
        length = np.concatenate([[0], np.linalg.norm(np.diff(pixels, axis=0), axis=1).cumsum()])
        for start in np.arange(0, length[-1], 2 * SMOOTH * dash):
            stop = min(start + SMOOTH * dash, length[-1])
            places = [start, *length[(length > start) & (length < stop)], stop]
            stroke = [tuple(np.interp(p, length, axis) for axis in pixels.T) for p in places]
            self.draw.line(stroke, fill=colour, width=SMOOTH * width, joint="curve")

    def bar(self, left: float, right: float, low: float, high: float, colour: str | None, outline: str) -> None:
        (x0, y0), (x1, y1) = self.at(left, high), self.at(right, low)
        box = [SMOOTH * edge for edge in (x0, y0, x1, y1)]
        self.draw.rectangle(box, fill=colour, outline=outline, width=SMOOTH)

    def text(self, x: float, y: float, text: str, size=13, anchor="lm", colour=INK, upright=False) -> None:
        """`anchor` is Pillow's; `upright` text reads from bottom to top and is centred."""
        font = load_font(size)
        if not upright:
            self.draw.text((SMOOTH * x, SMOOTH * y), text, fill=colour, font=font, anchor=anchor)
            return
        left, top, right, bottom = font.getbbox(text)
        words = Image.new("RGB", (int(right - left) + 2, int(bottom - top) + 2), "white")
        ImageDraw.Draw(words).text((1 - left, 1 - top), text, fill=colour, font=font)
        words = words.rotate(90, expand=True)
        self.image.paste(words, (int(SMOOTH * x - words.width / 2), int(SMOOTH * y - words.height / 2)))

    def legend(self, entries: list[tuple[str, str, int, int]]) -> None:
        """A row of (text, colour, width, dash) between title and frame, where it covers nothing."""
        x = 75
        for text, colour, width, dash in entries:
            self.line([(x, 47), (x + 26, 47)], colour, width, dash)
            self.text(x + 34, 47, text)
            x += 60 + load_font(13).getlength(text) / SMOOTH

    def pixels(self) -> np.ndarray:
        return np.asarray(self.image.reduce(SMOOTH))


def ticks(top: float, most: int) -> list[float]:
    """At most `most` + 1 round values, evenly spaced, from 0 to `top`."""
    step = next(m * 10.0**e for e in range(-4, 9) for m in (1, 2, 5) if m * 10.0**e * most >= top)
    return [round(i * step, 6) for i in range(int(top / step + 1e-9) + 1)]


def reliability_diagram(samples: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Accuracy in each of B bins of confidence, its gap to the mean confidence, and the share of images.

    Args:
        samples, confidence, right: (B,) sums over each bin, as `utils.metrics.reliability` gives them: images,
            their confidences, and right answers.
    """
    bins, total = len(samples), samples.sum()
    ece = 100 * np.abs(right - confidence).sum() / total
    plot = _Plot(f"Reliability: ECE {ece:.2f} %, {bins} bins, {total:.0f} images")
    plot.legend([("accuracy", BLUE, 9, 0), ("mean confidence", ORANGE, 3, 0), ("perfect calibration", INK, 1, 5)])
    plot.axes((75, 65, WIDTH - 25, 310), 100, 100, "", "accuracy (%)")
    for i in np.flatnonzero(samples):
        left, end = 100 * i / bins, 100 * (i + 1) / bins
        accuracy, sure = 100 * right[i] / samples[i], 100 * confidence[i] / samples[i]
        plot.bar(left, end, 0, accuracy, BLUE, "white")
        plot.bar(left + 15 / bins, end - 15 / bins, min(accuracy, sure), max(accuracy, sure), None, ORANGE)
        plot.line([plot.at(left, sure), plot.at(end, sure)], ORANGE, width=3)
    plot.line([plot.at(0, 0), plot.at(100, 100)], INK, dash=5)
    plot.frame()
    share = 100 * samples / total
    plot.axes((75, 328, WIDTH - 25, HEIGHT - 50), 100, max(share.max(), 1) * 1.05, "confidence (%)", "images (%)")
    for i in np.flatnonzero(samples):
        plot.bar(100 * i / bins, 100 * (i + 1) / bins, 0, share[i], "#999999", "white")
    plot.frame()
    return plot.pixels()


def risk_coverage(curve: np.ndarray, perfect: np.ndarray) -> np.ndarray:
    """Error among the most confident images against the share of images that they are.

    Args:
        curve: (M,), as `utils.metrics.risk_coverage_curve` gives it; its mean, times 1000, is AURC.
        perfect: (M,), the same of an ordering that has every mistake last; AURC less its mean is E-AURC.
    """
    aurc, least, error = 1000 * curve.mean(), 1000 * perfect.mean(), 100 * curve[-1]
    plot = _Plot(f"Risk-coverage: AURC {aurc:.2f}, E-AURC {aurc - least:.2f} (x 1000)")
    # The error among a handful of images jumps; the scale is set by the rest.
    top = 1.1 * max(error, 100 * curve[len(curve) // 20 :].max(), 0.1)
    plot.legend([("by confidence", BLUE, 3, 0), ("perfect order", ORANGE, 2, 7), ("random order", INK, 1, 3)])
    box = (75, 65, WIDTH - 25, HEIGHT - 55)
    plot.axes(box, 100, top, "coverage: share of images, most confident first (%)", "error among them (%)")
    which = np.unique(np.linspace(0, len(curve) - 1, MAX_POINTS).astype(int))
    for values, colour, width, dash in ((perfect, ORANGE, 2, 7), (curve, BLUE, 3, 0)):
        plot.line([plot.at(100 * (k + 1) / len(curve), 100 * values[k]) for k in which], colour, width, dash)
    plot.line([plot.at(0, error), plot.at(100, error)], INK, dash=3)
    plot.frame()
    return plot.pixels()


def sheet(images: np.ndarray, captions: Sequence[Sequence[str]], title: str, columns: int = 8) -> np.ndarray:
    """Images in rows, lines of text under each: the first dark, those after it red.

    Args:
        images: (n, 3, S, S) uint8, n at least 1; small ones are enlarged by a whole number, pixels kept square.
        captions: n captions of equally many lines; a line that is too long for its image is cut.
    """
    size = images.shape[-1] * max(1, round(96 / images.shape[-1]))
    columns = min(columns, len(images))
    cell, line = size + 8, 15
    row = cell + line * len(captions[0]) + 4
    width = max(columns * cell + 8, 520)
    plot = _Plot(title, width, 40 + -(-len(images) // columns) * row)
    font = load_font(12)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 8 + i % columns * cell, 40 + i // columns * row
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        plot.image.paste(
            picture.resize((SMOOTH * size, SMOOTH * size), Image.Resampling.NEAREST), (SMOOTH * x, SMOOTH * y)
        )
        for j, text in enumerate(caption):
            short = text
            while font.getlength(short) > SMOOTH * size:
                text = text[:-1]
                short = text + "…"
            plot.text(x, y + size + 10 + j * line, short, size=12, colour=RED if j else INK)
    return plot.pixels()
