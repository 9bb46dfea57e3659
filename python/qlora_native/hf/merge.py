"""Adapters added to the weights: a 4-bit model with an adapter becomes a plain 16-bit model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_native.calibration.adapted import adapted_codes, correction
from qlora_native.calibration.data import CalibrationData, take_tokens
from qlora_native.calibration.statistics import Statistics
from qlora_native.errors import UserError
from qlora_native.hf.build import DTYPES, OUTPUT_EMBEDDING, MetaModel, is_transposed, put_dense
from qlora_native.hf.calibrated import side_by_side
from qlora_native.hf.checkpoint import Output, Scratch, ShardWriter
from qlora_native.hf.config import METADATA
from qlora_native.hf.convert import Conversion, Job, decoded_parts, part_size, slices
from qlora_native.hf.fuse import unfuse
from qlora_native.hf.load import LoadReport, Progress, load_model, make_report
from qlora_native.hf.loss import hidden_states
from qlora_native.hf.mapped import BESIDE, stream_if_needed
from qlora_native.hf.plan import Converted, FourBit, Plain, Step
from qlora_native.hf.source import AUTO, KEEP, Source, load_tokenizer, open_source
from qlora_native.lora import LoRALinear, load_adapter, lora_layers
from qlora_native.lora.adapter import StoredAdapter, read_adapter
from qlora_native.lora.config import ZERO
from qlora_native.lora.layer import end_training_rows, end_training_whole, trained_whole
from qlora_native.lora.tokens import DELTA, put_rows, token_rows
from qlora_native.nn.experts import QuantizedExperts, quantized_stacks, take_stack
from qlora_native.nn.linear import QuantizedEmbedding, QuantizedLinear
from qlora_native.weight import QuantizedWeight, to_bnb


def merge(model: PreTrainedModel, base: str = "original", dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Turn the model into dense layers with W + scale * B A, the sum taken in fp32 and rounded once to ``dtype``.

    Layers without an adapter become dense as well, so the result is an ordinary transformers model for
    ``save_pretrained``; GPT-2's transposed layers are what they were.

    Args:
        model: from :func:`qlora_native.load_model`, with an adapter or without; changed in place, layer by layer.
        base: the W: "original" reads the 16-bit weights again from where the model was loaded, one tensor at a time;
            "dequantized" takes the 4-bit ones, which are what the adapter was trained on.
        dtype: of the whole result: bfloat16, float16 or float32.

    Returns:
        The model, frozen.

    Raises:
        ValueError: a wrong argument; "original" for a model that was not loaded by load_model, or with an adapter that
            began with what 4 bits lost, which the original weights have not lost.
        UserError: the original weights are gone, or are 4-bit themselves.
    """
    if base not in ("original", "dequantized"):
        raise ValueError(f"merge: base is {base!r}: expected 'original' or 'dequantized'.")
    if dtype not in DTYPES:
        raise ValueError(f"merge: dtype is {dtype}: expected torch.bfloat16, torch.float16 or torch.float32.")
    report: LoadReport | None = getattr(model, "load_report", None)
    config, rows = model.__dict__.get("lora_config"), token_rows(model)
    end_training_rows(model)
    adapted = {id(module.base_layer) for module in model.modules() if isinstance(module, LoRALinear)}
    layers: Layers = {
        f"{path}.weight": (path, layer, layer.base_layer if isinstance(layer, LoRALinear) else layer)
        for path, layer in model.named_modules()
        if isinstance(layer, LoRALinear) or (isinstance(layer, QuantizedLinear) and id(layer) not in adapted)
    }
    stacks = {f"{path}.{name}": (experts, name, weight) for path, experts, name, weight in quantized_stacks(model)}
    if base == "dequantized":
        weights = _decoded(layers, stacks, dtype)
    elif config is not None and config.init != ZERO:
        raise ValueError(
            f"merge: the adapter began with init {config.init!r}, which corrects the 4-bit weights: expected "
            "base='dequantized'."
        )
    elif report is None:
        raise ValueError("merge: the model was not loaded by load_model: expected base='dequantized'.")
    else:
        trained = tuple(f"{path}." for path in trained_whole(model, config.modules_to_save)) if config else ()
        parameters = {name.replace(".base_layer.", "."): tensor for name, tensor in model.named_parameters()}
        parameters = {
            name: tensor
            for name, tensor in parameters.items()
            if not name.startswith(trained) and tensor.is_floating_point()
        }
        weights = _original(open_source(report.path), dtype, layers, stacks, parameters)
    for name, weight in weights:
        if name in layers:
            _make_dense(model, *layers[name], weight, dtype)
        else:
            experts, leaf, stack = stacks[name]
            take_stack(experts, leaf, weight.to(stack.device, dtype, copy=base == "original"))
    _make_embeddings_dense(model, dtype)
    if stacks:
        model.__dict__.pop("_weight_conversions", None)  # transformers' own for this class: experts one by one again
    end_training_whole(model)
    unfuse(model)
    for parameter in model.parameters():
        if parameter.dtype == model.config.dtype:  # what is kept in fp32 stays so
            parameter.data = parameter.data.to(dtype)
    for path, part in rows.items():
        weight = model.get_submodule(path).get_parameter("weight")
        weight.data = put_rows(weight.data, part.token_ids, part.trainable_tokens_delta.data)
    model.config.dtype = dtype
    model.config.__dict__.pop("quantization_config", None)
    for name in ("lora_config", "save_pretrained"):  # the latter refuses while the weights are those of a GGUF file
        model.__dict__.pop(name, None)
    if report is not None:
        model.load_report = make_report(model, report.path)
    return model.requires_grad_(False)


