"""Bounded across processes, whole or absent, and never in the way of an answer."""

import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from runtime import disk_cache
from runtime.backends import CPU, Device
from runtime.cache_folder import DEFAULT_MAX_BYTES, LEDGER, CacheFolder, existing_cache
from runtime.disk_cache import DiskCache
from runtime.errors import InputError, MissingFile
from runtime.query_cache import QueryCache
from runtime.tiered_cache import TieredCache

ROOT = Path(__file__).parents[2]
DIGEST = "d" * 64
PRELUDE = """
import os, signal, sys
import numpy as np
from runtime.backends import CPU
from runtime.disk_cache import DiskCache
cache = DiskCache(sys.argv[1], "d" * 64, CPU)
def block(number, count=250):
    return np.full(count, number, np.float32)
"""


def block(number, count=250):
    return np.full(count, number, np.float32)  # an entry of about 1,200 bytes


def opened(folder, max_bytes=None, digest=DIGEST, device=CPU):
    return DiskCache(folder, digest, device, max_bytes)


def counted(cache):
    return cache.statistics()["disk"]


def held(cache):
    with cache.folder._locked():  # else a look at all files sees one that goes and the one it goes for
        return sum(entry.bytes for entry in cache.folder.entries())


def only(cache):
    (entry,) = cache.folder.entries()
    return entry


def python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def succeeded(process):
    _, err = process.communicate()
    assert process.returncode == 0, err


def test_what_one_writes_another_reads(tmp_path):
    opened(tmp_path / "cache").put("a", block(1))
    other = opened(tmp_path / "cache")
    assert other.get("b") is None and "b" not in other
    assert "a" in other and np.array_equal(other.get("a"), block(1))
    assert (counted(other)["hits"], counted(other)["misses"]) == (1, 1)
    assert counted(other)["bytes"] == held(other) > 1000
    assert counted(other)["max_bytes"] == DEFAULT_MAX_BYTES


def test_bundles_backends_and_providers_share_nothing(tmp_path):
    caches = [
        opened(tmp_path, digest=digest, device=device)
        for digest in (DIGEST, "d" * 63 + "e", "e" * 64)
        for device in (CPU, Device("trt"), Device("ort", "cuda"))
    ]
    for number, cache in enumerate(caches):
        assert cache.get("a") is None
        cache.put("a", block(number))
    assert [cache.get("a")[0] for cache in caches] == list(range(9))
    assert opened(tmp_path, device=Device(threads=1)).get("a")[0] == 0, "threads change no figure that matters"


def test_the_folder_is_for_this_user_alone(tmp_path):
    old = os.umask(0)
    try:
        (tmp_path / "open").mkdir(mode=0o777)
        for folder in (tmp_path / "open", tmp_path / "new"):
            opened(folder).put("a", block(1))
            for path in [folder, *folder.rglob("*")]:
                assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    finally:
        os.umask(old)


@pytest.mark.parametrize("where", ["format", "checksum", "key", "dtype", "shape", "data", "last"])
def test_a_flipped_bit_costs_one_computation_and_no_error(tmp_path, where):
    cache = opened(tmp_path)
    cache.put("a", block(1))
    path = only(cache).path
    content = bytearray(path.read_bytes())
    place = {
        "format": 3,
        "checksum": 30,
        "key": content.index(b'"key"') + 12,
        "dtype": content.index(b"<f4"),
        "shape": content.index(b"[250]") + 1,
        "data": len(content) // 2,
        "last": len(content) - 1,
    }[where]
    content[place] ^= 4
    path.write_bytes(content)
    assert cache.get("a") is None
    assert not path.exists()
    assert (counted(cache)["discarded"], counted(cache)["misses"], counted(cache)["bytes"]) == (1, 1, 0)
    cache.put("a", block(1))
    assert cache.get("a")[0] == 1 and counted(cache)["failures"] == 0


def cut(path):
    os.truncate(path, 500)


def emptied(path):
    os.truncate(path, 0)


def foreign(path):
    path.write_text("my shopping list")


def moved_here(path):
    other = opened(path.parents[2])
    other.put("b", block(2))
    (source,) = [entry.path for entry in other.folder.entries() if entry.path != path]
    source.replace(path)


