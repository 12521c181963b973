"""What of source, acquisition, scores and selection does not go together, as the recipe alone shows it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from pipelines.dataset.ledger import RESERVED_NAMES
from pipelines.dataset.selection import NEAR_DUPLICATE
from pipelines.gallery.links import HOST
from pipelines.recipe import Fetch, FolderSource, GallerySource, ImageFormat, Recipe, Source, Split, UrlsSource
from pipelines.recipe.columns import FILE_HASH, RANGES, UNKNOWN, Columns, pair_columns
from pipelines.recipe.data import Predicate
from pipelines.recipe.places import check_scheme, is_authority, is_seen_within
from pipelines.recipe.predicates import SCORED_BY, kind_of_type, kind_of_value, predicate_problem
from pipelines.recipe.problems import Findings, listed, meant, shown

RESERVED_REASONS = {NEAR_DUPLICATE, "repeated"}
DUPLICATE_REASON = "duplicate_"
MAX_SIDES_PX = {"jpg": 65_500, "webp": 16_383, "png": 1_000_000}
"""Of images that the format can hold."""
WEB = ("http", "https")
FOR_EXAMPLES = re.compile(r"\bexample\.(com|net|org)\b|\.(example|invalid)\b", re.IGNORECASE)
"""Domain names that are nobody's (RFC 2606)."""
MAX_TIMEOUT_S = 10**9
"""Sockets count in nanoseconds of 64 bits."""


def check_data(recipe: Recipe, findings: Findings) -> None:
    check_allowed(recipe.source, recipe.acquire.fetch, findings)
    _check_source(recipe, findings)
    _check_fetch(recipe, findings)
    _check_image(recipe, findings)
    _check_score(recipe, findings)
    _check_rules(recipe, findings)
    columns = pair_columns(recipe.source, recipe.score)
    for place, column in enumerate(recipe.select.duplicates):
        _check_column(f"select.duplicates.{place}", column, columns, findings, plain=True)
    check_split("select.split", recipe.select.split, columns, findings)


def check_allowed(source: Source, fetch: Fetch, findings: Findings) -> None:
    """That `acquire.fetch.allow_hosts` holds hosts with ports, and the gallery's if that is the source."""
    authority = f"{HOST}:{source.port}" if isinstance(source, GallerySource) else None
    if authority is not None and authority not in fetch.allow_hosts:
        findings.refuse(
            "source.port",
            f"{authority} is where the gallery is served, which acquire.fetch.allow_hosts {list(fetch.allow_hosts)}"
            " doesn't name, and loopback is refused otherwise: add --set"
            f" 'acquire.fetch.allow_hosts=[\"{authority}\"]'",
        )
    for place, entry in enumerate(fetch.allow_hosts):
        if not is_authority(entry):
            findings.refuse(f"acquire.fetch.allow_hosts.{place}", f"{entry!r} is not host:port, such as {HOST}:8377")


def check_split(where: str, split: Split, columns: Columns, findings: Findings) -> None:
    """That some pair is left to train on, and that pairs have the column whose groups stay together."""
    if split.held_out == 1:
        findings.refuse(f"{where}.held_out", "1 holds everything out, and leaves nothing to train on; give less")
    _check_column(f"{where}.by", split.by, columns, findings, plain=True)


# -- source and acquisition --------------------------------------------------------------------------------------------


def _check_source(recipe: Recipe, findings: Findings) -> None:
    source = recipe.source
    if isinstance(source, GallerySource):
        _note_repeated("source.vendors", source.vendors, findings)
        return
    if isinstance(source, UrlsSource):
        for place, file in enumerate(source.files):
            check_scheme(f"source.files.{place}", file, findings)
        _note_repeated("source.files", source.files, findings)
        if source.url_column == source.caption_column:
            findings.note("source.caption_column", f"{source.url_column!r} is url_column too: captions will be URLs")
    else:
        _check_folder(source, findings)
        check_own_folders(recipe, source, findings)
    own = RESERVED_NAMES | ({FILE_HASH} if isinstance(source, FolderSource) else set())
    for place, name in enumerate(source.keep_columns):
        if name in own:
            findings.refuse(
                f"source.keep_columns.{place}",
                f"{name!r} is a column of the ledger's own; leave it out, or rename it in the source",
            )


