"""Attention within the documents of a packed sequence, one document at a time.

transformers gives packed sequences a mask of [B, 1, T, T] whose visible part is squares along the diagonal. Attention
under such a mask computes all T^2 scores; square by square it computes the visible ones. The squares are read off the
mask itself, so whatever model or library made it, the result is what the mask asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_FOUND = "_qlora_native_documents"  # kept on the mask, which all layers of a forward pass share


class Document(NamedTuple):
    """One square of a mask: its tokens, and its [1, 1, length, length] of the mask, None if that is plainly causal."""

    length: int
    mask: Tensor | None


Documents = tuple[tuple[Document, ...], ...]  # of each sequence of the batch, in order

# (query [1, H, T, D], key, value [1, H / g, T, D], mask or None, whether causal if there is no mask) to [1, T, H, D]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]


def documents_of(mask: Tensor, batch: int) -> Documents | None:
    """The documents of a boolean mask [B or 1, 1, T, T], True where a position is seen.

    None if there is one document only, or if anything is seen outside the squares.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    if mask.shape[0] not in (1, batch):
        return None
    if not hasattr(mask, _FOUND):
        setattr(mask, _FOUND, _find(mask))
    found: Documents | None = getattr(mask, _FOUND)
    return found * batch if found is not None and len(found) < batch else found


def _find(mask: Tensor) -> Documents | None:
    length = mask.shape[-1]
    sequences = []
    for square in mask[:, 0]:
        # Every position sees itself and, unless it is a document's first, the one before it.
        if length < 2 or not bool(square.diagonal().all()):
            return None
        starts = [0, *((~square.diagonal(-1)).nonzero().flatten() + 1).tolist(), length]
        documents, inside = [], 0
        for start, end in pairwise(starts):
            part = square[start:end, start:end]
            seen, size = int(part.sum()), end - start
            inside += seen
            plain = 2 * seen == size * (size + 1) and not bool(part.triu(1).any())
            documents.append(Document(size, None if plain else part[None, None]))
        if inside != int(square.sum()):
            return None
        sequences.append(tuple(documents))
    return tuple(sequences) if any(len(documents) > 1 for documents in sequences) else None


def by_document(attend: Attend, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """``attend`` on each document of each sequence; query [B, H, T, D], key and value [B, H / g, T, D]; to
    [B, T, H, D]."""
    rows = []
    # split, not slices: its derivative is one concatenation.
    for sequence, *operands in zip(documents, *(x.split(1) for x in (query, key, value)), strict=True):
        lengths = [document.length for document in sequence]
        parts = zip(sequence, *(x.split(lengths, 2) for x in operands), strict=True)
        rows.append(torch.cat([attend(q, k, v, document.mask, True) for document, q, k, v in parts], 1))
    return torch.cat(rows)