Layers = dict[str, tuple[str, "LoRALinear | QuantizedLinear", nn.Linear]]  # path, layer, and the layer without adapter
Stacks = dict[str, tuple[QuantizedExperts, str, QuantizedWeight]]


def _decoded(layers: Layers, stacks: Stacks, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights by name as the model holds them; those of 4-bit layers in fp32, to which adapters are added."""
    for name, (_, _, inner) in layers.items():
        yield name, inner.quantized.dequantize(torch.float32) if isinstance(inner, QuantizedLinear) else inner.weight
    for name, (*_, weight) in stacks.items():
        yield name, weight.dequantize(dtype)


def _original(
    source: Source, dtype: torch.dtype, layers: Layers, stacks: Stacks, parameters: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The weights by name as the files hold them. What else the model holds in a dtype that loses something against the
    files is read into ``parameters``."""
    if source.is_four_bit:
        raise UserError(f"{source.path} holds 4-bit weights and no original ones: merge with base 'dequantized'.")
    meta = MetaModel(source.config, dtype, torch.device("cpu"))
    absent = {*layers, *stacks}
    widened = {name for name in parameters.keys() & meta.shapes if parameters[name].dtype != meta.dtype_of(name)}
    widened -= absent
    tied_to = {meta.tied[name]: name for name in layers if name in meta.tied}  # of which a file may hold one

    def changed(what: str) -> UserError:
        return UserError(f"{source.path} has changed since the model was loaded: {what}; load the model again.")

    needed = absent | widened | tied_to.keys()
    steps = [step for step in source.plan(meta).steps if isinstance(step, Converted) or step.name in needed]
    scratch = Scratch(max((step.num_bytes for step in steps if isinstance(step, Plain)), default=0))
    for name, value in (pair for step in steps for pair in step.iter_tensors(meta.model, source.read, scratch)):
        assert isinstance(value, Tensor)
        if name in tied_to:
            absent.discard(tied_to[name])
            yield tied_to[name], value
        if name in widened:
            parameters[name].data = value.to(parameters[name].device, meta.dtype_of(name), copy=True)
        if name not in layers and name not in stacks:
            continue
        absent.discard(name)
        if is_transposed(meta.model.get_submodule(name.rpartition(".")[0])):
            value = value.t()
        inner = layers[name][2] if name in layers else None
        if value.shape != ((inner.out_features, inner.in_features) if inner is not None else stacks[name][2].shape):
            raise changed(f"{name} is {list(value.shape)} there now")
        yield name, value
    if absent:
        raise changed(f"{min(absent)} is no longer there")


@torch.no_grad()
def _make_dense(
    model: PreTrainedModel, path: str, layer: nn.Module, inner: nn.Linear, weight: Tensor, dtype: torch.dtype
) -> None:
    """Put a dense layer of ``weight`` [N, K], plus the adapter's delta, at ``path``."""
    device = inner.weight.device
    if isinstance(layer, LoRALinear):
        total = layer.delta().add_(weight.to(device)).to(dtype)
        if f"{path}.weight" in {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}:
            model.config.tie_word_embeddings = False  # one of the two has changed
            model.all_tied_weights_keys = {}
    else:
        total = weight.to(device, dtype, copy=True)
    put_dense(model, path, inner, total)


def _make_embeddings_dense(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantizedEmbedding):
            dense = nn.Embedding.from_pretrained(module.quantized.dequantize(dtype))
            model.set_submodule(path, dense.train(module.training))
            for name, origin in model.all_tied_weights_keys.items():
                if origin == f"{path}.weight":
                    model.get_submodule(name.rpartition(".")[0]).weight = dense.weight


TARGETS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "nf4": torch.bfloat16}


