"""Names of samplers, extractors and scorers in a recipe: what they stand for in keys, and whether they are known.

A built-in name stands for itself. Weights of one's own ("inception:/weights/inception.pth") stand in keys as the hash
of their content, wherever they lie; what a plugin registered has the plugin's hash beside it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.recipe import Recipe, ScoreSpec
from pipelines.recipe.block import Block, is_manner
from pipelines.recipe.errors import RecipeError
from pipelines.recipe.kinds import KINDS
from pipelines.recipe.plugins import Entry, Kind, Plugin, plugin_of, plugins_of
from pipelines.recipe.problems import Problem, meant, shown
from pipelines.recipe.scorers import SCORERS, is_of_files

# -- what names stand for ----------------------------------------------------------------------------------------------


def sampler_key(name: str) -> Any:
    """A sampler as it stands in keys."""
    plugin = plugin_of("sampler", name)
    return name if plugin is None else {"name": name, "plugin_sha256": plugin.sha256}


def extractor_key(name: str, where: str) -> Any:
    """An extractor as it stands in keys; `where` is its place in a recipe, for messages.

    Raises `ldm.errors.FolderError` if its weights can't be read.
    """
    kind, colon, _ = name.partition(":")
    plugin = plugin_of("extractor", kind)
    found: dict[str, Any] = {"name": kind}
    if colon:
        found["sha256"] = weights_sha256(name, where)
    if plugin is not None:
        found["plugin_sha256"] = plugin.sha256
    return found if len(found) > 1 else name


def hashes_of(key: Any) -> Mapping[str, str]:
    """The hashes in the key of a sampler or an extractor, by name; empty for a built-in one."""
    return {name: value for name, value in key.items() if name != "name"} if isinstance(key, dict) else {}


def put_key(content: dict[str, Any], settings: dict[str, Any], field: str, name: str, key: Any) -> None:
    """Have a block's content and settings say what a sampler or an extractor is, where its name alone doesn't: in
    settings the name stays as it stands in the recipe. A block with a built-in name stays as it is."""
    if isinstance(key, dict):
        content[field] = key
        settings[field] = {**key, "name": name}


def weights_sha256(extractor: str, where: str = "extractor") -> str | None:
    """The hash of an extractor's weights that are given by path; None for those that come in a package.

    Raises `ldm.errors.FolderError` if they can't be read.
    """
    if ":" not in extractor:
        return None
    from ldm.errors import FolderError
    from ldm.features import extractor_sha256

    try:
        return extractor_sha256(extractor)
    except FolderError as error:
        raise FolderError(f"{where}, {extractor}: {error}") from error


def check_weights(extractor: str, sha256: str | None) -> None:
    """That the weights which an extractor is given by path are here those of `sha256`, as they are in the key.

    Raises `ldm.errors.FolderError` if they can't be read, or are others: they changed, or this is another machine.
    """
    from ldm.errors import FolderError

    if sha256 is not None and weights_sha256(extractor) != sha256:
        raise FolderError(
            f"{extractor}: its content on {platform.node()} is not what it was where the run began ({sha256[:12]});"
            " give all machines the same files, then run the same command again"
        )


def scorer_key(name: str, options: Mapping[str, Any]) -> Any:
    """A scorer of `score.scorers` as it stands in keys: options that are not neutral, files by their content.

    Raises `RecipeError` if a file that an option names can't be read.
    """
    if name not in SCORERS:
        return dict(options)
    plugin = plugin_of("scorer", name)
    found: dict[str, Any] = {} if plugin is None else {"plugin_sha256": plugin.sha256}
    try:
        block = scorer_options(name, options)
    except ValidationError as error:
        where = f"score.scorers.{name}"
        problems = [_option_problem(where, each, SCORERS[name].options) for each in error.errors()]
        raise RecipeError("; ".join(f"{problem.path}: {problem.message}" for problem in problems)) from error
    content = block.content()
    for option in _files(block):
        if not is_manner(type(block).model_fields[option]):  # its content counts at a neutral value too
            content[option] = {"sha256": _content_sha256(f"score.scorers.{name}.{option}", getattr(block, option))}
    return found | ({"options": content} if content else {})


def check_scorer(name: str, options: Mapping[str, Any], key: Any) -> None:
    """That a scorer's files are here those which are in its key.

    Raises `RecipeError` if they can't be read, or are others: they changed, or this is another machine.
    """
    if scorer_key(name, options) != key:
        raise RecipeError(
            f"score.scorers.{name}: files of its options on {platform.node()} are not what they were where the run"
            " began; give all machines the same files, then run the same command again"
        )


def scorer_options(name: str, options: Mapping[str, Any]) -> Block:
    """The options of a registered scorer. Raises `pydantic.ValidationError` if they are none of its own."""
    return SCORERS[name].options.model_validate_json(json.dumps(options))


def scorer_files(spec: ScoreSpec) -> Iterator[tuple[str, str]]:
    """Every file that options of scorers name: where in the recipe, and its path."""
    for name, options in spec.scorers.items():
        if name in SCORERS:
            block = scorer_options(name, options)
            yield from ((f"score.scorers.{name}.{option}", getattr(block, option)) for option in _files(block))


def plugins_used(
    *, samplers: Iterable[str] = (), extractors: Iterable[str | None] = (), scorers: Iterable[str] = ()
) -> tuple[Plugin, ...]:
    """The plugins that these names are of: what a process must load that uses them."""
    entries: list[Entry] = [("sampler", name) for name in samplers]
    entries += [("extractor", name.partition(":")[0]) for name in extractors if name is not None]
    entries += [("scorer", name) for name in scorers]
    return plugins_of(*entries)


def _files(block: Block) -> list[str]:
    """Names of the options that are paths of files and have a value."""
    return [name for name, field in type(block).model_fields.items() if is_of_files(field) and getattr(block, name)]


def _content_sha256(where: str, path: str) -> str:
    from ldm.errors import FolderError
    from ldm.features.extractor import content_sha256

    try:
        return content_sha256(Path(path))
    except FolderError as error:
        raise RecipeError(f"{where}: {error}") from error


# -- whether they are known --------------------------------------------------------------------------------------------


def name_problems(recipe: Recipe) -> Iterator[Problem]:
    """A problem for each sampler, extractor and scorer that neither the package nor a plugin of the recipe registered,
    and for each option that a scorer doesn't take."""
    if recipe.score is not None:
        yield from _extractor_problems(recipe, "score.features", recipe.score.features)
        yield from _scorer_problems(recipe, recipe.score)
    yield from _extractor_problems(recipe, "execution.extractor", recipe.execution.extractor)
    for name, model in recipe.models.items():
        kind = KINDS[model.kind]
        sampling, evaluation = kind.sampling(model), kind.evaluation(model)
        if sampling is not None:
            yield from _sampler_problems(recipe, f"models.{name}.sampling.sampler", sampling.sampler)
        if evaluation is not None:
            yield from _extractor_problems(recipe, f"models.{name}.evaluate.extractor", evaluation.extractor)


