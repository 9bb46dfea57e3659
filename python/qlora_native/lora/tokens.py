"""Rows of an embedding, those of a few tokens, that are trained in the place of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_native.functional import dense_linear
from qlora_native.nn.experts import Substitute

DELTA = "token_adapter.trainable_tokens_delta"  # behind a module's path: PEFT's name for the rows


class TokenRows(nn.Module):
    """The fp32 rows [R, K] of some tokens, which begin as those of ``weight`` [V, K]; tied modules share them."""

    token_ids: Tensor

    def __init__(self, weight: Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        self.ids, self.enabled = list(ids), True
        self.register_buffer(
            "token_ids", torch.tensor(self.ids, device=weight.device), persistent=False
        )
        self.trainable_tokens_delta = nn.Parameter(weight.detach()[self.token_ids].float())


class WithTokenRows(Substitute):
    """An embedding, or a linear layer without a bias, with the rows of ``token_adapter``; ``weight`` is a copy."""

    token_adapter: TokenRows

    @property
    def weight(self) -> Tensor:
        return self.own.index_copy(0, self.token_adapter.token_ids, self.rows().to(self.own.dtype))

    @property
    def own(self) -> Tensor:
        """The frozen weight [V, K]."""
        return self._parameters["weight"]  # type: ignore[return-value]

    def rows(self) -> Tensor:
        """The rows, fp32; its own while adapters are off."""
        adapter = self.token_adapter
        return (
            adapter.trainable_tokens_delta if adapter.enabled else self.own[adapter.token_ids].float()
        )

    def forward(self, x: Tensor) -> Tensor:
        ids, own = self.token_adapter.token_ids, self.own
        rows = self.rows().to(own.dtype)
        if isinstance(self, nn.Linear):
            return dense_linear(x, own).index_copy(-1, ids, dense_linear(x, rows))
        hits = x.unsqueeze(-1).eq(ids)
        out = torch.where(hits.any(-1, keepdim=True), hits.to(own.dtype) @ rows, F.embedding(x, own))
        scale = getattr(self, "embed_scale", None)  # of Gemma's embeddings
        return out if scale is None else out * scale.to(out.dtype)


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """The rows of ``trainable_tokens`` by the path of their module, of tied ones the first."""
    found = ((path, part) for path, part in model.named_modules() if isinstance(part, TokenRows))
    return {path.removesuffix(".token_adapter"): part for path, part in found}


def put_rows(weight: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """A copy of ``weight`` [V, K] with ``rows`` [R, K] in the places ``ids`` [R], which may follow its last."""
    weight = F.pad(weight, (0, 0, 0, max(0, int(ids.max()) + 1 - len(weight))))
    return weight.index_copy(0, ids, rows.to(weight.dtype))