def link(path):
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [cut, emptied, foreign, moved_here, link, pipe])
def test_what_is_no_entry_is_discarded(tmp_path, damage):
    cache = opened(tmp_path)
    cache.put("a", block(1))
    damage(only(cache).path)
    assert cache.get("a") is None
    assert (counted(cache)["discarded"], counted(cache)["failures"]) == (1, 0)
    cache.put("a", block(3))
    assert cache.get("a")[0] == 3


def test_a_folder_in_the_place_of_an_entry_is_left_alone(tmp_path):
    cache = opened(tmp_path)
    cache.put("a", block(1))
    path = only(cache).path
    path.unlink()
    (path / "inside").mkdir(parents=True)
    assert cache.get("a") is None
    cache.put("a", block(1))
    assert (path / "inside").is_dir() and counted(cache)["problem"] is not None


def test_the_least_recently_used_goes_first(tmp_path):
    """Use is recorded without writing the file again, and across objects."""
    cache = opened(tmp_path)
    cache.put("0", block(0))
    size = only(cache).bytes
    cache = opened(tmp_path, max_bytes=4 * size)
    for number in range(1, 4):
        cache.put(str(number), block(number))
    before = only_named(cache, "0").read_bytes(), only_named(cache, "0").stat().st_ino
    assert opened(tmp_path).get("0") is not None
    assert (only_named(cache, "0").read_bytes(), only_named(cache, "0").stat().st_ino) == before
    cache.put("4", block(4))
    assert [number for number in range(5) if str(number) in cache] == [0, 3, 4], "two went, to 98 % of the bound"
    assert counted(cache)["evictions"] == 2 and held(cache) == counted(cache)["bytes"] == 3 * size


def only_named(cache, key):
    return cache.folder.place(DIGEST, cache._name(key))


def test_the_bound_holds_within_two_percent(tmp_path):
    bound = 300_000
    cache = opened(tmp_path, max_bytes=bound)
    for number in range(600):
        cache.put(str(number), block(number))
        if number % 3 == 0:
            now = held(cache)
            assert now <= bound and now == counted(cache)["bytes"]
            assert number < 300 or now >= 0.98 * bound - 1300
    assert counted(cache)["evictions"] > 300
    cache.put("small bound", block(0, count=bound))
    assert "small bound" not in cache, "larger than all the room"
    again = opened(tmp_path, max_bytes=bound // 3)
    assert held(again) <= bound // 3 and counted(cache)["max_bytes"] == bound // 3, "one bound for all, from now on"


def test_processes_keep_one_bound_and_one_count(tmp_path):
    bound = 200_000
    cache = opened(tmp_path, max_bytes=bound)
    code = """
start, failed = int(sys.argv[2]), 0
for step in range(250):
    number = start + step
    cache.put(str(number), block(number))  # half of them are another's too
    found = cache.get(str(number))
    failed += found is not None and not (found == number).all()
assert not failed and cache.statistics()["disk"]["failures"] == 0, cache.statistics()
"""
    writers = [python(code, tmp_path, start) for start in (0, 125, 250)]
    most = 0
    while any(writer.poll() is None for writer in writers):
        most = max(most, held(cache))
        time.sleep(0.02)
    for writer in writers:
        succeeded(writer)
    assert 0.9 * bound < held(cache) == counted(cache)["bytes"] <= bound
    assert 0 < most <= 1.02 * bound
    assert list(cache.folder.staging.iterdir()) == []


@pytest.mark.parametrize("memory_bytes", [0, 20_000])
def test_eight_threads_on_one_cache(tmp_path, memory_bytes):
    bound = 60_000
    cache = TieredCache(QueryCache(memory_bytes), opened(tmp_path, max_bytes=bound))
    wrong, largest = [], []

    def work(seed):
        draw = random.Random(seed)
        for _ in range(80):
            number = draw.randrange(90)
            found = cache.get(str(number))
            if found is None:
                cache.put(str(number), block(number))
            elif not (found == number).all():
                wrong.append(number)
        largest.append(held(cache._disk))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = cache.statistics()
    assert not wrong and cache.hits + cache.misses == 640
    assert cache.hits == found["memory"]["hits"] + found["disk"]["hits"] > 0
    assert found["disk"]["failures"] == found["disk"]["discarded"] == 0
    assert len(largest) == 8 and max(largest) <= bound and found["disk"]["bytes"] == held(cache._disk)


@pytest.mark.parametrize("moment", ["half written", "before the rename"])
def test_a_killed_writer_leaves_nothing_that_counts(tmp_path, moment):
    dying = """
from pathlib import Path
from runtime import disk_cache
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def half(work, content):
    work.write_bytes(content[:600])
    die()
if sys.argv[2] == "half written":
    disk_cache._write = half
else:
    Path.replace = die
cache.put("a", block(1))
"""
    process = python(dying, tmp_path, moment)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    cache = CacheFolder(tmp_path)  # clears what it left
    assert list(cache.entries()) == list(cache.staging.iterdir()) == []
    again = opened(tmp_path, max_bytes=1800)  # room for one entry, and not for one beside a wrong count
    assert again.get("a") is None
    again.put("a", block(1))
    assert again.get("a")[0] == 1 and counted(again)["bytes"] == held(again)


def test_a_full_disk_is_told_once_and_stops_nothing(tmp_path, monkeypatch):
    cache = opened(tmp_path)
    cache.put("a", block(1))
    attempts = []
    write = disk_cache._write
    monkeypatch.setattr(disk_cache, "_write", lambda *given: attempts.append(given) or write(*given))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))  # the kernel refuses longer files, as a full disk does
    try:
        for name in "bcd":
            cache.put(name, block(2))
        assert cache.get("a")[0] == 1, "reading goes on"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(attempts) == 1, "the next attempt comes after a pause"
    assert counted(cache)["failures"] == 1
    assert counted(cache)["problem"].startswith(f"{tmp_path}: no space left (")
    assert held(cache) == counted(cache)["bytes"] and list(cache.folder.staging.iterdir()) == []
    monkeypatch.setattr(disk_cache, "RETRY_S", 0.0)
    cache._pause_until_s = 0.0
    cache.put("b", block(2))
    assert cache.get("b")[0] == 2, "room again, entries again"


