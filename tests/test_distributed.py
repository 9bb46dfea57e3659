"""4-bit models over several processes: FSDP2, copies x shards, DDP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import adapters, distance, held_bytes, local, on_ranks, trained, whole, whole_checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from qlora_native.distributed import blocks_of, shard
from qlora_native.distributed.memory import rank_memory
from qlora_native.distributed.ranks import Ranks
from qlora_native.lora import LoraConfig, add_lora
from qlora_native.lora.layer import lora_layers
from qlora_native.nn import QuantizedLinear
from qlora_native.optim import AdamW

STEPS, ROWS = 10, 8
TOLERANCE = 1e-5


def make(double_quant: bool = True, **changes: Any) -> Any:
    """A tiny 4-bit llama in fp32 with adapters that do something; some weights end within a block."""
    sizes = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "vocab_size": 64, **changes}
    model = tiny_models.make("Llama", **sizes)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            model.set_submodule(name, QuantizedLinear.from_linear(layer, double_quant=double_quant))
    add_lora(model, LoraConfig(r=3, seed=1))
    generator = torch.Generator().manual_seed(2)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(0, 0.1, generator=generator)
    return model.train()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of each step, [ROWS, 12]; rows have different numbers of trained tokens."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        ids = torch.randint(3, 64, (ROWS, 12), generator=generator)
        labels = ids.clone()
        for row in range(ROWS):
            labels[row, : row + 2] = -100
        yield ids, labels


def loss_sum(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def train(model: Any, optimizer: torch.optim.Optimizer, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Ten steps on this rank's rows of each batch; the trained parameters, whole."""
    for ids, labels in batches():
        count = int((labels[:, 1:] != -100).sum())
        (loss_sum(model, ids[rank::world], labels[rank::world]) * (world / count)).backward()  # ranks are averaged
        optimizer.step()
        optimizer.zero_grad()
    return adapters(model)