class Merging(Conversion):
    """A conversion that writes W + scale * B A, the sum taken in fp32 and rounded once, of every adapted weight.

    ``codes`` are files of packed codes by the path of an adapted layer, which it gets under the scales of its 4-bit W
    (:func:`calibrated_codes`); without one the sum is rounded to nearest.

    Memory beyond that of a conversion: the packed bytes of a 4-bit weight; the whole 16-bit model if it is GGUF.

    Args:
        adapter: a folder in PEFT's format; None merges nothing.
        base: the W: "original" is what the files hold, "dequantized" what ``load_model`` makes of it in 4 bits.
        to: one of ``TARGETS``; "nf4" is bitsandbytes' format.
        quant_type, block_size, double_quant, skip_modules: for weights that are not 4-bit yet. A GGUF file that
            load_model keeps as it is has one W.
    """

    def __init__(
        self,
        path: Path,
        adapter: Path | None,
        *,
        base: str = "original",
        to: str = "bf16",
        quant_type: str = AUTO,
        block_size: int = 64,
        double_quant: bool = True,
        skip_modules: tuple[str, ...] = (OUTPUT_EMBEDDING,),
    ) -> None:
        source = open_source(path)
        self.is_kept = is_kept = source.keeps(quant_type)
        rounded = "nf4" if quant_type in (AUTO, KEEP) else quant_type
        options: dict[str, Any] = {"quant_type": rounded, "block_size": block_size, "double_quant": double_quant}
        super().__init__(source, "bitsandbytes" if to == "nf4" else "16bit", TARGETS[to], options, skip_modules)
        self.adapter_folder = adapter
        if self.four_bit and base == "original":
            raise UserError(
                f"{source.path} holds 4-bit weights and no original ones: merge with --base dequantized, or give the "
                "16-bit model that it was made from."
            )
        self.skip_modules = skip_modules
        # What load_model would make 4-bit: decoded, it is the base that the adapter was trained on.
        self.rounded: set[str] = set()
        if base == "dequantized" and not self.four_bit and not is_kept:
            self.rounded = {*self.meta.four_bit_weights(skip_modules, block_size)}
            if stacks := sorted(name for name in self.rounded if not name.endswith(".weight")):
                raise UserError(
                    f"{source.path} has stacks of experts ({stacks[0]}), which are merged from 4 bits only where they "
                    f"are stored so: `qlora convert {source.path} DIR --to qlora` first, then merge that folder; "
                    "or merge into the 16-bit weights with --base original."
                )
        self.codes: dict[str, Path] = {}
        for name in self.transposed:  # an adapter is read for linear layers
            width, height = self.meta.shapes[name].shape
            self.meta.model.set_submodule(name.removesuffix(".weight"), nn.Linear(width, height, device="meta"))
        self.adapter = StoredAdapter({}, {}) if adapter is None else read_adapter(self.meta.model, adapter)
        tied, steps = self.meta.tied, {step.name: step for step in self.plan.steps}
        for module, ids in dict(self.adapter.config.trainable_tokens).items():
            name, rows = f"{module}.weight", self.adapter.whole.pop(f"{module}.{DELTA}")
            if isinstance(step := steps.get(name), (Plain, FourBit)):
                rows = put_rows(torch.cat([*self.base_rows(step)]).float(), torch.tensor(ids), rows)
                source.config.get_text_config().vocab_size = len(rows)
            self.adapter.whole[name] = rows
        origins = {tied.get(name, name): tensor for name, tensor in self.adapter.whole.items()}
        self.whole = origins | {name: origins[to] for name, to in tied.items() if to in origins}
        # Tied embeddings are separated where only the output one has an adapter.
        self.untied = any(f"{path}.weight" in tied for path in self.adapter.pairs)

    def config(self) -> dict[str, Any]:
        values = super().config()
        if "vocab_size" in values:
            values["vocab_size"] = self.source.config.vocab_size  # with new tokens
        return values | ({"tie_word_embeddings": False} if self.untied else {})

    def quantization_config(self) -> dict[str, Any] | None:
        config = super().quantization_config()
        return config and {**config, METADATA: {"method": "gptq" if self.codes else "rtn"}}

    def jobs(self) -> Iterator[Job]:
        yield from super().jobs()
        for step in self._untied_steps():
            yield self._merged(step, step.name)

    def merged_steps(self) -> list[Step]:
        """What :meth:`rows` takes: the steps of the plan, and an output embedding that is no longer tied."""
        return [*self.plan.steps, *self._untied_steps()]

    def _untied_steps(self) -> list[Plain]:
        """Output embeddings that are not in the files because they were tied, and have an adapter; UserError for other
        adapted weights that are not there."""
        steps = {step.name: step for step in self.plan.steps}
        adapted = {f"{path}.weight" for path in self.adapter.pairs} | self.adapter.whole.keys()
        found = []
        for name in sorted(adapted):
            step, origin = steps.get(name), steps.get(self.meta.tied.get(name, ""))
            if isinstance(step, (Plain, FourBit)):
                continue
            if not isinstance(origin, Plain):
                raise UserError(
                    f"{self.source.path} stores {name} in several tensors, where no adapter can be merged file by "
                    "file: merge in memory, with qlora_native.merge(model) and model.save_pretrained(folder)."
                )
            if name not in self.whole:
                found.append(Plain(name, origin.parts))
        return found

    def jobs_of(self, step: Step) -> Iterator[Job]:
        if isinstance(step, Converted) or not self.changes(step):
            yield from super().jobs_of(step)
        else:
            yield self._merged(step, step.key)

    def changes(self, step: Step) -> bool:
        """Whether the weight is not simply copied, cast, quantized or decoded."""
        adapted = step.name.removesuffix(".weight") in self.adapter.pairs or step.name in self.whole
        return adapted or (step.name in self.rounded and self.target == "16bit")

    def becomes_four_bit(self, step: Step) -> bool:
        """Whether the result holds the weight in 4 bits."""
        return self.target != "16bit" and step.name in (self.four_bit | self.weights) - self.whole.keys()

    def _merged(self, step: Plain | FourBit, key: str) -> Job:
        if self.becomes_four_bit(step):
            path = step.name.removesuffix(".weight")
            if path in self.codes:
                return self._recoded(key, step, self.codes[path])
            return self._packed(key, step, (part.view(-1) for part in self.rows(step)))
        dtype = self.meta.dtype_of(step.name)

        def write(writer: ShardWriter) -> None:
            parts = (part.to(dtype) for part in self.rows(step))
            for part in slices(torch.cat([*parts]).t()) if step.name in self.transposed else parts:
                writer.write(key, part)

        return Job([Output(key, dtype, tuple(self.whole.get(step.name, self.meta.shapes[step.name]).shape))], write)

    def _recoded(self, key: str, step: Plain | FourBit, codes: Path) -> Job:
        def write(writer: ShardWriter) -> None:
            weight = self.four_bit_base(step)
            packed = torch.from_file(str(codes), size=weight.packed.numel(), dtype=torch.uint8)
            weight.packed = packed.view_as(weight.packed)
            for name, tensor in to_bnb(weight, key).items():
                writer.write(name, tensor)
            self.report.quantized += 1

        return Job(self._packed(key, step, iter(())).outputs, write)

    def four_bit_base(self, step: Plain | FourBit) -> QuantizedWeight:
        """The 4-bit weight that the adapter was trained on."""
        if isinstance(step, FourBit):
            return step.weight(self.source.read)
        return self.quantized(step.key, step, self.parts(step.stored, step.name in self.transposed))

    def rows(self, step: Plain | FourBit) -> Iterator[Tensor]:
        """The merged weight from top to bottom, fp32 [n, K] at a time."""
        whole = self.whole.get(step.name)
        if whole is not None:
            yield from whole.float().reshape(-1, whole.shape[-1]).split(part_size(whole.shape) // whole.shape[-1])
            return
        pair = self.adapter.pairs.get(step.name.removesuffix(".weight"))
        done = 0
        for part in self.base_rows(step):
            part = part.float()
            if pair is not None:
                a, b, scale = pair
                part = part + (b[done : done + len(part)].float() @ a.float()) * scale
            done += len(part)
            yield part

    def base_rows(self, step: Plain | FourBit) -> Iterator[Tensor]:
        """The weight that the adapter is added to, [n, K] at a time: fp32 if decoded from 4 bits, else as stored."""
        if isinstance(step, FourBit) or step.name in self.rounded:
            parts = decoded_parts(self.four_bit_base(step), torch.float32)
        else:
            parts = self.parts(step.stored, step.name in self.transposed)
        for part in parts:
            yield part.view(-1, self.shape(step)[-1])


def calibrated_codes(
    work: Merging, adapter: Path, given: CalibrationData, folder: Path, progress: Progress
) -> dict[str, Path]:
    """The files for ``work.codes``, made in ``folder`` by recoding the model as it was trained, 4-bit with the adapter
    beside it.

    Beside the model there are the sequences' activations and the statistics of one layer. What torch computes is on one
    thread, so that the bytes are the same for any number of them.
    """
    source, text = work.source, work.source.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    tokens = take_tokens(given, "wmse", partial(load_tokenizer, source), text.vocab_size, longest)
    codes: dict[str, Path] = {}
    options = {} if work.is_kept else {**work.options, "skip_modules": work.skip_modules}
    model: Any = load_adapter(load_model(source.path, **options, fuse=False), adapter)
    streaming = stream_if_needed(model, None, BESIDE)
    total = sum(isinstance(layer.base_layer, QuantizedLinear) for _, layer in lora_layers(model))
    rows, length = tokens.ids.shape
    progress(f"finding the codes of {total} weights with {rows} sequences of {length} tokens", 0, total)

    def write(path: str, packed: Tensor) -> None:
        codes[path] = folder / f"{len(codes)}.codes"
        packed.cpu().numpy().tofile(codes[path])
        progress(f"layer {len(codes)} of {total}", len(codes), total)

    with ExitStack() as stack:
        pool, _ = stack.enter_context(side_by_side(model.device))
        if streaming is not None:
            stack.callback(streaming.close)
        recode(model, tokens.ids, pool, write)
    return codes


@torch.no_grad()
def recode(model: Any, ids: Tensor, pool: Executor, write: Callable[[str, Tensor], None]) -> None:
    """Find the codes of each adapted 4-bit layer, and ``write`` them, packed, under the layer's path.

    The sequences ids [n, length] pass through the model twice, side by side: as it was trained, with the adapter beside
    its 4-bit weights, and as it ships, through the codes that were just found. A layer's codes are those with which the
    second pass comes nearest to what the first one gives, so what earlier layers lost is made good by later ones.
    """
    shared: dict[str, Any] = {}  # q, k and v have the same input

    def forward(layer: LoRALinear, plain: Callable[[Tensor], Tensor], path: str, x: Tensor) -> Tensor:
        both = x.numel() == 2 * ids.numel() * x.shape[-1]  # an expert has some tokens; fused layers pass [tokens, K]
        trained, ships = x.chunk(2) if both else (x, x)
        if shared.get("x") is not x:
            statistic = Statistics(full=True)
            statistic.add([{(path, None): [ships]}], pool)
            hessian: Any = statistic.of[path, None].hessian()
            found = correction(hessian, trained, ships, pool) if both else None
            shared.update(x=x, hessian=hessian, correction=found)
        weight: Any = layer.base_layer.quantized
        adapter = layer.lora_A, layer.lora_B, layer.scale
        packed = adapted_codes(weight, *adapter, shared["hessian"], shared["correction"])
        write(path, packed)
        if not both:
            return plain(x)
        new = QuantizedLinear.from_quantized(weight.with_packed(packed), layer.bias)
        return torch.cat([plain(trained), new(ships)])

    layers = {path: layer for path, layer in lora_layers(model) if isinstance(layer.base_layer, QuantizedLinear)}
    for path, layer in layers.items():
        layer.forward = partial(forward, layer, layer.forward, path)  # type: ignore[method-assign]
    try:
        hidden_states(model, {"input_ids": torch.cat([ids, ids]).to(model.device)})
    finally:
        for layer in layers.values():
            del layer.forward
