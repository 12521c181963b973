from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra import locks
from infra.locks import Locked, check_free, lock
from infra.storage import Store


def test_the_second_is_told_who_holds_it(store: Store) -> None:
    with lock(store, "node/key"), pytest.raises(Locked, match=r"process \d+, since"), lock(store, "node/key"):
        pass
    with lock(store, "node/key"):
        pass  # free again


def test_waiting_ends_when_it_was_in_vain(store: Store) -> None:
    started_s = time.monotonic()
    with lock(store, "a"), pytest.raises(Locked), lock(store, "a", wait_s=0.3):
        pass
    assert time.monotonic() - started_s >= 0.3


def test_an_error_in_the_block_frees_it(store: Store) -> None:
    with pytest.raises(KeyError), lock(store, "a"):
        raise KeyError
    with lock(store, "a"):
        pass


def test_a_killed_holder_frees_a_local_lock_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from infra.locks import lock; from infra.storage import Store\n"
        "with lock(Store(sys.argv[1]), 'a'):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Locked, match=f"process {holder.pid}"), lock(Store(tmp_path), "a"):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with lock(Store(tmp_path), "a"):
        pass


def test_a_silent_holder_in_an_object_store_is_succeeded(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3_url)
    monkeypatch.setattr(locks, "SILENT_AFTER_S", 1.0)
    store.publish_bytes("locks/a/000000000001", b'{"user": "gone", "beat_s": 1}')
    with lock(store, "a"):
        assert store.listdir("locks/a") == ["000000000002"]


def test_whether_a_lock_is_held_can_be_asked_without_taking_it(store: Store) -> None:
    check_free(store, "node/key")
    with lock(store, "node/key"):
        with pytest.raises(Locked, match=r"another run is writing .*node/key: .*process \d+, since"):
            check_free(store, "node/key")
        check_free(store, "node/other")
    check_free(store, "node/key")
    with lock(store, "node/key"):
        pass
