"""QuantizedEmbedding: an embedding whose rows stay quantized and are decoded when they are looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from qlora_native.functional import dequantize_rows
from qlora_native.nn.linear import keep_bits
from qlora_native.weight import QuantizedWeight


class QuantizedEmbedding(nn.Embedding):
    """Rows of a frozen table [V, K] in one of GGUF's formats, whose rows are whole blocks; only those asked for are
    decoded.

    ``weight`` is a frozen uint8 parameter [bytes, 1], which a tied output embedding, a
    :class:`qlora_native.nn.QuantizedLinear`, shares. Casting the module changes nothing: rows come in the dtype that
    the weight stands for.
    """

    absmax: Tensor

    def __init__(self, value: QuantizedWeight) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate and fill a dense table
        self.num_embeddings, self.embedding_dim = value.shape
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = nn.Parameter(value.packed.view(-1, 1), requires_grad=False)
        self.register_buffer("absmax", value.absmax, persistent=False)
        self._about = value._map(lambda tensor: None)

    @property
    def quantized(self) -> QuantizedWeight:
        """The table as a value; its tensors are this module's own."""
        return self._about._with(self._about.op_args()._replace(packed=self.weight.view(-1), absmax=self.absmax))

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] to [..., K]."""
        return dequantize_rows(self.quantized, ids)

    def reset_parameters(self) -> None:
        """Does nothing: a frozen table has no initialization of its own."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._about.quant_type}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before: dict[str, Tensor | None] = {"absmax": self.absmax}
        super()._apply(fn, recurse)
        keep_bits(self, before)
        return self
