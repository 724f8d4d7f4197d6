"""The verbs around a cache on the disk, and what every verb says when that disk refuses; without torch."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qforge.console import Outcome
from qforge.sources import images_of
from runtime.backends import Device
from runtime.bundle import read_bundle
from runtime.cache_folder import GROUP_CHARS, Stored, existing_cache
from runtime.disk_cache import DiskCache
from runtime.errors import InputError
from runtime.progress import Progress
from runtime.query_cache import Statistics
from runtime.warm import warm_up

NAMED = 10
"""Unreadable images told by name; --json has all."""


def warm(
    path: Path,
    sources: Sequence[Path],
    cache_dir: Path,
    max_mib: int | None,
    image_size: int | None,
    device: Device,
) -> Outcome:
    """Counts of images, and of the cache."""
    if max_mib is not None and max_mib < 1:
        raise InputError(f"--max-mib: expected at least 1, found {max_mib}")
    images, bundle = list(images_of(sources)), read_bundle(path)
    max_bytes = None if max_mib is None else max_mib * 2**20
    cache = DiskCache(cache_dir, bundle.manifest.digest, device, max_bytes)
    warmed = warm_up(bundle, images, cache, device=device, image_size=image_size, progress=Progress())
    counted = warned(cache.statistics())
    disk = counted["disk"]
    lines = [f"Cache: {cache_dir} ({warmed.images} images, {warmed.new} of them new; {_fullness(disk)})"]
    if disk["evictions"]:
        lines.append(
            f"{disk['evictions']} entries had to go: these images, or others before them, do not fit; "
            f"give the cache more room: --max-mib"
        )
    if warmed.broken:
        lines.append(f"{len(warmed.broken)} images cannot be read and were left out:")
        lines += list(warmed.broken.values())[:NAMED]
        if len(warmed.broken) > NAMED:
            lines.append(f"… and {len(warmed.broken) - NAMED} more; --json names all")
    data = {"images": warmed.images, "new": warmed.new, "broken": warmed.broken, "cache": counted}
    return Outcome(data, "\n".join(lines))


def info(cache_dir: Path) -> Outcome:
    """Entries and bytes, in all and by bundle."""
    folder = existing_cache(cache_dir)
    bundles = defaultdict[str, list[Stored]](list)
    for entry in folder.entries():
        bundles[entry.group].append(entry)
    facts = {group: _facts(found) for group, found in sorted(bundles.items())}
    total: dict[str, Any] = {
        "entries": sum(one["entries"] for one in facts.values()),
        "bytes": sum(one["bytes"] for one in facts.values()),
        "max_bytes": folder.usage().max_bytes,
    }
    lines = [f"Cache: {cache_dir} ({total['entries']} entries, {_fullness(total)})"]
    lines += [
        f"bundle {group}…: {one['entries']} entries, {one['bytes'] / 2**20:.1f} MiB, last used {one['last_used']}"
        for group, one in facts.items()
    ]
    return Outcome({"cache": str(cache_dir), **total, "bundles": facts}, "\n".join(lines))


def clear(cache_dir: Path, bundle: Path | None) -> Outcome:
    """What was removed."""
    folder = existing_cache(cache_dir)
    group = None if bundle is None else read_bundle(bundle, check_hashes=False).manifest.digest[:GROUP_CHARS]
    gone = folder.clear(group)
    freed = sum(entry.bytes for entry in gone)
    data = {"cache": str(cache_dir), "entries": len(gone), "bytes": freed}
    return Outcome(data, f"Removed {len(gone)} entries ({freed / 2**20:.1f} MiB) from {cache_dir}")


def warned(statistics: Statistics) -> Statistics:
    """The same, after a warning on stderr when the disk refused something; the answers are right all the same."""
    problem = statistics.get("disk", {}).get("problem")
    if problem is not None:
        print(f"warning: the cache does not keep everything: {problem}; the answers do not suffer", file=sys.stderr)
    return statistics


def _facts(entries: Sequence[Stored]) -> dict[str, Any]:
    last_used_s = max(entry.used_ns for entry in entries) / 1e9
    return {
        "entries": len(entries),
        "bytes": sum(entry.bytes for entry in entries),
        "last_used": datetime.fromtimestamp(last_used_s, UTC).isoformat(timespec="seconds"),
    }


def _fullness(facts: dict[str, Any]) -> str:
    return f"{facts['bytes'] / 2**20:.1f} of {facts['max_bytes'] / 2**20:.1f} MiB used"
