"""A journal on the local disk between those who report and the one thread that sends it on to a server.

An entry is in the file before `append` returns, so that neither a dead process nor an absent server loses it. Whoever
has a journal open holds its lock: one that is not locked was left behind, and is taken over by the next sender. What
entries mean, and how a server is talked to, is `infra.tracking_delivery`'s matter.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Entry = dict[str, Any]

GATHER_S = 0.5
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
READ_ENTRIES = 2000

logger = logging.getLogger(__name__)


class Away(Exception):
    """The server can't take entries now; the message says why, in one line."""


@dataclass
class Progress:
    """How much of a journal is delivered: `offset` in bytes, the server's `ids` for its keys, and the `ended` keys."""

    offset: int = 0
    ids: dict[str, str] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)


class Journal:
    """`<folder>/<key>.jsonl`, with the progress in `<key>.sent` and attached files in `<key>.files/`."""

    def __init__(self, folder: Path, key: str, descriptor: int) -> None:
        self._folder = folder
        self._descriptor = descriptor
        self._writing = threading.Lock()
        self.key = key
        self.path = folder / f"{key}.jsonl"
        self.progress = self._read_progress()
        # A process killed while it wrote leaves half a line.
        self._drop_half_line()

    @classmethod
    def create(cls, folder: Path, target: str) -> Journal:
        """Raises `OSError` if the folder can't be written."""
        folder.mkdir(parents=True, exist_ok=True)
        key = uuid.uuid4().hex
        part = folder / f"{key}.part"
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        part.rename(folder / f"{key}.jsonl")  # locked before anyone can find it
        journal = cls(folder, key, descriptor)
        journal.append({"kind": "header", "target": target})
        return journal

    @classmethod
    def left_behind(cls, folder: Path) -> Iterator[Journal]:
        """Takes over the journals that no living process holds, oldest first."""
        for path in sorted(folder.glob("*.jsonl"), key=_modified_s):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(descriptor).st_nlink == 0:  # its owner has just finished with it
                        raise FileNotFoundError(path)
                except OSError:
                    os.close(descriptor)
                    raise
                yield cls(folder, path.stem, descriptor)

    @property
    def end(self) -> int:
        """The length in bytes; everything is delivered when `progress.offset` is as large."""
        return os.fstat(self._descriptor).st_size

    def append(self, entry: Entry) -> None:
        """Raises `OSError` if the disk takes nothing."""
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with self._writing:
            written = os.write(self._descriptor, line)
            if written != len(line):
                self._drop_half_line()
                raise OSError(f"disk full: {written} of {len(line)} bytes written to {self.path}")

    def attach(self, name: str, content: bytes) -> str:
        """Keeps `content` until the journal is removed; returns what `attached` takes.

        Raises `OSError` if the disk takes nothing.
        """
        reference = f"{uuid.uuid4().hex}/{name}"
        path = self.attached(reference)
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        return reference

    def attached(self, reference: str) -> Path:
        return self._folder / f"{self.key}.files" / reference

    def undelivered(self, limit: int) -> list[tuple[Entry, int]]:
        """Up to `limit` entries after the progress, each with the offset that follows it."""
        found: list[tuple[Entry, int]] = []
        offset = self.progress.offset
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if len(found) == limit or not line.endswith(b"\n"):
                    break
                offset += len(line)
                found.append((_entry(line, self.path), offset))
        return found

    def target(self) -> str | None:
        """Where the journal is to be sent, by its first entry: None if that was never written, "" if it is damaged."""
        with self.path.open("rb") as file:
            line = file.readline()
        return str(_entry(line, self.path).get("target", "")) if line else None

    def save_progress(self) -> None:
        part = self._folder / f"{self.key}.sent.part"
        part.write_text(json.dumps(vars(self.progress)))
        part.replace(self._folder / f"{self.key}.sent")

    def close(self) -> None:
        """Leaves the journal for whoever comes next."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Everything is delivered: removes the journal, its progress and its files."""
        self.path.unlink(missing_ok=True)
        (self._folder / f"{self.key}.sent").unlink(missing_ok=True)
        shutil.rmtree(self._folder / f"{self.key}.files", ignore_errors=True)
        self.close()

    def _read_progress(self) -> Progress:
        try:
            return Progress(**json.loads((self._folder / f"{self.key}.sent").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return Progress()

    def _drop_half_line(self) -> None:
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)


def _entry(line: bytes, path: Path) -> Entry:
    """A line that a power cut left without sense counts as a header: there is nothing to send in it."""
    try:
        entry: Entry = json.loads(line)
    except ValueError:
        logger.warning("a line of %s is damaged and left out", path)
        return {"kind": "header"}
    return entry


def _modified_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


class Delivery(Protocol):
    """How entries get to a server; used in the sender's thread alone. Both raise `Away`."""

    def send(self, journal: Journal, entries: Sequence[Entry]) -> None:
        """Sends entries of one kind for one run."""

    def end_open_runs(self, journal: Journal) -> None:
        """Everything is sent: ends the runs that nobody ended, whose process died or left them."""


class Sender(threading.Thread):
    """Sends a journal as it grows, after those that others left behind in the same folder for the same target."""

    def __init__(self, journal: Journal, target: str, delivery: Delivery) -> None:
        super().__init__(name="spool-sender", daemon=True)
        self.journal = journal
        self._target = target
        self._delivery = delivery
        self._left_behind: list[Journal] | None = None
        self._changed = threading.Condition()
        self._dirty = True
        self._waiting = 0
        self._stopping = False
        self._gave_up = False
        self._away = False

    def wake(self) -> None:
        """There are new entries."""
        with self._changed:
            self._dirty = True
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Waits until all entries are sent, for at most `timeout_s`; returns whether they are."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            while self.is_alive() and not self._all_sent() and time.monotonic() < deadline_s:
                self._changed.wait(0.05)
            self._waiting -= 1
            return self._all_sent()

    def stop(self, timeout_s: float) -> bool:
        """Sends what is left, for at most `timeout_s`; returns whether all was. The thread then ends when it can."""
        with self._changed:
            self._stopping = True
            self._waiting += 1
            self._changed.notify_all()
        self.join(timeout_s)
        with self._changed:
            self._gave_up = True
            self._changed.notify_all()
        return not self.journal.path.exists()

    def run(self) -> None:
        backoff_s = 0.0
        while not self._gave_up:
            self._wait(backoff_s)
            stopping = self._stopping
            away = self._deliver_left_behind()
            try:
                self._deliver(self.journal)
                if stopping and self._all_sent():
                    self._finish(self.journal)
                    break
            except Away as error:
                away = error
            backoff_s = min(max(FIRST_BACKOFF_S, 2 * backoff_s), MAX_BACKOFF_S) if away else 0.0
            self._tell(away)
        else:
            self.journal.close()
        for journal in self._left_behind or []:
            journal.close()

    def _wait(self, backoff_s: float) -> None:
        """Until there is something to send, and a moment longer, so that more goes in one batch."""
        with self._changed:
            if backoff_s:
                self._changed.wait_for(lambda: self._gave_up or self._waiting, backoff_s)
                self._changed.wait_for(lambda: self._gave_up, min(backoff_s, FIRST_BACKOFF_S))
            else:
                self._changed.wait_for(lambda: self._dirty or self._stopping)
                self._changed.wait_for(lambda: self._waiting, GATHER_S)
            self._dirty = False

    def _all_sent(self) -> bool:
        return self.journal.progress.offset >= self.journal.end

    def _deliver_left_behind(self) -> Away | None:
        if self._left_behind is None:
            found = list(Journal.left_behind(self.journal.path.parent))
            self._left_behind = [journal for journal in found if self._is_for_us(journal)]
        away = None
        for journal in list(self._left_behind):
            try:
                if self._deliver(journal):
                    self._finish(journal)
                    self._left_behind.remove(journal)
            except Away as error:
                away = error
        return away

    def _is_for_us(self, journal: Journal) -> bool:
        target = journal.target()
        if target is None:
            journal.remove()
        elif target != self._target:
            journal.close()
        else:
            logger.info("sending what an earlier process left in %s", journal.path)
        return target == self._target

    def _deliver(self, journal: Journal) -> bool:
        """Whether all is sent; not so if it was told to give up."""
        while not self._gave_up:
            entries = journal.undelivered(READ_ENTRIES)
            if not entries:
                return True
            for _, group in itertools.groupby(entries, lambda found: (found[0]["kind"], found[0].get("run"))):
                sent = list(group)
                self._delivery.send(journal, [entry for entry, _ in sent])
                journal.progress.offset = sent[-1][1]
                try:
                    journal.save_progress()
                except OSError as error:
                    raise Away(f"{journal.path.parent} can't be written ({error})") from error
            with self._changed:
                self._changed.notify_all()
        return False

    def _finish(self, journal: Journal) -> None:
        self._delivery.end_open_runs(journal)
        journal.remove()

    def _tell(self, away: Away | None) -> None:
        """One warning when the server goes away; the rest is for the log."""
        if away and not self._away:
            logger.warning("%s; work goes on, and what it reports is sent later", away)
        elif away:
            logger.info("still: %s", away)
        elif self._away:
            logger.info("the server is back")
        self._away = away is not None