def test_a_cache_can_be_made_on_a_full_disk(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        cache = opened(tmp_path, max_bytes=5000)
        cache.put("a", block(1))
        assert cache.get("a") is None and counted(cache)["failures"] == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    cache._pause_until_s = 0.0
    cache.put("a", block(1))
    assert cache.get("a")[0] == 1 and counted(cache)["max_bytes"] == 5000


def test_the_folder_may_vanish_meanwhile(tmp_path):
    cache = opened(tmp_path / "cache")
    cache.put("a", block(1))
    shutil.rmtree(tmp_path / "cache")
    assert cache.get("a") is None
    cache.put("a", block(2))
    assert cache.get("a")[0] == 2
    assert (counted(cache)["failures"], counted(cache)["bytes"]) == (0, held(cache))
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


@pytest.mark.parametrize("content", ["", "{", "[]", '{"bytes": -5, "max_bytes": 10}', '{"bytes": "x", "max_bytes": 1}'])
def test_a_damaged_ledger_is_counted_anew(tmp_path, content):
    cache = opened(tmp_path)
    cache.put("a", block(1))
    (tmp_path / LEDGER).write_text(content)
    assert counted(cache)["bytes"] == held(cache)
    cache.put("b", block(2))
    assert counted(cache)["bytes"] == held(cache) > only_named(cache, "a").stat().st_size


def test_only_a_cache_or_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.jpg").write_bytes(b"meow")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected an empty folder or a query cache"):
        opened(tmp_path / "pictures")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="expected a folder"):
            opened(path)
    with pytest.raises(InputError, match=r"at least 1 byte .* found 0"):
        opened(tmp_path / "new", max_bytes=0)
    with pytest.raises(MissingFile, match="qforge cache warm"):
        existing_cache(tmp_path / "pictures")


def test_clearing_takes_entries_and_nothing_else(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path, digest="e" * 64)
    for name in "ab":
        first.put(name, block(1))
    second.put("a", block(2))
    (tmp_path / "notes.txt").write_text("mine")
    assert len(first.folder.clear(DIGEST)) == 2
    assert first.get("a") is None and second.get("a")[0] == 2
    assert counted(first)["bytes"] == held(first) == only(second).bytes
    assert len(second.folder.clear()) == 1 and held(second) == counted(second)["bytes"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", LEDGER, "staging"]
