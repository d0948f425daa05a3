"""What every store must do: a class to subclass in your tests.

Example:
    class TestMine(StoreConformance):
        @pytest.fixture
        def store(self) -> Store:
            return Store("mine://root", MyBackend())
"""

import hashlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, TypeVar

from sf_pipelines.snapshot.errors import ObjectMissingError, SourceChangedError, StoreError
from sf_pipelines.snapshot.store import Store
from sf_pipelines.snapshot.testing.expect import expect, refused, same

_THREADS = 8
_ROUNDS = 5
# Above the size of one part of an upload, and no multiple of it.
_LARGE = 17 * 1024 * 1024 + 3

Result = TypeVar("Result")


class StoreConformance:
    """Tries every verb of a store on a fresh root.

    A subclass has a pytest fixture ``store`` that gives a store opened on an empty root, for each test another one.

    Attributes:
        odd_keys: keys with characters that some protocol treats as special; all must work, side by side.
        bad_keys: keys that lead out of the root; all must be refused.
    """

    odd_keys: ClassVar[tuple[str, ...]] = (
        "a b.txt",
        "a+b.txt",
        "a%20b.txt",
        "100%",
        "run_id=r1/db=00000/attempt=00-x",
        "2026-11-22T12:00:00.000000Z_run_id=r1/manifest",
        "q?x=1&y=2",
        "#part",
        "[1]",
        "it's",
        "ü/é/日本",
        "~tilde",
        "a,b;c@d",
        "..a",
        "UPPER",
        "upper",
    )
    bad_keys: ClassVar[tuple[str, ...]] = ("../outside", "a/../b", "a/./b", "..")

    # Reading and writing.

    def test_bytes_come_back(self, store: Store) -> None:
        """Whatever was put last is there, whole."""
        for data in (b"", b"one", bytes(range(256)) * 100, b"two"):
            store.put("a/b", data)
            same(store.get("a/b"), data, "get after put")
            same(store.head("a/b").size, len(data), "size of head")
        found = store.find("a/b")
        expect(found is not None and found.data == b"two", f"find gives {found}")
        expect(store.exists("a/b"), "exists is false after put")

    def test_what_is_missing(self, store: Store, tmp_path: Path) -> None:
        """Absence is an error of its own kind, or None where it is asked for; a folder is no object."""
        store.put("folder/object", b"x")
        for key in ("none", "folder", "folder/none"):
            calls: dict[str, Callable[[], object]] = {
                "get": lambda key=key: store.get(key),
                "get_versioned": lambda key=key: store.get_versioned(key),
                "head": lambda key=key: store.head(key),
                "open_file": lambda key=key: store.open_file(key),
                "download": lambda key=key: store.download(key, tmp_path / "never"),
                "sha256": lambda key=key: store.sha256(key),
            }
            for name, call in calls.items():
                refused(ObjectMissingError, call, f"{name} of the missing {key!r}")
            same(store.find(key), None, f"find of the missing {key!r}")
            same(store.exists(key), False, f"exists of the missing {key!r}")
        refused(ObjectMissingError, lambda: store.copy("none", "copy"), "copy of what is missing")
        same(list(store.objects("none")), [], "objects of a missing folder")
        same(store.folders("none"), [], "folders of a missing folder")

    def test_versions(self, store: Store) -> None:
        """Other bytes have another version; the same read twice has the same."""
        store.put("a", b"one")
        first = store.get_versioned("a")
        same(store.get_versioned("a"), first, "second read")
        same(store.head("a").etag, first.etag, "version of head")
        store.put("a", b"other")
        expect(store.get_versioned("a").etag != first.etag, "version after another put")

    def test_delete(self, store: Store) -> None:
        """What is deleted is gone; deleting again is fine, and so is writing again."""
        store.put("a/b", b"x")
        store.put("a/bc", b"y")
        store.delete("a/b")
        store.delete("a/b")
        store.delete("never/was")
        same(store.exists("a/b"), False, "exists after delete")
        same(store.get("a/bc"), b"y", "the neighbour of what was deleted")
        same(store.create("a/b", b"z"), True, "create after delete")

    def test_copy(self, store: Store) -> None:
        """A copy is independent and replaces what was there."""
        store.put("a", b"one")
        store.put("deep/b", b"old")
        store.copy("a", "deep/b")
        store.put("a", b"two")
        same((store.get("a"), store.get("deep/b")), (b"two", b"one"), "source and copy")

    # Names.

    def test_listing(self, store: Store) -> None:
        """Objects below a folder by whole segments; folders directly below, sorted."""
        keys = ["a/b/1", "a/b/c/2", "a/bc/3", "a/4", "b/5"]
        for key in reversed(keys):
            store.put(key, key.encode())
        for prefix in ("a/b", "a/b/", "a", "", "b", "a/b/c"):
            expected = [key for key in keys if key.startswith(f"{prefix.rstrip('/')}/" if prefix else "")]
            found = {item.key: item.size for item in store.objects(prefix)}
            same(found, {key: len(key) for key in expected}, f"objects of {prefix!r}")
        same(store.folders("a"), ["b", "bc"], "folders of a")
        same(store.folders("a/"), ["b", "bc"], "folders of a/")
        same(store.folders("b"), [], "folders of b")

    def test_many_objects(self, store: Store) -> None:
        """More objects than one page of a listing holds."""
        keys = {f"many/{number:04d}" for number in range(1005)}
        _at_once(lambda key: store.put(key, b"x"), sorted(keys))
        found = [item.key for item in store.objects("many")]
        expect(len(found) == len(keys) and set(found) == keys, f"objects gives {len(found)} of {len(keys)} keys")

    def test_odd_keys(self, store: Store) -> None:
        """Special characters mean nothing, and no two keys are one."""
        for key in self.odd_keys:
            same(store.create(f"odd/{key}", key.encode()), True, f"create of {key!r}")
        for key in self.odd_keys:
            same(store.get(f"odd/{key}").decode(), key, f"get of {key!r}")
            same(store.head(f"odd/{key}").key, f"odd/{key}", f"key of head of {key!r}")
        same({item.key for item in store.objects("odd")}, {f"odd/{key}" for key in self.odd_keys}, "objects")
        urls = {store.url_of(f"odd/{key}") for key in self.odd_keys}
        expect(len(urls) == len(self.odd_keys), "two keys have one url_of")
        for key in self.odd_keys:
            store.delete(f"odd/{key}")
        same(list(store.objects("odd")), [], "objects after deleting all")

    def test_keys_that_lead_elsewhere(self, store: Store) -> None:
        """Nothing outside of the root is read or written."""
        for key in self.bad_keys:
            refused(StoreError, lambda key=key: store.put(key, b"x"), f"put of {key!r}")
            refused(StoreError, lambda key=key: store.get(key), f"get of {key!r}")
            refused(StoreError, lambda key=key: store.delete(key), f"delete of {key!r}")

    def test_addresses(self, store: Store) -> None:
        """``url_of`` is the root's address, a slash and the key."""
        expect("://" in store.url and not store.url.endswith("/"), f"the root's address is {store.url!r}")
        same(store.url_of("a/b=1/c.npy"), f"{store.url}/a/b=1/c.npy", "url_of")

    # Files.

    def test_files(self, store: Store, tmp_path: Path) -> None:
        """Uploads and downloads are byte for byte, whatever the size, and hashed on the way."""
        block = bytes(range(256)) * 4096
        for size in (0, 1, len(block), _LARGE):
            data = (block * (size // len(block) + 1))[:size]
            source, target = tmp_path / "source", tmp_path / f"deep/{size}/target"
            source.write_bytes(data)
            same(store.upload(source, f"files/{size}"), store.head(f"files/{size}").etag, "version of upload")
            digest = hashlib.sha256(data).hexdigest()
            same(store.download(f"files/{size}", target), (size, digest), f"download of {size} bytes")
            expect(target.read_bytes() == data, f"the file of {size} bytes differs after upload and download")
            same(store.sha256(f"files/{size}"), digest, f"sha256 of {size} bytes")
            expect(store.get(f"files/{size}") == data, f"get of {size} bytes differs from what was uploaded")

    def test_ranges(self, store: Store) -> None:
        """A seekable file over one version: parts as asked for, short only at the end."""
        data = bytes(range(200))
        store.put("a", data)
        file = store.open_file("a")
        same((file.size(), file.read(3), file.tell()), (200, data[:3], 3), "first bytes")
        file.seek(-5, 2)
        same(file.read(100), data[-5:], "last bytes")
        same(file.read(1), b"", "bytes after the end")
        file.seek(10)
        same(file.read(), data[10:], "the rest")
        same(store.get_range(store.head("a"), 7, 9), data[7:9], "get_range")

    def test_a_file_is_pinned(self, store: Store) -> None:
        """Once the object is another one, a file over the old one says so and never mixes them."""
        store.put("a", b"first " * 10)
        file, info = store.open_file("a"), store.head("a")
        same(file.read(5), b"first", "before")
        store.put("a", b"second")
        refused(SourceChangedError, lambda: file.read(5), "a read after the object was replaced")
        store.delete("a")
        refused(SourceChangedError, lambda: store.get_range(info, 0, 5), "a read after the object was deleted")

    # Conditional writes.

    def test_create_once(self, store: Store) -> None:
        """The first one stays; writing one's own bytes again is still a success."""
        same(store.create("a", b"mine"), True, "first create")
        same(store.create("a", b"theirs"), False, "create of what is there")
        same(store.create("a", b"mine"), True, "create with the bytes that are there")
        same(store.get("a"), b"mine", "bytes")

    def test_compare_and_swap(self, store: Store) -> None:
        """Only on top of the version that was seen."""
        same(store.swap("a", b"1", None), True, "swap on nothing")
        same(store.swap("a", b"2", None), False, "swap on nothing, with something there")
        seen = store.get_versioned("a")
        same(store.swap("a", b"2", seen), True, "swap on what was seen")
        same(store.swap("a", b"3", seen), False, "swap on an older version")
        same(store.get("a"), b"2", "bytes after a swap that lost")
        latest = store.get_versioned("a")
        store.delete("a")
        same(store.swap("a", b"4", latest), False, "swap on what was deleted")
        same(store.exists("a"), False, "exists after a swap that lost")

    def test_one_creates(self, store: Store) -> None:
        """Of threads that create one object at once exactly one wins, and its bytes stay."""
        for number in range(_ROUNDS):
            key, names = f"race/{number}", [f"writer {one}".encode() for one in range(_THREADS)]
            won = _at_once(lambda name, key=key: store.create(key, name), names)
            same(won.count(True), 1, "winners of create")
            same(store.get(key), names[won.index(True)], "bytes of the winner")

    def test_one_swaps(self, store: Store) -> None:
        """Of threads that swap one version at once exactly one wins."""
        store.put("a", b"start")
        for number in range(_ROUNDS):
            seen = store.get_versioned("a")
            names = [f"round {number} writer {one}".encode() for one in range(_THREADS)]
            won = _at_once(lambda name, seen=seen: store.swap("a", name, seen), names)
            same(won.count(True), 1, "winners of swap")
            same(store.get("a"), names[won.index(True)], "bytes of the winner")

    def test_no_update_is_lost(self, store: Store) -> None:
        """Threads that add one each until it succeeds have counted all when they are done."""
        store.put("counter", b"0 start")

        def count(name: str) -> int:
            for _ in range(_ROUNDS):
                while True:
                    seen = store.get_versioned("counter")
                    number = int(seen.data.split()[0]) + 1
                    if store.swap("counter", f"{number} {name}".encode(), seen):
                        break
            return _ROUNDS

        names = [f"writer-{number}" for number in range(4)]
        total = sum(_at_once(count, names))
        same(int(store.get("counter").split()[0]), total, "the counter")

    def test_readers_see_old_or_new(self, store: Store) -> None:
        """A read during a swap gives one version, never a part of it."""
        sizes = (10, 200_000)
        store.put("a", b"x" * sizes[0])

        def write(_: int) -> list[bytes]:
            for number in range(20):
                data = bytes([65 + number]) * sizes[number % 2]
                same(store.swap("a", data, store.get_versioned("a")), True, "swap of the only writer")
            return []

        def read(_: int) -> list[bytes]:
            return [store.get("a") for _ in range(40)]

        found = _at_once(lambda job: write(job) if job == 0 else read(job), range(4))
        for data in (item for seen in found for item in seen):
            expect(len(data) in sizes and len(set(data)) == 1, f"a reader saw {len(data)} bytes of {set(data)}")


Job = TypeVar("Job")


def _at_once(call: Callable[[Job], Result], jobs: Iterable[Job]) -> list[Result]:
    """Runs a call for each job in threads that begin together; results in the order of the jobs."""
    waiting = list(jobs)
    together = threading.Barrier(min(_THREADS, len(waiting)))

    def begin(number: int) -> Result:
        if number < together.parties:
            together.wait(timeout=60)
        return call(waiting[number])

    with ThreadPoolExecutor(together.parties) as pool:
        return list(pool.map(begin, range(len(waiting))))
