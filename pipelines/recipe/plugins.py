"""Plugins: Python files of the user's that register scorers, samplers and extractors.

A plugin is read once, by who reads the recipe. Its text goes along to every process that needs its names, and is run
there as it was read: what is hashed for keys is what runs. `pipelines.plugins` is what a plugin imports.
"""

from __future__ import annotations

import contextlib
import hashlib
import linecache
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any, Literal

from pipelines.recipe.errors import PluginError
from pipelines.recipe.problems import Problem
from pipelines.recipe.scorers import SCORERS

Kind = Literal["scorer", "sampler", "extractor"]
Entry = tuple[Kind, str]
"""A registered name, with what it is of."""


@dataclass(frozen=True)
class Plugin:
    """A plugin as it was read: its file's path, for messages, and its text."""

    path: str
    text: str

    @cached_property
    def sha256(self) -> str:
        """Hash of the text, in hex: it is in the keys of the nodes that use the plugin's names."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def module_name(self) -> str:
        return f"latentworks_plugin_{self.sha256[:16]}"


@dataclass(frozen=True)
class _Run:
    """What a plugin registered when it was run, by table and name."""

    entries: dict[int, dict[str, Any]]
    module: ModuleType


_run: dict[Plugin, _Run] = {}
_in_use: list[Plugin] = []
_owners: dict[Entry, Plugin] = {}


def read_plugins(paths: Sequence[str], folder: Path) -> tuple[list[Plugin], list[Problem]]:
    """The plugins of a recipe that lies in `folder`, whose paths are seen from there; and one problem for each path
    that is no file, or is there twice."""
    found: dict[Path, Plugin] = {}
    problems = []
    for place, text in enumerate(paths):
        where = f"plugins.{place}"
        path = folder / Path(text).expanduser()
        if "://" in text:
            problems.append(Problem(where, f"{text!r} is a URL; a plugin is a local file: copy it, and read it first"))
        elif path.resolve() in found:
            problems.append(Problem(where, f"{text!r} is there twice; once is enough"))
        else:
            try:
                found[path.resolve()] = Plugin(str(path), path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or error
                problems.append(Problem(where, f"{path} can't be read ({why}); paths are seen from the recipe's file"))
    return list(found.values()), problems


def use_plugins(plugins: Collection[Plugin]) -> None:
    """Have the names of these plugins registered, whatever others were used before: those stay unless they are in the
    way. Raises as `load_plugins`."""
    others = [each for each in _in_use if each not in plugins]
    for other in others:
        _withdraw(other)
    try:
        load_plugins(plugins)
    finally:
        paths = {plugin.path for plugin in plugins}
        for other in others:
            if other.path not in paths:
                with contextlib.suppress(PluginError):
                    load_plugins([other])


def load_plugins(plugins: Collection[Plugin]) -> None:
    """Have the names of these plugins registered too, in this process.

    Raises `PluginError` for one that can't be run, registers nothing, or registers a name that is taken; its message
    has the plugin's file and line. Nothing of it stays registered then.
    """
    for plugin in plugins:
        if plugin in _in_use:
            continue
        for earlier in [each for each in _in_use if each.path == plugin.path]:
            _withdraw(earlier)
        if plugin in _run:
            _put_back(plugin)
        else:
            _first_run(plugin)
        _in_use.append(plugin)
        _owners.update(dict.fromkeys(_names(_run[plugin]), plugin))


def plugin_of(kind: Kind, name: str) -> Plugin | None:
    """The plugin that registered the name; None for a built-in one, and one that nobody knows."""
    return _owners.get((kind, name))


def plugins_of(*entries: Entry) -> tuple[Plugin, ...]:
    """The plugins that registered these names, each once: what a process must load that uses them."""
    return tuple(dict.fromkeys(plugin for entry in entries if (plugin := _owners.get(entry)) is not None))


def error_of(plugin: Plugin, error: BaseException) -> str:
    """What the plugin's code raised, in a line: "scorers.py, line 3: NameError: ..."."""
    line = _line_of(error, plugin.path)
    where = plugin.path if line is None else f"{plugin.path}, line {line}"
    if isinstance(error, SyntaxError):
        return f"{where}: {error.msg}"
    said = " ".join(str(error).split())
    if type(error).__module__.startswith(("pipelines.", "ldm.")):
        return f"{where}: {said}"
    more = "; a plugin is one file, what else it imports must be installed" if isinstance(error, ImportError) else ""
    return f"{where}: {type(error).__name__}: {said}{more}"


def _line_of(error: BaseException, path: str) -> int | None:
    """The last line of the file `path` that the error went through."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno
    lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else None


def _tables() -> list[tuple[Kind, dict[str, Any]]]:
    from ldm.features import EXTRACTORS, EXTRACTORS_BY_PATH
    from ldm.samplers import SAMPLERS

    return [("scorer", SCORERS), ("sampler", SAMPLERS), ("extractor", EXTRACTORS), ("extractor", EXTRACTORS_BY_PATH)]


def _names(run: _Run) -> Iterator[Entry]:
    for number, (kind, _) in enumerate(_tables()):
        for name in run.entries[number]:
            yield kind, name


def _first_run(plugin: Plugin) -> None:
    tables = [table for _, table in _tables()]
    before = [dict(table) for table in tables]
    module = ModuleType(plugin.module_name)
    module.__file__ = plugin.path
    sys.modules[plugin.module_name] = module  # dataclasses and pickles look there
    # Who reads source, as pydantic does for docstrings, and tracebacks read what runs, not what lies there by now.
    linecache.cache[plugin.path] = (len(plugin.text), None, plugin.text.splitlines(keepends=True), plugin.path)
    try:
        exec(compile(plugin.text, plugin.path, "exec", dont_inherit=True), module.__dict__)
        entries = {
            number: {name: value for name, value in table.items() if name not in before[number]}
            for number, table in enumerate(tables)
        }
        replaced = [
            name for table, old in zip(tables, before, strict=True) for name in old if table.get(name) is not old[name]
        ]
        if replaced:
            raise PluginError(f"replaces {replaced[0]!r}, which is registered already; register another name")
        if not any(entries.values()):
            raise PluginError(
                "registers nothing; call register_scorer, register_sampler or register_extractor of pipelines.plugins"
                " when it is imported"
            )
    except BaseException as error:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)
        del sys.modules[plugin.module_name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise PluginError(error_of(plugin, error)) from error
    _run[plugin] = _Run(entries, module)


def _put_back(plugin: Plugin) -> None:
    for number, (kind, table) in enumerate(_tables()):
        for name in _run[plugin].entries[number]:
            if name in table:
                other = _owners.get((kind, name))
                by = f" by {other.path}" if other is not None else ""
                raise PluginError(f"{plugin.path}: {kind} {name!r} is registered already{by}; choose another name")
    for number, (_, table) in enumerate(_tables()):
        table.update(_run[plugin].entries[number])


def _withdraw(plugin: Plugin) -> None:
    for number, (kind, table) in enumerate(_tables()):
        for name in _run[plugin].entries[number]:
            table.pop(name, None)
            _owners.pop((kind, name), None)
    _in_use.remove(plugin)
