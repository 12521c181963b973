"""What of source, acquisition, scores and selection does not go together, as the recipe alone shows it."""

from __future__ import annotations

import re
from collections import Counter

from pipelines.dataset.ledgers import SOURCE
from pipelines.dataset.selection import NEAR_DUPLICATE
from pipelines.gallery.links import HOST
from pipelines.recipe import Fetch, ImageFormat, NamedSource, Recipe, Split
from pipelines.recipe.columns import Columns, asked_scorers, ledger_columns, pair_columns, range_of, scored_by
from pipelines.recipe.data import Predicate
from pipelines.recipe.places import is_authority
from pipelines.recipe.predicates import kind_of_type, kind_of_value, predicate_problem
from pipelines.recipe.problems import Findings, listed, meant, shown
from pipelines.recipe.sources import UNKNOWN, Beside

RESERVED_REASONS = {NEAR_DUPLICATE, "repeated"}
DUPLICATE_REASON = "duplicate_"
MAX_SIDES_PX = {"jpg": 65_500, "webp": 16_383, "png": 1_000_000}
"""Longest side in pixels of images that the format can hold."""
FOR_EXAMPLES = re.compile(r"\bexample\.(com|net|org)\b|\.(example|invalid)\b", re.IGNORECASE)
"""Domain names that are nobody's (RFC 2606)."""
MAX_TIMEOUT_S = 10**9
"""Sockets count in nanoseconds of 64 bits."""


def check_data(recipe: Recipe, findings: Findings) -> None:
    check_allow_hosts(recipe.acquire.fetch, findings)
    _check_sources(recipe, findings)
    _check_fetch(recipe, findings)
    _check_image(recipe, findings)
    _check_score(recipe, findings)
    columns = pair_columns(recipe.named_sources, recipe.score)
    _check_rules(recipe, columns, findings)
    for place, column in enumerate(recipe.select.duplicates):
        _check_column(f"select.duplicates.{place}", column, columns, findings, plain=True)
    check_split("select.split", recipe.select.split, columns, findings)


def check_allowed(source: NamedSource, fetch: Fetch, findings: Findings) -> None:
    """What must be so before anything is fetched: `acquire.fetch.allow_hosts` holds hosts with ports, and those that
    the source needs."""
    source.block.check_allowed(source.where, fetch, findings)
    check_allow_hosts(fetch, findings)


def check_allow_hosts(fetch: Fetch, findings: Findings) -> None:
    """That `acquire.fetch.allow_hosts` holds hosts with ports."""
    for place, entry in enumerate(fetch.allow_hosts):
        if not is_authority(entry):
            findings.refuse(f"acquire.fetch.allow_hosts.{place}", f"{entry!r} is not host:port, such as {HOST}:8377")


def check_split(where: str, split: Split, columns: Columns, findings: Findings) -> None:
    """That some pair is left to train on, and that pairs have the column whose groups stay together."""
    if split.held_out == 1:
        findings.refuse(f"{where}.held_out", "1 holds everything out, and leaves nothing to train on; give less")
    _check_column(f"{where}.by", split.by, columns, findings, plain=True)


# -- source and acquisition --------------------------------------------------------------------------------------------


def _check_sources(recipe: Recipe, findings: Findings) -> None:
    beside = beside_sources(recipe)
    for source in recipe.named_sources:
        source.block.check_allowed(source.where, beside.fetch, findings)
        source.block.check(source.where, beside, findings)
        _check_beside_others(source, findings)
    given = [source.where for source in recipe.named_sources if getattr(source.block, "uid_column", None) is not None]
    if len(given) > 1:
        findings.note(
            f"{given[0]}.uid_column",
            f"{listed(given)} bring identifiers of their own: pairs of two sources with the same one count as one pair,"
            " and are dropped as repeated but for one",
        )
    folders = [source.where for source in recipe.named_sources if source.block.kind == "folder"]
    if len(folders) > 1:
        findings.note(
            folders[0],
            f"{listed(folders)} are folders: images of two of them with the same path and caption count as one pair,"
            " whatever they show, and are dropped as repeated but for one; where that happens, give files other names",
        )


def _check_beside_others(source: NamedSource, findings: Findings) -> None:
    """What a source may say if it is one of several, and if it is the only one."""
    weight = source.block.weight
    if not source.name and weight != 1:
        findings.refuse(
            f"{source.where}.weight", f"{weight:g}, but there is no other source to weigh it against; leave it out"
        )
    elif weight != 1:
        findings.note(
            f"{source.where}.weight",
            f"{weight:g} is recorded with the selection; trainings draw from all selected pairs alike, whatever source"
            " they are from",
        )
    if source.name and any(field.name == SOURCE.name for field in source.block.columns()):
        findings.refuse(
            f"{source.where}.keep_columns",
            f"{SOURCE.name!r} is where the names of sources stand; leave it out, or rename it in the source",
        )


def beside_sources(recipe: Recipe) -> Beside:
    """What of the recipe its sources are checked against."""
    return Beside(recipe.acquire.fetch, recipe.store, recipe.state_dir)


def _check_fetch(recipe: Recipe, findings: Findings) -> None:
    fetch = recipe.acquire.fetch
    for key in ("user_agent", "contact"):
        text = getattr(fetch, key)
        if not (text.isprintable() and text.isascii()):
            findings.refuse(
                f"acquire.fetch.{key}", f"{text!r} goes into a header of HTTP: give a line of plain ASCII characters"
            )
    of_others = next((source for source in recipe.named_sources if source.block.of_others), None)
    if of_others is not None and not fetch.contact.strip():
        findings.refuse(
            "acquire.fetch.contact",
            f"{fetch.contact!r}, and {of_others.where}.kind {of_others.block.kind} fetches from other people's sites:"
            " give your e-mail address or the address of a page, so that a site's owner can reach who fetches",
        )
    elif of_others is not None and FOR_EXAMPLES.search(fetch.contact):
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
    if score is None:
        return
    if not (score.clip or score.nsfw or score.phash or score.features or score.scorers):
        findings.note("score", "asks for no column and no features; leave it out, or switch one on")
    ledger = ledger_columns(recipe.named_sources)
    for kind in asked_scorers(score):
        hidden = [] if kind.key else [column.name for column in kind.columns if column.name in ledger]
        if hidden:
            findings.refuse(
                kind.where,
                f"its column {hidden[0]!r} would hide the source's of that name; rename one of the two",
            )


def _check_rules(recipe: Recipe, columns: Columns, findings: Findings) -> None:
    select = recipe.select
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
    elif known and (limits := range_of(rule.column)) is not None and not _can_hold(rule, *limits):
        least, most = limits
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
        switch = f"; it needs {key}" if (key := scored_by(column)) else meant(column, columns.types)
        there = switch or f"; there are {', '.join(sorted(columns.types))}"
        findings.refuse(where, f"there is no column {column!r}{there}", name=name)
        return False
    if plain and kind_of_type(columns.types[column]) == "other":
        findings.refuse(
            where, f"{column!r} is of type {columns.types[column]}; give one of text, numbers, true or false", name=name
        )
    elif column in columns.lacking and rule is not None and rule.missing == "drop":
        findings.note(
            where,
            f"{column!r} is empty for every pair of {listed(columns.lacking[column])}, and the rule drops them all: set"
            " missing to keep, if they are to stay",
        )
    elif column in columns.empty and (rule is None or rule.missing == "drop"):
        findings.refuse(where, f"{column!r} is empty for every pair: {columns.empty[column]}", name=name)
    return True
