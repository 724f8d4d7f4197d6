"""Where small files go that a user's machine makes for itself and can make again: $XDG_CACHE_HOME/qforge.

Never into a bundle, which may be read-only and whose every file is hashed.
"""

import os
from pathlib import Path


def user_cache(part: str) -> Path:
    """The folder of one purpose; who writes makes it."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"  # the standard ignores relative paths
    return base / "qforge" / part
