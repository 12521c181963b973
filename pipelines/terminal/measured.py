"""Figures for people: each beside what it is to be held against, alike in the terminal, on pages and on model cards.

Names that are known have words; any other figure is told by its own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipelines.dataset.figures import Figure
from pipelines.terminal.words import number

HEADLINE = 3
"""Number of figures that stand for all of them where there is one line: the stages tell the most telling first."""
FAITHFULNESS = "faithfulness"
SUBJECTS = {"seen": "", "held_out": "held out"}
"""Words that follow a figure's name; pictures for captions that the model has seen are what is meant without a word."""


@dataclass(frozen=True)
class Words:
    """What people call a figure, shortly and in full, and its unit."""

    short: str
    full: str
    unit: str = ""
    digits: str = ""
    """Format of its values, where it isn't `words.number`'s."""
    floor: str = "real images"
    """What they call its floor."""


WORDS = {
    "kernel_distance": Words("KID", "kernel distance (KID)", floor="floor"),
    "frechet_distance": Words("FD", "Frechet distance (FD)", floor="floor"),
    "monge_distance": Words("MIND", "Monge distance (MIND)", floor="floor"),
    "clip_score": Words("CLIP score", "CLIP score"),
    "psnr": Words("PSNR", "PSNR", unit=" dB", digits=".1f"),
    FAITHFULNESS: Words("prompt faithfulness z", "prompt faithfulness (z)"),
}


@dataclass(frozen=True)
class Told:
    """A figure in words."""

    title: str
    """ "KID", "PSNR held out"."""
    full_title: str
    by: str
    """The network that it is of; empty where it is of none."""
    value: str
    """ "0.041 ± 0.002"."""
    floor: str
    """Empty where it isn't known; so are the next two."""
    untrained: str
    closed: str
    """ "87 %"."""
    floor_word: str
    is_one_of_several: bool
    """Another figure differs from it in its network alone."""

    @property
    def named(self) -> str:
        """The title, with the network where that alone tells it from another: "KID inception_2048"."""
        return f"{self.title} {self.by}" if self.is_one_of_several else self.title

    @property
    def headline(self) -> str:
        """ "KID 0.041 ± 0.002"."""
        return f"{self.named} {self.value}"

    @property
    def sentence(self) -> str:
        """ "KID 0.041 ± 0.002 (untrained 0.31, floor 0.002; 87 % closed)"."""
        beside = {"untrained": self.untrained, self.floor_word: self.floor}
        words = ", ".join(f"{name} {value}" for name, value in beside.items() if value)
        told = "; ".join(filter(None, (words, f"{self.closed} closed" if self.closed else "")))
        return self.headline + (f" ({told})" if told else "")


def told(figures: Sequence[Figure]) -> list[Told]:
    """Each in words, in their order."""
    return [_told(figure, is_one_of_several=_alike(figure, figures) > 1) for figure in figures]


def sentences(figures: Sequence[Figure]) -> list[str]:
    """All figures in words, one line each; those of faithfulness by one network in one."""
    lines: dict[str, None] = {}
    for figure, words in zip(figures, told(figures), strict=True):
        lines[_faithful(figure.extractor, figures) if figure.name == FAITHFULNESS else words.sentence] = None
    return list(lines)


def headline(figures: Sequence[Figure]) -> str:
    """ "KID 0.041 ± 0.002, FD 169, CLIP score 27.3": the first ones; empty where there are none."""
    return ", ".join(one.headline for one in told(figures)[:HEADLINE])


def networks(figures: Iterable[Figure]) -> list[str]:
    """The networks that figures are of, in order."""
    return sorted({figure.extractor for figure in figures if figure.extractor})


def _told(figure: Figure, *, is_one_of_several: bool) -> Told:
    plain = figure.name.replace("_", " ")
    words = WORDS.get(figure.name, Words(plain, plain))

    def shown(value: float | None) -> str:
        if value is None:
            return ""
        return format(value, words.digits) if words.digits else number(value)

    subject = SUBJECTS.get(figure.subject, figure.subject.replace("_", " "))
    by = figure.extractor or ""
    error = f" ± {shown(figure.error)}" if figure.error is not None else ""
    short, full = (" ".join(filter(None, (name, subject))) for name in (words.short, words.full))
    # Standard errors have no scale to be closed on.
    closed = None if figure.name == FAITHFULNESS else figure.closed
    return Told(
        title=short,
        full_title=full,
        by=by,
        value=f"{shown(figure.value)}{error}{words.unit}",
        floor=shown(figure.floor),
        untrained=shown(figure.untrained),
        closed="" if closed is None else f"{round(100 * closed)} %",
        floor_word=words.floor,
        is_one_of_several=is_one_of_several,
    )


def _alike(figure: Figure, figures: Sequence[Figure]) -> int:
    return sum((other.name, other.subject) == (figure.name, figure.subject) for other in figures)


def _faithful(extractor: str | None, figures: Sequence[Figure]) -> str:
    """How many standard errors a picture is more like its own prompt than like others: about 0 if it knows nothing."""
    sides = {"seen": "for seen captions", "held_out": "for held-out ones"}
    words = []
    beside = []
    for figure in figures:
        if (figure.name, figure.extractor) == (FAITHFULNESS, extractor):
            words.append(f"{figure.value:.1f} {sides.get(figure.subject, f'for {figure.subject}')}")
            for name, value in (("untrained", figure.untrained), ("real images", figure.floor)):
                beside += [f"{value:.1f} {name}"] if value is not None else []
    by = f" by {extractor}" if extractor else ""
    return f"prompt faithfulness{by}: z {', '.join([*words, *beside])}"