def _check_folder(source: FolderSource, findings: Findings) -> None:
    if any(urlsplit(part).scheme in WEB for part in source.path.split("::")):
        findings.refuse("source.path", f"{source.path} is on the web; list the URLs of its images, with kind: urls")
    else:
        check_scheme("source.path", source.path, findings)
    if source.captions != "metadata":
        for key in ("keep_columns", "file_name_column", "text_column"):
            if getattr(source, key) != type(source).model_fields[key].default:
                findings.refuse(
                    f"source.{key}",
                    f"{shown(getattr(source, key))} is about columns of metadata, but captions is {source.captions!r}:"
                    " set captions to metadata, or leave this out",
                )
    elif source.file_name_column == source.text_column:
        findings.refuse(
            "source.text_column", f"{source.text_column!r} is file_name_column too; a file's name is no caption"
        )


def check_own_folders(
    recipe: Recipe, source: FolderSource, findings: Findings, whole: Callable[[str], str] = str
) -> None:
    """That no picture which is made here is taken for one of the source's by the next run.

    `whole` makes paths comparable that are written in different ways.
    """
    if source.captions == "metadata" or not source.recursive:
        return
    for key in ("store", "state_dir"):
        place = getattr(recipe, key)
        if is_seen_within(whole(place), whole(source.path)):
            findings.refuse(
                key,
                f"{place!r} lies in source.path {source.path!r}: the pictures that are published there would be taken"
                " for images of the source; name a folder elsewhere, or set source.recursive to false",
            )


def _note_repeated(where: str, entries: Sequence[str], findings: Findings) -> None:
    for entry, count in Counter(entries).items():
        if count > 1:
            findings.note(where, f"{entry!r} is there {count} times; its pairs are dropped as repeated but for once")


def _check_fetch(recipe: Recipe, findings: Findings) -> None:
    fetch = recipe.acquire.fetch
    for key in ("user_agent", "contact"):
        text = getattr(fetch, key)
        if not (text.isprintable() and text.isascii()):
            findings.refuse(
                f"acquire.fetch.{key}", f"{text!r} goes into a header of HTTP: give a line of plain ASCII characters"
            )
    if isinstance(recipe.source, UrlsSource) and not fetch.contact.strip():
        findings.refuse(
            "acquire.fetch.contact",
            f"{fetch.contact!r}, and source.kind urls fetches from other people's sites: give your e-mail address or"
            " the address of a page, so that a site's owner can reach who fetches",
        )
    elif isinstance(recipe.source, UrlsSource) and FOR_EXAMPLES.search(fetch.contact):
        findings.note(
            "acquire.fetch.contact", f"{fetch.contact!r} is a name for examples, which reaches nobody; give your own"
        )
    if not fetch.user_agent.partition("/")[0].strip():
        findings.refuse(
            "acquire.fetch.user_agent",
            f"{fetch.user_agent!r} has no name before the slash, by which sites could opt out; give name/version",
        )
    if fetch.timeout_s > MAX_TIMEOUT_S:
        findings.refuse(
            "acquire.fetch.timeout_s",
            f"{fetch.timeout_s:g}: no connection can wait for that long, and none would be made; give"
            f" {MAX_TIMEOUT_S:,} seconds or fewer",
        )
    least, most = recipe.acquire.filter.min_side_px, fetch.max_pixels
    if least**2 > most:
        findings.refuse(
            "acquire.filter.min_side_px",
            f"{least}: sides of that length have more than the {most:,} pixels of acquire.fetch.max_pixels, so that"
            " nothing would be kept; lower the one or raise the other",
        )


def _check_image(recipe: Recipe, findings: Findings) -> None:
    image, rules = recipe.acquire.image, recipe.acquire.filter
    if image.encode_format == "png" and image.encode_quality > 9:
        findings.refuse(
            "acquire.image.encode_quality",
            f"{image.encode_quality} with encode_format: png, where it is the compression level: give 0 to 9",
        )
    most = MAX_SIDES_PX.get(image.encode_format)
    if most is not None and image.resize_mode != "no" and image.size_px > most:
        findings.refuse(
            "acquire.image.size_px", f"{image.size_px}: a {image.encode_format} has at most {most} pixels a side"
        )
    if rules.max_aspect < 1:
        findings.refuse(
            "acquire.filter.max_aspect",
            f"{rules.max_aspect:g}: longer by shorter side is 1 or more, so that nothing would be kept; give 1 or more",
        )


