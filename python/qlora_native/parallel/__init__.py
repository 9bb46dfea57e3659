"""Several processes: models cut or copied over them through torch.distributed, on the ranks that torchrun starts."""

from .sharding import blocks_of, shard

__all__ = ["blocks_of", "shard"]
