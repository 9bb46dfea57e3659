"""The memory of a training run before it starts: bytes of each part at each moment, the peak, and what fits.

Bytes throughout. docs/memory.md derives the formulas; bench/bench_estimate.py holds them against measured peaks.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from qlora_native import _C, _native
from qlora_native._memory import LEAST_MAPPED, LEAST_MAPPED_WITH_CHECKPOINTING
from qlora_native.lora import LoRALinear
from qlora_native.lora.targets import saved_modules
from qlora_native.models.build import four_bit_parts
from qlora_native.models.load import LoadReport
from qlora_native.models.loss import LOGIT_FIELDS, is_random
from qlora_native.nn import QuantizedLinear
from qlora_native.ops._cuda_products import PANEL_BYTES
from qlora_native.ops.causal_attention import ALIGNMENT, is_native
from qlora_native.ops.linear_cross_entropy import chunk_tokens
from qlora_native.optim.states import MIN_CODED_NUMEL
from qlora_native.tool.estimate.activations import (
    LayerBytes,
    decoder_layers,
    head_shape,
    layer_bytes,
    norm_bytes,
    norms_of,
)
from qlora_native.tool.estimate.model import Setting, meta_model
from qlora_native.weights.source import Source

MOMENTS = {"adamw": 2, "adamw8bit": 2, "lion": 1}
LAYER_SLACK = 200 << 10  # on the CPU: Python's objects for modules and graph, small holes
THREAD_SCRATCH = 2 << 20  # of a matrix product: at most about so much a thread, beside what AMX packs
FULL_LOGITS = 14  # bytes a logit where the model makes them all: scores, their fp32 copy, log-softmax and its gradient
CUDA_CONTEXT = 600 << 20  # of a card: what the driver and its libraries hold beside torch's allocator


@dataclass(frozen=True)
class Terms:
    """Bytes by purpose; the fields are the rows of the table."""

    weights: int = 0  # 4-bit codes
    scales: int = 0  # of the 4-bit weights
    dense: int = 0  # embeddings, norms and whatever else is not 4-bit
    adapters: int = 0  # fp32 masters
    copies: int = 0  # of them, as their products on CUDA take them
    gradients: int = 0  # of the adapters
    optimizer: int = 0  # states that are in memory
    activations: int = 0  # saved for the backward pass, and gradients on their way through a layer
    loss: int = 0  # logits of a chunk, hidden states at the output embedding and their gradient
    scratch: int = 0  # of kernels, and of loading
    slack: int = 0  # held by the allocator beside all this

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """The memory of one setting."""

    setting: Setting
    moments: dict[str, Terms]  # in each part of a run: "loading", "loss", "backward", "step", "shipping"
    paged: int  # bytes of optimizer states in a page file or in the host's memory
    graphs: int  # bytes of a card that only the passes in CUDA graphs can use: what the largest of them takes
    is_rough: tuple[str, ...]  # classes of layers that keep more than is counted

    @property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def peak(self) -> Terms:
        return self.moments[self.moment]

    @property
    def total(self) -> int:
        return self.peak.total

    @property
    def reserve(self) -> int:
        """Bytes of a card beside what is in use: that CUDA itself takes, and the pool of its graphs."""
        return CUDA_CONTEXT + self.graphs if self.setting.device == "cuda" else 0

    def fits(self, num_bytes: int) -> bool:
        """Whether a card, or a machine, of so many free bytes is enough."""
        return self.total + self.reserve <= num_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "total": self.total,
            "moment": self.moment,
            "reserve": self.reserve,
            "paged": self.paged,
            "graphs": self.graphs,
            "peak": vars(self.peak),
            "moments": {name: {**vars(terms), "total": terms.total} for name, terms in self.moments.items()},
        }


class Estimator:
    """Estimates for one model; the shapes are read once, batch size and length vary.

    Args:
        model: a folder (``config.json``, with or without weights), a GGUF file, an open source, or a config alone. The
            attribute is the model on the meta device, with adapters and its ``load_report``.
        setting: what :meth:`at` starts from.
    """

    def __init__(self, model: Path | Source | PreTrainedConfig, setting: Setting) -> None:
        self.setting = setting
        self.model, self.loading_bytes = meta_model(model, setting)  # held beside the model while it is loaded
        self.config: Any = self.model.config.get_text_config()
        self.positions: int = getattr(self.config, "max_position_embeddings", None) or 1 << 20
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained = [parameter.numel() for parameter in trained]
        self.adapters = sum(parameter.nbytes for parameter in trained)
        whole = saved_modules(self.model, setting.lora.modules_to_save)
        parameters = {parameter for module in whole.values() for parameter in module.parameters()}
        self.whole = sum(parameter.nbytes for parameter in parameters)
        names = [f"{path}.{name}" for path, module in whole.items() for name, _ in module.named_parameters()]
        report: LoadReport = self.model.load_report
        self.replaced = sum(report.dense.get(name, 0) for name in names)  # bytes that they had before
        embeddings = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        trains_in, trains_out = (part in whole.values() for part in embeddings)
        numel = self.config.vocab_size * self.config.hidden_size
        self.whole_in = trains_in * numel
        self.whole_out = trains_out * numel
        four_bit = four_bit_parts(self.model).values()
        self.packed = sum(weight.packed.nbytes for weight in four_bit)
        self.shapes = {(weight.shape[-2], weight.shape[-1]) for weight in four_bit}
        layers = decoder_layers(self.model)
        inside = tuple(path + "." for path, _ in layers)
        self.modules = [layer for _, layer in layers]
        norms = [norm for path, norm in norms_of(self.model) if not path.startswith(inside)]
        self.norm_bytes = sum(norm_bytes(norm, setting) for norm in norms)  # kept for a token, outside of the layers
        # Whether the config names an operation between the output embedding and the logits.
        scaled = any(getattr(self.config, name, None) not in (None, 1, 1.0) for name in LOGIT_FIELDS)
        self.changes_logits = scaled or getattr(self.model.get_output_embeddings(), "bias", None) is not None
        self.is_random = is_random(self.model)
        self.copied = copied_bytes(self.model, setting.dtype)
        self._layers: dict[bool, list[LayerBytes]] = {}

    def at(self, **changes: Any) -> Estimate:
        """The estimate with other values of the setting on which no shape depends."""
        return _Sum(self, replace(self.setting, **changes)).estimate()

    def longest(self, num_bytes: int, batch_size: int) -> int:
        """The most tokens a row, a multiple of 64 up to the model's positions, with which ``batch_size`` rows fit; 0 if
        none do."""
        lengths = range(64, max(64, self.positions) + 1, 64)
        fitting = bisect_left(lengths, True, key=lambda n: not self.at(batch_size=batch_size, length=n).fits(num_bytes))
        return 64 * fitting

    def widest(self, num_bytes: int, length: int) -> int:
        """The most rows of ``length`` tokens that fit; 0 if none do."""
        rows = range(1, (1 << 16) + 1)
        return bisect_left(rows, True, key=lambda n: not self.at(batch_size=n, length=length).fits(num_bytes))

    def layers(self, setting: Setting) -> list[LayerBytes]:
        window = getattr(self.config, "sliding_window", None)
        beyond = isinstance(window, int) and setting.length > window
        if beyond not in self._layers:
            self._layers[beyond] = layer_bytes(self.model, setting)
        return self._layers[beyond]


class _Sum:
    """The terms of one setting."""

    def __init__(self, estimator: Estimator, setting: Setting) -> None:
        self.estimator = estimator
        self.setting = setting
        self.config = estimator.config
        self.on_card = setting.device == "cuda"
        self.tokens = setting.batch_size * setting.length
        self.size = setting.dtype.itemsize
        self.pairs = self.tokens * setting.length
        self.layers = estimator.layers(setting)

    def estimate(self) -> Estimate:
        adapters = self.estimator.adapters
        packed = self.estimator.packed
        in_memory = sum(state_bytes(numel, self.setting.optimizer) for numel in self.estimator.trained)
        paged = 0
        if self.setting.paged is True:
            in_memory, paged = min(in_memory, self.setting.page_budget or 0), in_memory
            in_memory = in_memory if self.on_card else 0
        report: LoadReport = self.estimator.model.load_report
        frozen = Terms(weights=packed, scales=report.bytes_4bit - packed, dense=report.bytes_dense)
        copies = self.estimator.copied if self.on_card else 0
        dense = frozen.dense - self.estimator.replaced
        held = replace(frozen, dense=dense, adapters=adapters, copies=copies)
        held = replace(held, optimizer=in_memory, scratch=self._scratch())
        before = self._gradients_held()
        moments = {
            "loading": replace(frozen, scratch=self.estimator.loading_bytes),
            "loss": replace(held, gradients=before, activations=self._kept(), loss=self._loss()),
            "backward": self._backward(held, before),
            "step": replace(held, gradients=adapters),
        }
        if self.setting.ships:
            from qlora_native.calibration.adapted import TOKENS

            widest = max((k for _, k in self.estimator.shapes), default=0)
            # Two passes of the tokens; products of a layer's inputs in fp32 and fp64, and what is solved for.
            activations = 2 * TOKENS * max((layer.token for layer in self.layers), default=0)
            scratch = 28 * widest**2 + 24 * TOKENS * widest
            # With the codes that are written.
            moments["shipping"] = replace(held, weights=2 * packed, activations=round(activations), scratch=scratch)
        graphs = 0
        if self._is_captured():
            # A pass of another shape, which is not in a graph, takes as much from the rest of the card.
            passes = (moments[name] for name in ("loss", "backward"))
            graphs = max(terms.activations + terms.loss + terms.scratch for terms in passes)
        if not self.on_card:
            slack = len(self.layers) * LAYER_SLACK
            moments = {name: replace(terms, slack=slack) for name, terms in moments.items()}
        unknown = tuple(dict.fromkeys(layer.unknown for layer in self.layers if layer.unknown))
        rough = unknown if self.layers else (type(self.estimator.model).__name__,)
        return Estimate(self.setting, moments, paged, graphs, rough)

    def _is_captured(self) -> bool:
        """Whether passes of one process are captured, as ``train.cuda_graph`` has it."""
        is_kept = not self.setting.checkpointing or not self.estimator.is_random
        wanted = self.on_card and self.setting.cuda_graph
        return wanted and is_kept and not self.estimator.changes_logits

    def _kept(self) -> int:
        """What all layers keep at the end of the forward pass."""
        if self.setting.checkpointing:
            kept = float(self.tokens * sum(layer.input for layer in self.layers))
        else:
            kept = sum(self._of(layer) for layer in self.layers)
            kept -= self.tokens * self.layers[0].first if self.layers else 0  # its input needs no gradient
        return round(kept + self._shared())

    def _of(self, layer: LayerBytes) -> float:
        return self.tokens * layer.token + self.pairs * layer.square

    def _shared(self) -> int:
        """Of all layers together: the angles of the rotation, token numbers, labels and masks."""
        return 2 * self.setting.length * head_shape(self.config)[2] * self.size + 5 * 8 * self.tokens

    def _backward(self, held: Terms, before: int) -> Terms:
        """The fullest moment of the backward pass: in the layer where what is kept so far, its own tensors, its
        gradients and the adapters' gradients of the layers behind are the most."""
        best = Terms()
        so_far = 0.0
        behind = sum(layer.gradients for layer in self.layers)
        for number, layer in enumerate(self.layers):
            own = self._of(layer) - (self.tokens * layer.first if number == 0 else 0)
            so_far += self.tokens * layer.input if self.setting.checkpointing else own
            here = so_far + self.tokens * layer.spare + self._shared()
            if self.setting.checkpointing:
                here += own - self.tokens * layer.shared
            terms = replace(held, gradients=max(before, behind + self.estimator.whole), activations=round(here))
            best = max(best, terms, key=lambda t: t.total)
            behind -= layer.gradients
        # The embedding's come last: beside those of earlier micro-batches, or of an output embedding tied to it.
        added = 4 * self.estimator.whole_in * (before >= self.estimator.adapters or self.estimator.whole_out > 0)
        last = replace(held, gradients=self.estimator.adapters + added)
        return max(best, last, key=lambda t: t.total)

    def _loss(self) -> int:
        """What the final norm keeps, hidden states, their gradient, and the logits: of a chunk, or all where the model
        changes them afterwards."""
        hidden = self.config.hidden_size
        vocabulary = self.config.vocab_size
        states = round(self.tokens * self.estimator.norm_bytes)
        states += 2 * self.tokens * hidden * self.size
        if self.estimator.changes_logits:
            return states + self.tokens * vocabulary * FULL_LOGITS
        chunk = chunk_tokens(self.setting.device, vocabulary, self.size, self.tokens)
        if numel := self.estimator.whole_out:  # the sum of its gradients, its mean, the copy that is multiplied
            states += numel * (8 + self.size % 4) + 4 * chunk * vocabulary
        return states + chunk * (vocabulary + 2 * hidden) * self.size + 12 * self.tokens

    def _gradients_held(self) -> int:
        """Bytes that gradients of the adapters have at the loss: all but the first micro-batch of a step begin with
        those of the ones before, and passes in a CUDA graph leave them in one place for good. On the CPU the heap keeps
        their place from step to step, up to the size from which a block is a mapping of its own."""
        if self.setting.micro_batches > 1 or self._is_captured():
            return self.estimator.adapters
        if self.on_card:
            return 0
        least = LEAST_MAPPED_WITH_CHECKPOINTING if self.setting.checkpointing else LEAST_MAPPED
        return sum(4 * numel for numel in self.estimator.trained if 4 * numel < least)

    def _scratch(self) -> int:
        """Of kernels."""
        if self.on_card:  # a weight decoded for torch's own product
            largest = max((n * k for n, k in self.estimator.shapes), default=0)
            return min(largest * self.size, PANEL_BYTES)
        rows = self.setting.batch_size
        length = self.setting.length
        heads, groups, width = head_shape(self.config)
        q = torch.empty(rows, heads, length, width, dtype=self.setting.dtype, device="meta")
        dtype = _native.DTYPE_NUMBER[self.setting.dtype]
        attention = 0  # of torch's, which takes other heads
        if is_native(q):
            attention = _C.causal_attention_scratch_bytes(dtype, (rows, heads, groups, length, width), True) + ALIGNMENT
        hidden = self.config.hidden_size
        vocabulary = self.config.vocab_size
        chunk = chunk_tokens("cpu", vocabulary, self.size, self.tokens)
        tokens = min(self.tokens, 1 << 20)  # more take no more
        products = [(tokens, n, k) for n, k in self.estimator.shapes]
        products.append((chunk, vocabulary, hidden))
        most = max(_C.linear_scratch_bytes(dtype, *sizes) for sizes in products)
        return int(max(most, torch.get_num_threads() * THREAD_SCRATCH) + attention)


def copied_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the adapters as their products on CUDA take them, A in another dtype and scale * B, which are kept from
    pass to pass."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear) and isinstance(m.base_layer, QuantizedLinear)]
    pairs = [(layer.lora_A, layer.lora_A.dtype != dtype) for layer in layers]
    pairs += [(layer.lora_B, layer.lora_B.dtype != dtype or layer.scale != 1.0) for layer in layers]
    return sum(matrix.numel() * dtype.itemsize for matrix, is_copied in pairs if is_copied)


def state_bytes(numel: int, optimizer: str) -> int:
    """Bytes of one parameter's optimizer states."""
    if optimizer == "adamw8bit" and numel >= MIN_CODED_NUMEL:
        return MOMENTS[optimizer] * (numel + 4 * -(-numel // _native.STATE_BLOCK))
    return MOMENTS[optimizer] * 4 * numel