@contextmanager
def received_bytes(world: int) -> Iterator[list[int]]:
    """What this rank receives inside, by message: the whole that is gathered or reduced but its own part."""
    found: list[int] = []

    def counted(plain: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [*args, *kwargs.values()]
        found.append(max(t.nbytes for t in tensors if isinstance(t, Tensor)) // world * (world - 1))
        return plain(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_single", "reduce_scatter_single"):
            patch.setattr(dist, name, partial(counted, getattr(dist, name)))
        yield found


def messages_before_blocks(model: Any, world: int) -> list[int]:
    """How many messages were gathered by the time that each block starts its forward."""
    found: list[int] = []
    with received_bytes(world) as received, torch.no_grad():
        for block in blocks_of(model):
            block.register_forward_pre_hook(lambda *_: found.append(len(received)))
        loss_sum(model, *next(batches()))
    return found


def optimizer_of(model: Any, folder: str | None = None) -> AdamW:
    return AdamW(trained(model), 1e-3, max_norm=0.5, paged=folder is not None, page_dir=folder)


def equal_training(rank: int, world: int, folder: str, expected: dict[str, Tensor]) -> dict[str, float]:
    """Distance of the adapter after ten steps from that of one process, for each way of running."""
    base, found = make(), {}
    line = init_device_mesh("cpu", (world,))

    memory = rank_memory(base, world)
    model: Any = shard(deepcopy(base), line)
    if rank == 0:  # the others' last parts are shorter where a number of rows does not divide
        assert held_bytes(model) == memory.frozen
        assert sum(local(parameter).nbytes for parameter in trained(model)) == memory.trained
    with received_bytes(world) as received:
        loss_sum(model, *next(batches())).backward()
    assert sum(received) == memory.received, (received, memory)
    model.zero_grad()
    found["fsdp"] = distance(train(model, optimizer_of(model), rank, world), expected)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters() if parameter.requires_grad)

    if world == 2:
        kept = shard(deepcopy(base), line, reshard_after_forward=False)
        with received_bytes(world) as received:
            loss_sum(kept, *next(batches())).backward()
        assert sum(received) == rank_memory(base, world, reshard=False).received < memory.received
        for prefetch in (0, 1):  # the second block was on its way when the first one began, or not
            first, second = messages_before_blocks(shard(deepcopy(base), line, prefetch=prefetch), world)
            assert first + 1 - prefetch == second

        model = shard(deepcopy(base), line)
        model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = optimizer_of(model, folder)
        found["fsdp, paged, checkpointing"] = distance(train(model, optimizer, rank, world), expected)
        assert optimizer.states_paged_out() > 0
    else:
        plane = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
        model = shard(deepcopy(base), plane, reshard_after_forward=False)
        found["2 copies of 2 shards"] = distance(train(model, optimizer_of(model), rank, world), expected)

    codes = {name: tensor.clone() for name, tensor in base.named_parameters() if name.endswith("base_layer.weight")}
    for name in codes if rank > 0 else ():
        base.get_parameter(name).data.zero_()
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda tensor: counted.append(tensor.nbytes))
        Ranks("ddp", rank, world).add_gradients(trained(base))
    copies = rank_memory(base, world, sharded=False)
    assert sum(counted) == copies.trained and held_bytes(base) == copies.frozen
    base.zero_grad()
    model = DistributedDataParallel(base)  # sends rank 0's codes
    for name, tensor in base.named_parameters():
        assert name not in codes or torch.equal(tensor, codes[name])
    found["ddp"] = distance(train(model, optimizer_of(model), rank, world), expected)
    return found


def optimizer_on_parts(rank: int, world: int) -> None:
    """8-bit states of sharded parameters: as one process where blocks end with the parts, else close to it."""
    line = init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(5)
    shapes = ((96, 64), (2, 4096), (4101, 1), (3, 5))  # aligned; empty on some ranks; not aligned; not coded
    wholes = [torch.randn(shape, generator=generator) for shape in shapes]
    alone = [nn.Parameter(value.clone()) for value in wholes]
    parts = [nn.Parameter(distribute_tensor(value.clone(), line, [Shard(0)])) for value in wholes]
    one, many = (AdamW(params, 1e-3, bits=8, max_norm=1.0, paged=False) for params in (alone, parts))

    def step(optimizer: AdamW, params: list[nn.Parameter], seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        for param in params:
            grad = torch.randn(param.shape, generator=noise)
            param.grad = distribute_tensor(grad, line, [Shard(0)]) if isinstance(param, DTensor) else grad
        optimizer.step()

    for seed in range(4):
        step(one, alone, seed)
        step(many, parts, seed)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-9)
    for at, (whole_param, part) in enumerate(zip(alone, parts, strict=True)):
        assert distance({"": whole(part)}, {"": whole_param}) <= (2e-3 if at == 2 else 1e-7), shapes[at]

    # State goes out as fp32 DTensors and comes back as the same bytes.
    state = many.state_dict()
    assert all(isinstance(values["exp_avg"], DTensor) for values in state["state"].values())
    again = AdamW(parts, 1e-3, bits=8, max_norm=1.0, paged=False)
    again.load_state_dict(state)
    for param in parts:
        before, after = many.state[param], again.state[param]
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    skipped = [param.detach().clone() for param in parts]
    for param in parts:
        param.grad = torch.zeros_like(param)
    grad: Any = parts[0].grad
    grad.to_local().fill_(float("inf") if rank == 0 else 0.0)
    many.step()  # one rank's infinity is everyone's
    assert many.skipped and all(torch.equal(whole(a), whole(b)) for a, b in zip(parts, skipped, strict=True))


def bytes_survive(rank: int, world: int, folder: str, double_quant: bool) -> float:
    """Bytes that look like NaN in bf16 come through gathers under mixed precision. Returns the share of the frozen
    bytes that this rank holds."""
    model = make(double_quant, hidden_size=256, intermediate_size=512, num_attention_heads=4)
    patterns = torch.arange(1 << 16).to(torch.uint16).view(torch.uint8)  # every 16-bit number, NaNs among them
    layers: dict[str, Any] = {path: layer.base_layer for path, layer in lora_layers(model)}
    for layer in layers.values():
        layer.weight.view(-1).copy_(patterns.repeat(2)[: layer.weight.numel()])
    before = held_bytes(model)
    kept = {path: (layer.quantized.packed.clone(), layer.quantized.absmax.clone()) for path, layer in layers.items()}
    line = init_device_mesh("cpu", (world,))
    shard(model, line, policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    after = held_bytes(model)
    seen: set[str] = set()

    def check(path: str) -> None:
        codes, absmax = kept[path]
        value = layers[path].quantized
        assert type(layers[path].weight) is nn.Parameter and torch.equal(value.packed, codes)
        assert torch.equal(value.absmax, absmax) and value.absmax.dtype == absmax.dtype
        seen.add(path)

    for path, layer in layers.items():
        rows = layer.weight.to_local().shape[0]  # whole blocks, and as many scales
        assert rows == layer.absmax_bytes.to_local().shape[0] == kept[path][1].numel() // world
        assert layer.weight.dtype == layer.absmax_bytes.dtype == torch.uint8 and layer.weight.shape[1] == 32
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: check(path))
    ids, labels = next(batches())
    loss_sum(model, ids, labels).backward()
    assert seen == kept.keys()
    for path, layer in layers.items():  # sharded again after backward
        assert isinstance(layer.weight, DTensor)
        assert torch.equal(layer.weight.full_tensor().view(-1), kept[path][0])
    path = "model.layers.0.mlp.up_proj"
    for name, expected in zip(("weight", "absmax_bytes"), kept[path], strict=True):
        part = model.state_dict()[f"{path}.base_layer.{name}"]
        assert torch.equal(part.full_tensor().view(-1), expected.view(torch.uint8))
    whole_checkpoint(model, folder)
    for path, layer in layers.items():
        assert torch.equal(layer.weight.full_tensor().view(-1), kept[path][0])
    with torch.no_grad():  # past the dispatcher
        assert torch.isfinite(model.eval()(input_ids=ids).logits).all()
    return after / before


def on_four(rank: int, world: int, folder: str, expected: dict[str, Tensor]) -> tuple[Any, Any]:
    optimizer_on_parts(rank, world)
    shares = [bytes_survive(rank, world, f"{folder}/whole {double}", double) for double in (True, False)]
    return equal_training(rank, world, folder, expected), shares


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """The trained adapter of one process on the whole batches."""
    model = make()
    start = adapters(model)
    found = train(model, optimizer_of(model))
    assert distance(found, start) > 5e-3
    return found


def test_two_ranks_train_as_one(expected: dict[str, Tensor], tmp_path: Path) -> None:
    for found in on_ranks(2, equal_training, str(tmp_path), expected):
        assert max(found.values()) <= TOLERANCE, found


@pytest.mark.long
def test_four_ranks(expected: dict[str, Tensor], tmp_path: Path) -> None:
    for found, shares in on_ranks(4, on_four, str(tmp_path), expected):
        assert max(found.values()) <= TOLERANCE, found
        assert max(shares) <= 0.30, shares
