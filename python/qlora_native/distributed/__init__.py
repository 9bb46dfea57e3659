"""Several processes: models cut or copied over them through torch.distributed, on the ranks that torchrun starts.

``load_model``, which needs transformers, is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_native.distributed.sharding import blocks_of, lay_out, shard

if TYPE_CHECKING:
    from qlora_native.distributed.loading import load_model as load_model

__all__ = ["blocks_of", "lay_out", "load_model", "shard"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from qlora_native.distributed.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
