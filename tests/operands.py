"""Operands that do not fit, for every op and for what is built on them; test_operands.py starts it as a worker.

Each tensor of a sound call is replaced by others, and each number, by one of its own kind or of none. The call is
refused in words, or its result is that of plain torch on copies. Dense operands end where a page begins that nothing
may read or write, so that an access beyond one of them is a signal.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import workers
from calls import CALLS, layouts, overload_of
from torch import Tensor

import qlora_native as qn
from qlora_native import _C, reference
from qlora_native.ops._library import IMPLEMENTATIONS
from qlora_native.weight import pack_json, unpack_json

REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, OverflowError, IndexError, OSError)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.complex64]
DTYPES += [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]
FLOATS = [float("nan"), float("inf"), -float("inf"), 1e30, -3e38, 1e-42, 0.0]
WHOLE = [-1, 0, 1, 127, 255, 1 << 31, -(1 << 63)]
NUMBERS: list[Any] = [-1, 0, 1, 2, 33, 1 << 31, (1 << 63) - 1, -(1 << 63), 1 << 64, 0.5, float("nan"), -float("inf")]
NUMBERS += [None, "x", []]
SHAPES = [[], [0], [-1], [3072], [64, 48], [48, 65], [48, 64, 1], [-48, -64], [1 << 31, 1 << 33], [1 << 62, 4], [0.5]]
SHAPES += [[48, 0]]
HEADROOM = 2 << 30  # bytes of address space


class Call(NamedTuple):
    """A function, its arguments anew for each case, and what it should return of plain copies of them."""

    function: Callable[..., Any]
    arguments: Callable[[], list[Any]]
    truth: Callable[..., Any]


def guarded(tensor: Any) -> Any:
    """A copy that ends where a page begins that cannot be read; the thing itself if it has no memory of its own."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return [guarded(item) for item in tensor] if isinstance(tensor, list) else tensor
    count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if count > 1 << 24 or tensor.data_ptr() % tensor.element_size():
        return tensor
    pages = -(-count * tensor.element_size() // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    end = pages * mmap.PAGESIZE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory, end))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=end - count * tensor.element_size())
    flat.copy_(tensor.as_strided((count,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride())


def plain(value: Any) -> Any:
    """A contiguous copy."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, int) and value >= 1 << 63:  # a number that torch takes as a float
        return float(value)
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def other_tensors(t: Tensor) -> Iterator[tuple[str, Any]]:
    """What stands in place of a tensor."""
    for dtype in DTYPES:
        if dtype != t.dtype:
            yield str(dtype), t.to(dtype)
    yield from [("meta", t.to("meta")), ("None", None), ("0.5", 0.5), ("a list", [t]), ("sparse", t.to_sparse())]
    if not t.numel():
        return
    flat = t.reshape(-1)
    yield from [("rank + 1", t[None]), ("rank + 2", t[..., None, None]), ("flat", flat), ("scalar", flat[0].clone())]
    yield from [("empty", flat[:0]), ("twice", torch.cat([flat, flat])), ("one less", flat[1:].clone())]
    for d in range(t.dim()):
        yield f"dimension {d} less", t.narrow(d, 0, t.shape[d] - 1).clone()
        yield f"dimension {d} more", torch.cat([t, t.narrow(d, 0, 1)], d)
        yield f"dimension {d} of 1", t.narrow(d, 0, 1).clone()
        yield f"dimension {d} of 0", t.narrow(d, 0, 0)
        yield f"dimension {d} expanded", t.narrow(d, 0, 1).expand(t.shape)
    yield "transposed", t.permute(tuple(range(t.dim()))[::-1])
    yield from layouts(t)
    yield "huge", flat[:1].expand(1 << 42)
    between = torch.frombuffer(bytearray(t.nbytes + 1), dtype=torch.uint8)
    between[1:] = flat.view(torch.uint8) if t.dim() else flat[None].view(torch.uint8)
    yield "between addresses", torch.frombuffer(between.numpy(), dtype=t.dtype, offset=1).view(t.shape)
    for value in FLOATS if t.is_floating_point() else WHOLE:
        if t.is_floating_point() or torch.iinfo(t.dtype).min <= value <= torch.iinfo(t.dtype).max:
            every, last = torch.full(t.shape, value).to(t.dtype), t.clone()
            last.view(-1)[-1:] = every.view(-1)[-1:]
            yield from [(f"all {value}", every), (f"last {value}", last)]


def others(arguments: list[Any]) -> Iterator[tuple[str, int, Any]]:
    """What stands in place of each argument: its number, and the other one with its name."""
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor):
            yield from ((f"argument {i}: {name}", i, other) for name, other in other_tensors(value))
            for j, same in enumerate(arguments):
                if i != j and isinstance(same, Tensor) and same.shape == value.shape and same.dtype == value.dtype:
                    yield f"argument {i} is argument {j}", i, same
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            yield from ((f"argument {i}: {name}", i, [other]) for name, other in other_tensors(value[0]))
            yield from [(f"argument {i}: none", i, []), (f"argument {i}: twice", i, value * 2)]
        elif value is not None:
            choices: list[Any] = SHAPES + NUMBERS if isinstance(value, (list, tuple)) else NUMBERS
            yield from ((f"argument {i}: {other}", i, other) for other in choices)


def same(result: Any, truth: Any) -> bool:
    """Whether results agree, to what one 16-bit operand leaves."""
    if not isinstance(truth, Tensor):
        if isinstance(truth, (list, tuple)):
            return len(result) == len(truth) and all(map(same, result, truth))
        return bool(result == truth)
    if result.shape != truth.shape:
        return False
    if not truth.is_floating_point():
        return torch.equal(result, truth)
    a, b = result.double(), truth.double()
    most = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
    return bool((((a - b).abs() <= 2e-2 * most + 1e-5) | (a.isnan() & b.isnan()) | (a == b)).all())


def is_moderate(value: Any) -> bool:
    """Whether results of it can be compared: how NaN and what overflows spread is no op's promise."""
    if isinstance(value, list):
        return all(map(is_moderate, value))
    if isinstance(value, Tensor):
        is_empty = value.is_meta or not value.numel() or not value.is_floating_point()
        value = 0.0 if is_empty else float(value.double().abs().max())
    return not isinstance(value, float) or abs(value) < 1e15


def outcome(call: Call, given: list[Any]) -> str:
    try:
        copies, operands = plain(given), [guarded(value) for value in given]
    except (RuntimeError, NotImplementedError):  # sparse, or without memory
        copies, operands = None, given
    try:
        result = call.function(*operands)
    except REFUSALS as error:
        said = str(error)
        return "refused" if len(said) > 9 and "INTERNAL ASSERT" not in said else f"wrong: {error!r}"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    if copies is None:
        return "wrong: taken"
    if not is_moderate(copies):
        return "not compared"
    if isinstance(result, Tensor | tuple) and all(
        t.is_meta for t in ([result] if isinstance(result, Tensor) else result)
    ):
        return "right"  # nothing was computed
    try:
        truth = call.truth(*copies)
    except Exception as error:
        return f"wrong: taken, where plain torch raises {type(error).__name__}: {error}"
    if result is None:  # it wrote into its operands
        result, truth = ([x for x in xs if isinstance(x, (Tensor, list))] for xs in (operands, copies))
    return "right" if same(result, truth) else f"wrong: {result} in place of {truth}"[:600]


def op(name: str) -> Call:
    """An op, and its plain-torch implementation for devices without kernels. Derivatives that are computed there from
    the inputs alone, not from what the forward kept, are compared with those of contiguous copies."""

    is_derivative = name in ("causal_attention_backward", "experts_4bit_backward", "rms_norm_backward")
    torch_only = IMPLEMENTATIONS[name.split()[0], "CompositeExplicitAutograd"]
    return Call(overload_of(name), CALLS[name], overload_of(name) if is_derivative else torch_only)


def quantized(*fields: Any) -> qn.QuantizedWeight:
    tensors, (shape, quant_type, block_size, dtype) = fields[:6], fields[6:]
    names = ("packed", "absmax", "nested_absmax", "nested_offset", "code", "nested_code")
    options = {"shape": shape, "quant_type": quant_type, "block_size": block_size, "dtype": dtype}
    return qn.QuantizedWeight(**dict(zip(names, tensors, strict=True)), **options)


def fields() -> list[Any]:
    w = qn.quantize(torch.randn(48, 64))
    code, nested_code = torch.randn(16).sort()[0], qn._native.nested_code().clone()
    return [*w.op_args()[:4], code, nested_code, [48, 64], "nf4", 64, torch.float32]


def decoded(*fields: Any) -> Tensor:
    tensors = [tensor if tensor is None else tensor.view(-1) for tensor in fields[:6]]
    given: list[Any] = [fields[9], *tensors, fields[6], ("nf4", "fp4").index(fields[7]), fields[8]]
    return reference.dequantize(*given)


def stored() -> list[Any]:
    tensors = qn.to_bnb(quantized(*fields()))
    state = unpack_json(tensors.pop("weight.quant_state.bitsandbytes__nf4"))
    return [*tensors.values(), *state.values()]


NAMES = [f"weight{part}" for part in ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")]
STATE = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")


def state_of(*given: Any) -> dict[str, Any]:
    """bitsandbytes' tensors by name, of the tensors and the values of the quant state."""
    state = {"weight.quant_state.bitsandbytes__nf4": pack_json(dict(zip(STATE, given[5:], strict=True)))}
    return {**dict(zip(NAMES, given[:5], strict=True)), **state}


def into_layer(*given: Any) -> Tensor:
    layer = qn.nn.QuantizedLinear.from_linear(torch.nn.Linear(64, 48, bias=False))
    layer.load_state_dict(state_of(*given))
    return layer.dequantize().weight.detach()


def stored_truth(
    packed: Tensor, absmax: Tensor, code: Tensor, nested_absmax: Tensor, nested_code: Tensor, *state: Any
) -> Tensor:
    _, block_size, dtype, shape, _, _, offset = state
    tensors = packed.view(torch.uint8).view(-1), absmax.view(-1), nested_absmax.view(-1), torch.tensor(offset)
    return decoded(*tensors, code.view(-1), nested_code.view(-1), shape, "nf4", block_size, getattr(torch, dtype))


class Step(NamedTuple):
    """A step of an optimizer, some of whose tensors were replaced: its states in place or through load_state_dict."""

    rule: str
    bits: int
    loads: bool

    def started(self) -> tuple[torch.nn.Parameter, Any]:
        param = torch.nn.Parameter(torch.ones(5000))
        param.grad = torch.ones(5000)
        optimizer = getattr(qn.optim, self.rule)([param], bits=self.bits)
        optimizer.step()
        return param, optimizer

    def arguments(self) -> list[Any]:
        param, optimizer = self.started()
        return [torch.ones(5000), torch.ones(5000), *optimizer.state[param].values()]

    def run(self, data: Any, grad: Any, *states: Any) -> Tensor:
        param, optimizer = self.started()
        named = dict(zip(optimizer.state[param], states, strict=True))
        if self.loads:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: named}})
        else:
            optimizer.state[param].update(named)
        param.data, param.grad = data, None
        param.grad = grad
        optimizer.step()
        return param.data

    def truth(self, data: Tensor, grad: Tensor | None, *states: Any) -> Tensor:
        """By torch's AdamW, or by what the paper on Lion says, in fp32."""
        if grad is None:
            return data
        param, optimizer = self.started()
        given = dict(zip(optimizer.state[param], states, strict=True))
        names = [name for name in given if name in ("exp_avg", "exp_avg_sq")]
        decoded = {
            name: reference.decode_state(given[name], given[f"{name}_absmax"]) for name in names if self.bits == 8
        }
        held = {name: plain(decoded.get(name, given[name])).float().view(data.shape) for name in names}
        if self.rule == "Lion":
            return data - (1e-4 * (0.9 * held["exp_avg"] + 0.1 * grad).sign()).to(data.dtype)
        wide = torch.nn.Parameter(data.float())
        wide.grad, rival = grad.float(), torch.optim.AdamW([wide], lr=2e-4, weight_decay=0.0)
        rival.state[wide] = {"step": torch.tensor(float(given["step"])), **held}
        rival.step()
        return wide.data.to(data.dtype)


def weight_call(method: Callable[[qn.QuantizedWeight], Any], truth: Callable[[Tensor], Any]) -> Call:
    return Call(lambda *given: method(quantized(*given)), fields, lambda *given: truth(decoded(*given)))


EYE = torch.eye(64)
TABLE: dict[str, Call] = {
    **{name: op(name) for name in CALLS},
    "QuantizedWeight.dequantize": weight_call(lambda w: w.dequantize(), lambda dense: dense),
    "QuantizedWeight.slice": weight_call(lambda w: w.slice(2, 9).dequantize(), lambda dense: dense[2:9]),
    "QuantizedWeight[3]": weight_call(lambda w: w[3].dequantize(), lambda dense: dense[3]),
    "QuantizedWeight.flatten": weight_call(lambda w: w.flatten().dequantize(), torch.flatten),
    "QuantizedWeight.to": weight_call(lambda w: w.to("cpu").dequantize(), lambda dense: dense),
    "linear": weight_call(lambda w: qn.linear(EYE.to(w.dtype), w), lambda dense: dense.t()),
    "from_bnb": Call(lambda *given: qn.from_bnb(state_of(*given)).dequantize(), stored, stored_truth),
    "QuantizedLinear.load_state_dict": Call(into_layer, stored, stored_truth),
}
for step in (Step(rule, bits, loads) for rule in ("AdamW", "Lion") for bits in (32, 8) for loads in (False, True)):
    TABLE[f"{step}"] = Call(step.run, step.arguments, step.truth)


# ---------------------------------------------------------------------------------------------------------------------
# The native module. What an address points to is the caller's; a null or negative one is refused, and so is every size
# that no memory has.


class Address(int):
    pass


class Stride(int):  # which belongs to an address
    pass


MEMORY = torch.zeros(1 << 16)
AT = Address(MEMORY.data_ptr())
ORDER = torch.arange(64)
SPLIT = torch.tensor([0, 9, 12])
OFFSETS = Address(SPLIT.data_ptr())
STRIDES = tuple(map(Stride, (320, 80, 16)))
HEADS = (AT, *STRIDES)
NONE = Address(0)
WEIGHT = (AT, AT, *[NONE] * 5, 0, 3072, 64)
ROOM = (AT, 1 << 18)
ROWS = torch.tensor([[AT] * 4 + [0, 0, AT, 300, 0, 0]])
PLAN = _C.PagePlan([(300, 2, False)], _C.page_bytes, ROOM[1], _C.block_bytes)
STORE = _C.FileStore(PLAN.num_bytes, ".", False)
PAGER = _C.Pager()
PAGER.add(STORE, PLAN)
NUMBERS_OF_PAGER = torch.zeros(1, dtype=torch.int64)
PAGED = (PAGER, Address(NUMBERS_OF_PAGER.data_ptr()), ROOM[1])
NATIVE: dict[str, list[Any]] = {
    "levels": [0],
    "boundaries": [0],
    "quantize_4bit": [AT, 0, 3072, 64, 0, AT, AT],
    "search_scales_4bit": [AT, 0, 3072, 64, 64, 0, AT, AT, 8, 1, AT, 0.0, 0.5, 1.5, AT, AT, AT],
    "gptq_4bit": [AT, 0, 48, 64, 64, 0, AT, Address(ORDER.data_ptr()), AT, AT],
    "quantize_scales": [AT, 48, AT, AT, AT],
    "dequantize_4bit": [0, AT, 64, 0, 48, 0, 64, WEIGHT],
    "matrix": [48, 64, WEIGHT],
    "few_rows": [0],
    "matrix_forward": [_C.matrix(48, 64, WEIGHT), 0, AT, NONE, AT, 1, *ROOM, AT, AT, 1.0, AT, 4],
    "linear_4bit": [True, 0, AT, NONE, NONE, 1.0, AT, AT, 4, AT, 3, 48, 64, *ROOM, WEIGHT],
    "dense_linear": [True, 0, AT, AT, NONE, 1.0, AT, 3, 48, 64, *ROOM],
    "outer": [0, AT, AT, 3, 4, 64, 1.0, AT, *ROOM],
    "experts_4bit": [0, AT, OFFSETS, 3, *[AT] * 4, 4, 1.0, AT, AT, 12, 24, 64, WEIGHT, *ROOM],
    "experts_4bit_backward": [0, AT, AT, OFFSETS, 3, *[AT] * 3, 4, 1.0, *[AT] * 4, 12, 24, 64, WEIGHT, *ROOM],
    "adamw_step": [Address(ROWS.data_ptr()), 1, [(0.1, 0.9, 0.99, 1e-8, 0.0, True)], 1.0, *PAGED],
    "lion_step": [Address(ROWS.data_ptr()), 1, [(0.1, 0.9, 0.99, 0.0)], 1.0, *PAGED],
    "gradient_norm": [Address(ROWS.data_ptr()), 1],
    "state_code": [True],
    "PagePlan": [[(5000, 2, True), (300, 1, False)], 4096, ROOM[1], 4096],
    "FileStore": [1 << 16, ".", False],
    "FileStore.resident_bytes": [STORE],
    "Pager.add": [_C.Pager(), STORE, PLAN],
    "Pager.to_file": [PAGER],
    "Pager.to_memory": [PAGER],
    "Pager.evict": [PAGER],
    "lies_in_memory": ["."],
    "decode_scales": [AT, AT, AT, NONE, 48, AT],
    "softmax_loss": [0, AT, Address(ORDER.data_ptr()), 3, 48, True, AT],
    "rms_norm": [0, AT, AT, 1e-5, 3, 64, AT, AT],
    "rms_norm_backward": [0, AT, AT, AT, AT, 3, 64, AT],
    "rotary": [0, AT, STRIDES, AT, AT, 1, (2, 4, 5, 16), False, AT, STRIDES],
    "swiglu": [0, AT, AT, 3072, AT],
    "swiglu_backward": [0, AT, AT, AT, 3072, AT, AT],
    "causal_attention_scratch_bytes": [0, (2, 4, 2, 5, 16), True],
    "causal_attention": [0, (2, 4, 2, 5, 16), 1.0, *[HEADS] * 4, AT, AT],
    "causal_attention_backward": [0, (2, 4, 2, 5, 16), 1.0, *[HEADS] * 4, AT, *[HEADS] * 4, AT],
    "linear_scratch_bytes": [0, 3, 48, 64],
}
if hasattr(_C, "MappedFile"):
    FILE = _C.MappedFile(__file__)
    PARTS = [(FILE, 0, 4096), (FILE, 5000, 6000)]
    STREAM = _C.WeightStream([PARTS, PARTS[1:], []], PARTS, [])
    NATIVE |= {
        "MappedFile": [__file__],
        "MappedFile.change": [FILE],
        "MappedFile.release": [FILE, 0, 4096],
        "MappedFile.resident_bytes": [FILE, 0, 4096],
        "WeightStream": [[PARTS, []], PARTS, PARTS],
        "WeightStream.want": [STREAM, [0, 1], 0, True],
        "WeightStream.settle": [STREAM],
    }
# What is an argument, too: a step without a pager, a visit without a unit to wait for, a stream of one empty unit.
TAKEN = [("adamw_step", 4, None), ("lion_step", 4, None), ("WeightStream.want", 2, -1), ("WeightStream", 0, [()])]
INSTANCES: dict[str, Any] = {"PagePlan": PLAN, "FileStore": STORE, "Pager": PAGER}
INSTANCES |= {"MappedFile": FILE, "WeightStream": STREAM} if hasattr(_C, "MappedFile") else {}
for owner, instance in INSTANCES.items():
    for name, member in vars(getattr(_C, owner)).items():
        if isinstance(member, property):
            NATIVE[f"{owner}.{name}"] = [instance]


def native_names() -> set[str]:
    """What the native module has that takes arguments: functions, classes, their methods and properties."""
    without = {"build_info", "cpu_isa", "nested_code", "Pager"}
    without.add("take_threads_of_torch")  # of the address of code, which nothing can check
    found: set[str] = set()
    for name, value in vars(_C).items():
        if name.startswith("_") or not callable(value) or (isinstance(value, type) and issubclass(value, Exception)):
            continue
        found.add(name)
        if isinstance(value, type):
            found |= {f"{name}.{inner}" for inner in vars(value) if not inner.startswith("_")}
    return found - without


BEYOND = [-1, -(1 << 63), 1 << 58, 1 << 62, (1 << 63) - 1, 1 << 64, 0.5, None, "x", object()]


def other_values(value: Any) -> Iterator[Any]:
    """What stands in place of an argument of a native function."""
    if isinstance(value, (tuple, list)):
        for i, inner in enumerate(value):
            yield from (type(value)([*value[:i], other, *value[i + 1 :]]) for other in other_values(inner))
        yield from [None, 5, value[:-1] if isinstance(value, tuple) else [()]]
    elif isinstance(value, Address):
        yield from [*[0] * (value != 0), -1, 1 << 64, 0.5, None, "x"]
    elif type(value) is Stride:
        yield from [1 << 64, 0.5, None, "x"]
    elif type(value) is int:
        yield from BEYOND
    elif type(value) in (bool, float):
        yield from ["x", []]
    else:
        yield from [None, 5, object(), torch.utils.dlpack.to_dlpack(torch.zeros(1))]


def called(name: str, arguments: list[Any]) -> None:
    MEMORY.zero_()
    member = attrgetter(name)(_C)
    function: Any = member.fget if isinstance(member, property) else member
    function(*arguments)


def native(name: str, i: int, other: Any) -> str:
    try:
        called(name, [*NATIVE[name][:i], other, *NATIVE[name][i + 1 :]])
    except (*REFUSALS, MemoryError) as error:
        return "refused" if len(str(error)) > 9 or isinstance(error, MemoryError) else f"wrong: {error!r}"
    # Room that is too small is answered with what is needed.
    return "right" if NATIVE[name][i] in ROOM or (name, i, other) in TAKEN else "wrong: taken"


def sound(name: str) -> str:
    """The call with no argument replaced, of which the others would otherwise say nothing."""
    try:
        called(name, NATIVE[name])
    except Exception as error:
        return f"wrong: {error!r}"
    return "right"


def cases() -> list[workers.Case]:
    found: list[workers.Case] = []
    for name, given in NATIVE.items():
        found.append(([f"_C.{name}", "as it is"], partial(sound, name)))
        for i, value in enumerate(given):
            for other in other_values(value):
                found.append(([f"_C.{name}", f"argument {i}: {other}"], partial(native, name, i, other)))
    for name, call in TABLE.items():
        torch.manual_seed(0)
        for what, i, other in others(call.arguments()):
            found.append(([name, what], partial(replaced, call, i, other)))
    return found


def replaced(call: Call, i: int, other: Any) -> str:
    torch.manual_seed(0)
    given = call.arguments()
    given[i] = other
    return outcome(call, given)


if __name__ == "__main__":
    folder, every, first = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    workers.limit_memory(HEADROOM)
    all_cases = cases()[:: int(every)]
    workers.serve(len(all_cases), all_cases.__getitem__, Path(folder), int(first))