def _known(recipe: Recipe, kind: Kind, names: Iterable[str]) -> list[str]:
    """Those of the names that are built in, or of a plugin of the recipe: another's may be there in this process."""
    owners = {name: plugin_of(kind, name) for name in names}
    return [name for name, owner in owners.items() if owner is None or owner.path in recipe.plugins]


def _sampler_problems(recipe: Recipe, where: str, name: str) -> Iterator[Problem]:
    from ldm.samplers import SAMPLERS

    known = _known(recipe, "sampler", SAMPLERS)
    if name not in known:
        yield Problem(where, f"must be one of {', '.join(known)}, got {shown(name)}{meant(name, known)}")


def _extractor_problems(recipe: Recipe, where: str, name: str | None) -> Iterator[Problem]:
    from ldm.features import EXTRACTORS, EXTRACTORS_BY_PATH

    if name is None:
        return
    whole, by_path = (_known(recipe, "extractor", table) for table in (EXTRACTORS, EXTRACTORS_BY_PATH))
    kind, colon, path = name.partition(":")
    if not (kind in by_path and path) and not (kind in whole and not colon):
        forms = ", ".join([*whole, *(f"{each}:PATH" for each in by_path)])
        near = "" if kind in by_path else meant(kind, [*whole, *by_path])
        yield Problem(where, f"must be one of {forms}, got {shown(name)}{near}")
    elif "://" in path:
        yield Problem(where, f"{name!r} is a URL; weights are local files: copy them, and give their path")


def _scorer_problems(recipe: Recipe, score: ScoreSpec) -> Iterator[Problem]:
    known = [name for name in _known(recipe, "scorer", SCORERS) if not SCORERS[name].key]
    for name, options in score.scorers.items():
        where = f"score.scorers.{name}"
        if name in known:
            try:
                block = scorer_options(name, options)
            except ValidationError as error:
                yield from (_option_problem(where, each, SCORERS[name].options) for each in error.errors())
            else:
                yield from _url_problems(where, block)
        elif name in SCORERS and SCORERS[name].key:
            yield Problem(where, f"{name!r} is built in: ask for it as score.{SCORERS[name].key}")
        else:
            there = f"there are {', '.join(known)}" if known else "this recipe has none: name its file under plugins"
            yield Problem(where, f"{name!r} is no registered scorer; {there}{meant(name, known)}")


def _option_problem(where: str, error: Any, options: type[Block]) -> Problem:
    option = ".".join(str(part) for part in error["loc"])
    path = f"{where}.{option}" if option else where
    if error["type"] == "extra_forbidden":
        names = ", ".join(options.model_fields) or "none"
        return Problem(path, f"unknown option {option!r}; its options are {names}{meant(option, options.model_fields)}")
    if error["type"] == "missing":
        return Problem(path, "missing; add this option")
    return Problem(path, f"{error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}")


def _url_problems(where: str, block: Block) -> Iterator[Problem]:
    for option in _files(block):
        path = getattr(block, option)
        if "://" in path:
            yield Problem(f"{where}.{option}", f"{path!r} is a URL; files are local: copy it, and give its path")