def side_px(recipe: Recipe) -> int | None:
    """Side of the square images that models learn from; None if it is not the same for all of them."""
    return stored_side_px(recipe.acquire.image, recipe.acquire.filter.min_side_px)


def stored_side_px(image: ImageFormat, min_side_px: int) -> int | None:
    """Shorter side of the images that training sees, if the recipe tells; None where it varies with the originals."""
    if image.resize_mode in {"border", "center_crop"}:
        return image.size_px
    never_smaller = image.upscale or min_side_px >= image.size_px
    return image.size_px if image.resize_mode == "keep_ratio" and never_smaller else None


# -- scores and selection ----------------------------------------------------------------------------------------------


def _check_score(recipe: Recipe, findings: Findings) -> None:
    score = recipe.score
    if score is not None and not (score.clip or score.nsfw or score.phash or score.features):
        findings.note("score", "asks for no column and no features; leave it out, or switch one on")


def _check_rules(recipe: Recipe, findings: Findings) -> None:
    select = recipe.select
    columns = pair_columns(recipe.source, recipe.score)
    for name, count in Counter(rule.name for rule in select.where).items():
        if count > 1:
            place = max(place for place, rule in enumerate(select.where) if rule.name == name)
            findings.refuse(
                f"select.where.{place}.name", f"{name!r} names {count} rules; give each a name of its own", name=name
            )
    for column, count in Counter(select.duplicates).items():
        if count > 1:
            findings.refuse("select.duplicates", f"{column!r} is there {count} times; once is enough")
    for place, rule in enumerate(select.where):
        where = f"select.where.{place}"
        if rule.name in RESERVED_REASONS or rule.name.startswith(DUPLICATE_REASON) or not rule.name.isprintable():
            findings.refuse(
                f"{where}.name",
                f"{rule.name!r}: {listed(sorted(RESERVED_REASONS))}, and what begins with {DUPLICATE_REASON!r}, are"
                " reasons of others; give the rule another name, in plain letters",
                name=rule.name,
            )
        _check_rule(where, rule, columns, findings)


def _check_rule(where: str, rule: Predicate, columns: Columns, findings: Findings) -> None:
    known = _check_column(f"{where}.column", rule.column, columns, findings, rule=rule)
    problem = predicate_problem(rule, columns.types[rule.column] if known else UNKNOWN)
    if problem is not None:
        findings.refuse(f"{where}.value", problem, name=rule.name)
    elif known and rule.column in RANGES and not _can_hold(rule, *RANGES[rule.column]):
        least, most = RANGES[rule.column]
        findings.refuse(
            f"{where}.value",
            f"{rule.column} is from {least:g} to {most:g}: none is {rule.op} {shown(rule.value)}, and everything would"
            " be dropped; give a value in between",
            name=rule.name,
        )


def _can_hold(rule: Predicate, least: float, most: float) -> bool:
    """Whether some value from `least` to `most` meets the rule."""
    if kind_of_value(rule.value) != "number":
        return True
    value = float(rule.value)
    met = {">": most > value, ">=": most >= value, "<": least < value, "<=": least <= value}
    return met.get(rule.op, rule.op != "==" or least <= value <= most)


def _check_column(
    where: str, column: str, columns: Columns, findings: Findings, *, plain: bool = False, rule: Predicate | None = None
) -> bool:
    """Whether pairs have the column, with values in it. `plain`: it must be of text, numbers, true or false."""
    name = "" if rule is None else rule.name
    if column not in columns:
        switch = f"; it needs {SCORED_BY[column]}" if column in SCORED_BY else meant(column, columns.types)
        there = switch or f"; there are {', '.join(sorted(columns.types))}"
        findings.refuse(where, f"there is no column {column!r}{there}", name=name)
        return False
    if plain and kind_of_type(columns.types[column]) == "other":
        findings.refuse(
            where, f"{column!r} is of type {columns.types[column]}; give one of text, numbers, true or false", name=name
        )
    elif column in columns.empty and (rule is None or rule.missing == "drop"):
        findings.refuse(where, f"{column!r} is empty for every pair: {columns.empty[column]}", name=name)
    return True
