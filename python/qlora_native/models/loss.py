"""The loss of a causal language model without its logits.

The logits of one micro-batch are the largest tensor of a training step: 4 x 1024 tokens over 128,256 words take 2.1 GB
in fp32. So the output embedding is taken out of the model's forward and multiplied chunk by chunk inside
``qn.linear_cross_entropy``.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.dropout import _DropoutNd

import qlora_native as qn
from qlora_native.data.template import IGNORE_INDEX
from qlora_native.lora.layer import TrainedModule
from qlora_native.lora.tokens import WithTokenRows
from qlora_native.models.fuse import Dense, modes_kept
from qlora_native.nn.linear import QuantizedLinear

# config fields by which known models change the logits after the output embedding
LOGIT_FIELDS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)

Finder = Callable[[Any, Mapping[str, Tensor]], bool]


def _once(find: Finder) -> Finder:
    """``find(model, inputs)``, which is run once for each output embedding of a model."""
    found: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    @wraps(find)
    def once(model: Any, inputs: Mapping[str, Tensor]) -> bool:
        head = model.get_output_embeddings() or model  # an adapter may put another in its place
        if head not in found:
            found[head] = find(model, inputs)
        return found[head]

    return once


def trained_tokens(batch: Mapping[str, Tensor]) -> int:
    """How many positions of the batch have a label once it is shifted by one: the terms of the loss's mean."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def causal_lm_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy in nats over the labeled positions of one micro-batch, an fp32 scalar with gradients.

    ``batch`` holds ``input_ids`` and ``labels``, both int64 [B, T] (the label of a token is the token itself, -100
    where it is not trained; the shift by one happens here), and other arguments of the model's forward. A model that
    changes its logits after the product with the output embedding goes through its own forward, with one warning.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    if not has_plain_head(model, inputs):
        trained = targets != IGNORE_INDEX
        return F.cross_entropy(
            model(**inputs, use_cache=False).logits[trained].float(), targets[trained]
        )
    hidden, head = hidden_states(model, without_needless_mask(model, inputs, targets))
    if isinstance(head, WithTokenRows):
        rows = head.rows(), head.token_adapter.token_ids
        loss = qn.linear_cross_entropy(hidden, head.own.to(hidden.dtype), targets, IGNORE_INDEX, *rows)
    else:
        weight = head.quantized if isinstance(head, QuantizedLinear) else head.weight.to(hidden.dtype)
        loss = qn.linear_cross_entropy(hidden, weight, targets, IGNORE_INDEX)
    if isinstance(head, FSDPModule) and not any(p.requires_grad for p in head.parameters()):
        head.reshard()  # the gradient of the hidden states is there already
    return loss


def check_loss(model: Any) -> None:
    """Run the checks of :func:`causal_lm_loss` now: their forward passes must be the same on all ranks of a sharded
    model, which a batch's are not."""
    ids = torch.arange(16, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    if has_plain_head(model, {"input_ids": ids}):
        _is_causal(model, {"input_ids": ids})


def without_needless_mask(
    model: Any, inputs: Mapping[str, Tensor], targets: Tensor
) -> dict[str, Tensor]:
    """The inputs with an attention mask of ones where it hides only padding behind a row, which no trained token sees.

    A mask that hides something costs: attention computes with a table of [B, 1, T, T] and cannot leave out the upper
    triangle.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != targets.shape:
        return dict(inputs)
    hidden = mask == 0
    is_needed = (
        not hidden.any()
        or (hidden[:, :-1] & ~hidden[:, 1:]).any()  # padding before a row
        or (hidden & (targets != IGNORE_INDEX)).any()
        or not _is_causal(model, inputs)
    )
    return dict(inputs) if is_needed else {**inputs, "attention_mask": torch.ones_like(mask)}


@_once
@torch.no_grad()
def _is_causal(model: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the first half of a row comes out the same, bit for bit, whatever stands in the second, and about the
    same whether the second is masked or not."""
    row = inputs["input_ids"][:1, :16]
    half, mask = row.shape[1] // 2, torch.ones_like(row)
    second = torch.arange(row.shape[1], device=row.device) >= half
    other = (row + second) % model.get_input_embeddings().num_embeddings
    with modes_kept(model):
        model.eval()
        hidden, changed, masked = (
            hidden_states(model, {"input_ids": ids, "attention_mask": seen})[0][:, :half].float()
            for ids, seen in ((row, mask), (other, mask), (row, mask * ~second))
        )
    return torch.equal(hidden, changed) and bool((hidden - masked).norm() <= 3e-2 * hidden.norm())


def hidden_states(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, nn.Linear]:
    """What enters the output embedding, [B, T, hidden], taken from the model's own forward, and that embedding.

    It is called with no token at all, so that its product costs nothing. A call of the decoder alone would miss what
    some models do to the hidden states before the head.
    """
    head = model.get_output_embeddings()
    taken: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append(args[0])
        return (args[0][:, :0].detach(), *args[1:])

    with head.register_forward_pre_hook(take):
        model(**inputs, use_cache=False)
    return taken[0], head


@_once
@torch.no_grad()
def has_plain_head(model: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the logits are exactly the head's output; a warning if not.

    The head's output is swapped for known numbers, which must come out unchanged. They are large, so that soft-capping
    shows whatever the weights are. Two tokens are enough.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    # FSDP puts two classes before it.
    kind = type(head).__mro__[2] if isinstance(head, FSDPModule) else type(head)
    kind = kind.__bases__[1] if issubclass(kind, (TrainedModule, WithTokenRows)) else kind
    if kind is not nn.Linear and not isinstance(head, (QuantizedLinear, Dense)):
        reason = f"its output embedding is {kind.__name__}, not a linear layer"
    elif head.bias is not None:
        reason = "its output embedding has a bias"
    else:
        probe = torch.linspace(-96.0, 96.0, head.out_features, device=model.device)
        given: list[Tensor] = []

        def swap(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            given.append(probe.to(output.dtype).expand_as(output))
            return given[-1]

        with head.register_forward_hook(swap), modes_kept(model):
            logits = model(input_ids=inputs["input_ids"][:1, :2], use_cache=False).logits
        if (
            len(given) == 1
            and given[0].shape[1] == 2
            and torch.equal(logits.float(), given[0].float())
        ):
            return True
        fields = (
            f" ({key}={value})"
            for key in LOGIT_FIELDS
            if (value := getattr(config, key, None)) is not None
        )
        reason = f"it changes its logits after the output embedding{next(fields, '')}"
    warnings.warn(
        f"{type(model).__name__}: {reason}, so the loss is taken from the model's own logits, "
        f"{config.vocab_size * 4 / 1024:.0f} KiB of memory for each token of a micro-batch",
        stacklevel=3,
    )
    return False


def is_random(model: Any) -> bool:
    """Whether the model draws random numbers in training, by its modules and its config."""
    options = model.config.get_text_config().to_dict()
    rates = [rate for name, rate in options.items() if re.search("drop|jitter|noise", name)]
    rates += [
        getattr(module, "p" if isinstance(module, _DropoutNd) else "dropout", None)
        for module in model.modules()
    ]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
