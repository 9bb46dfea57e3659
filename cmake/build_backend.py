"""scikit-build-core's hooks for pip, which bring an nvcc where CUDA kernels are wanted and this machine has none.

What get_requires_for_build_wheel names, pip installs for the build alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scikit_build_core import build
from scikit_build_core.build import *  # noqa: F403

# The packages of CUDA 12 hold no nvcc. Their versions are NVIDIA's: cccl has its own beside the same release.
PACKAGES = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]
DRIVER = 580  # the oldest that runs what CUDA 13 compiles
OLDEST = 12  # release of CUDA whose nvcc compiles the kernels
TOOLKITS = Path("/usr/local")


def nvcc() -> str | None:
    """One that is here, as cmake/find_nvcc.cmake finds it, but for those that are too old for the kernels."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *TOOLKITS.glob("cuda*")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in folders if folder)])
    found = os.environ.get("CUDACXX") or shutil.which("nvcc", path=path)
    if found is None or os.environ.get("CUDACXX"):
        return found
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.", said)
    return None if release and int(release[1]) < OLDEST else found


def has_card() -> bool:
    """Whether there is a GPU whose driver is new enough."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return any(int(release) >= DRIVER for release in re.findall(r"^(\d+)\.", listed, re.MULTILINE))


def packages(settings: Any) -> list[str]:
    """Those that pip is asked for; ``settings`` are its ``--config-settings``."""
    given = (settings or {}).get("cmake.define.QLORA_NATIVE_CUDA", "AUTO")
    mode = os.environ.get("QLORA_NATIVE_CUDA", given).upper()
    is_wanted = mode == "ON" or (mode == "AUTO" and has_card())
    return PACKAGES if is_wanted and sys.platform == "linux" and nvcc() is None else []


def use_packages() -> None:
    """Have CMake take the nvcc of the packages, if it is the only one."""
    toolkits = (Path(folder, "nvidia", "cu13") for folder in sys.path)
    toolkit = next((folder for folder in toolkits if (folder / "bin" / "nvcc").is_file()), None)
    if toolkit is None or nvcc() is not None:
        return
    # Names under which nvcc and CMake look for the runtime, and which the packages leave out.
    for link, target in (("lib64", "lib"), ("lib/libcudart.so", "libcudart.so.13")):
        if not (toolkit / link).exists():
            (toolkit / link).symlink_to(target)
    os.environ["CUDACXX"] = str(toolkit / "bin" / "nvcc")


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build.get_requires_for_build_wheel(config_settings), *packages(config_settings)]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build.get_requires_for_build_editable(config_settings), *packages(config_settings)]


def build_wheel(*arguments: Any) -> str:
    use_packages()
    return build.build_wheel(*arguments)


def build_editable(*arguments: Any) -> str:
    use_packages()
    return build.build_editable(*arguments)
