"""The import hook: other packages import as ever, and ours follows them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HOOK = """
import sys
sys.path.insert(0, {folder!r})
import qlora_native._import_hooks as late
late.REGISTRIES = {{"outer.registry": "follower", "outer.other": "broken"}}
late.watch()
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import outer.registry, outer.other
loader = outer.registry.__loader__
print(outer.registry.followed, outer.other.value, type(loader).__name__, outer.registry.__spec__.loader is loader)
print(*[str(one.message) for one in caught if "qlora" in str(one.message)])
"""


def test_ours_follows_and_a_failure_of_ours_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "registry.py").write_text("followed = False\n")
    (tmp_path / "outer" / "other.py").write_text("value = 7\n")
    (tmp_path / "follower.py").write_text("from outer import registry\nregistry.followed = True\n")
    (tmp_path / "broken.py").write_text("from outer.other import gone\n")
    done = subprocess.run([sys.executable, "-c", HOOK.format(folder=str(tmp_path))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "True 7 SourceFileLoader True"
    assert second.startswith("qlora_native does not fit") and "outer (cannot import name 'gone'" in second


def test_dir_has_what_is_imported_when_it_is_first_used() -> None:
    """In a process of its own: here much has been used."""
    code = "import qlora_native as qn; print({*qn.__all__} - {*dir(qn)}, 'load_model' in vars(qn))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set() False\n"
