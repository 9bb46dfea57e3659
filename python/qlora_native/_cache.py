"""The one folder of files that can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``QLORA_NATIVE_CACHE``, or ``qlora_native`` in the user's cache; it need not exist."""
    if named := os.environ.get("QLORA_NATIVE_CACHE", ""):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path there is to be ignored (XDG base directory specification).
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "qlora_native"
