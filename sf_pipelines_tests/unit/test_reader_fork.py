"""Forks: a reader belongs to the process that opened it, and says so at once in any other."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sf_pipelines_tests.racing import Turns

_HEAD = """
import asyncio, fcntl, multiprocessing, os, signal, sys, threading, time, warnings
from pathlib import Path

from sf_pipelines.snapshot.errors import ReaderForkedError
from sf_pipelines.snapshot.reader import cache
from sf_pipelines.snapshot.reader.async_reader import AsyncUnifiedShardedReader
from sf_pipelines.snapshot.reader.cache import locked
from sf_pipelines.snapshot.reader.reader import UnifiedShardedReader

warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
ROOT, CACHE = Path(sys.argv[1]), Path(sys.argv[2])
QUERY = [0.5, 0.5, 0.5, 0.5]


def opened():
    return UnifiedShardedReader(ROOT, cache_dir=CACHE)


def check(reader):
    assert reader.get(7) == b"7"
    assert len(reader.search(QUERY, 5).results) == 5


def refused(call):
    try:
        found = call()
        if asyncio.iscoroutine(found):
            found = asyncio.run(found)
    except ReaderForkedError:
        return
    raise AssertionError(f"{call} was not refused")


def fork(work):
    pid = os.fork()
    if not pid:
        # A deadlock ends the child.
        signal.alarm(60)
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def ended_well(pid):
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with {status}"
"""


def python(tmp_path: Path, script: str, backend: str = "sqlite-vec") -> None:
    """Runs a script over a unified snapshot in a process of its own."""
    turns = Turns(tmp_path / "root", unified=True, backend=backend)
    file = tmp_path / "script.py"
    file.write_text(_HEAD + textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, str(file), str(turns.root), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite-vec", "lancedb"])
def test_a_fork_is_refused_by_every_method_and_disturbs_nobody(tmp_path: Path, backend: str) -> None:
    python(
        tmp_path,
        """
        reader = opened()
        slow = asyncio.run(AsyncUnifiedShardedReader.open(ROOT, cache_dir=CACHE))
        check(reader)
        asyncio.run(slow.get(7))


        def child():
            calls = [
                lambda: reader.search(QUERY), lambda: reader.batch_search([QUERY]), lambda: reader.get(7),
                lambda: reader.multi_get([7]), lambda: reader.explain(QUERY), lambda: reader.route_key(7),
                lambda: reader.vector_meta, lambda: reader.search_arrays([QUERY], 1),
                lambda: reader.probe_curve([QUERY], 1),
                lambda: reader.route_batch([QUERY]), reader.refresh, reader.health, reader.snapshot_info,
                reader.shard_details, lambda: slow.search(QUERY), lambda: slow.batch_search([QUERY]),
                lambda: slow.get(7), lambda: slow.multi_get([7]), slow.refresh, slow.health,
                # The object store's threads are the other process's, too.
                opened,
            ]
            for call in calls:
                refused(call)
            reader.close()
            reader.close()
            asyncio.run(slow.close())
            refused(reader.health)


        pid = fork(child)
        check(reader)
        ended_well(pid)
        check(reader)
        assert reader.health().status == "healthy"
        assert reader.health().open_shards == [0, 1, 2]
        reader.close()
        """,
        backend,
    )


def test_a_fork_that_comes_while_every_lock_is_held_does_not_hang(tmp_path: Path) -> None:
    python(
        tmp_path,
        """
        reader = opened()
        check(reader)
        core = reader._core
        locks = [core._refreshing, core._lock, core.served.shards._lock]
        for lock in locks:
            lock.acquire()


        def child():
            for call in (lambda: reader.search(QUERY), lambda: reader.get(7), reader.refresh, reader.health):
                refused(call)
            reader.close()


        pid = fork(child)
        for lock in locks:
            lock.release()
        ended_well(pid)
        check(reader)
        """,
    )


def test_a_fork_waits_until_nobody_is_in_the_cache(tmp_path: Path) -> None:
    python(
        tmp_path,
        """
        inside = threading.Event()


        def remember():
            with cache._lock:
                inside.set()
                time.sleep(0.2)


        thread = threading.Thread(target=remember)
        thread.start()
        inside.wait()
        ended_well(fork(lambda: cache._lock.acquire()))
        thread.join()
        """,
    )


def test_a_fork_keeps_no_lock_on_files(tmp_path: Path) -> None:
    """Neither while it lives nor by what it does with the parent's objects."""
    python(
        tmp_path,
        """
        path, stop = Path(ROOT / "lock"), os.pipe()
        now = fcntl.LOCK_EX | fcntl.LOCK_NB


        def child():
            other = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(other, now)
            except BlockingIOError:
                os.write(told[1], b"locked")
            os.read(stop[0], 1)
            outer.__exit__(None, None, None)
            # Its number may be this file's now.
            os.fstat(other)


        told = os.pipe()
        outer = locked(path, fcntl.LOCK_EX)
        outer.__enter__()
        pid = fork(child)
        # The parent has it still, though the child gave it up ...
        assert os.read(told[0], 6) == b"locked"
        outer.__exit__(None, None, None)
        # ... and gives it up while the child is alive.
        with locked(path, now):
            pass
        os.write(stop[1], b"x")
        ended_well(pid)
        """,
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite-vec", "lancedb"])
def test_processes_that_fork_first_read_afterwards(tmp_path: Path, backend: str) -> None:
    python(
        tmp_path,
        """
        def child():
            with opened() as reader:
                check(reader)


        ended_well(fork(child))
        child()
        """,
        backend,
    )


@pytest.mark.slow
def test_spawned_processes_read_beside_a_reader(tmp_path: Path) -> None:
    python(
        tmp_path,
        """
        def child():
            with opened() as reader:
                check(reader)


        if __name__ == "__main__":
            with opened() as reader:
                check(reader)
                process = multiprocessing.get_context("spawn").Process(target=child)
                process.start()
                process.join(60)
                assert process.exitcode == 0
                check(reader)
        """,
    )
