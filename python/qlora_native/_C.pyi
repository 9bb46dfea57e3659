from collections.abc import Sequence
from typing import Any

def build_info() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def take_threads_of_torch(count: int) -> None: ...

block_formats: list[tuple[str, int, int]]

def levels(quant_type: int) -> list[float]: ...
def boundaries(quant_type: int) -> list[float]: ...
def nested_code() -> list[float]: ...
def quantize_4bit(
    x: int, dtype: int, numel: int, block_size: int, quant_type: int, packed: int, absmax: int
) -> int: ...
def search_scales_4bit(
    x: int,
    dtype: int,
    numel: int,
    k: int,
    block_size: int,
    quant_type: int,
    moment: int,
    table: int,
    count: int,
    group: int,
    multiplier: int,
    offset: float,
    low: float,
    high: float,
    initial: int,
    packed: int,
    chosen: int,
) -> None: ...
def gptq_4bit(
    x: int,
    dtype: int,
    n: int,
    k: int,
    block_size: int,
    quant_type: int,
    factor: int,
    order: int,
    scales: int,
    packed: int,
) -> None: ...
def quantize_scales(
    absmax: int, blocks: int, codes: int, nested_absmax: int, nested_offset: int
) -> None: ...
def dequantize_4bit(
    dtype: int,
    out: int,
    row_length: int,
    row_begin: int,
    row_end: int,
    column_begin: int,
    column_end: int,
    weight: tuple[int, ...],  # Weight.pointers()
) -> None: ...
def matrix(n: int, k: int, weight: tuple[int, ...]) -> object: ...
def few_rows(dtype: int) -> int: ...
def matrix_forward(
    matrix: object,
    dtype: int,
    x: int,
    bias: int,
    y: int,
    m: int,
    scratch: int,
    scratch_bytes: int,
    down: int = 0,
    up: int = 0,
    up_scale: float = 0.0,
    low: int = 0,
    r: int = 0,
) -> int: ...
def linear_4bit(
    forward: bool,
    dtype: int,
    x: int,
    bias: int,
    down: int,
    down_scale: float,
    low: int,
    up: int,
    r: int,
    y: int,
    m: int,
    n: int,
    k: int,
    scratch: int,
    scratch_bytes: int,
    weight: tuple[int, ...],
) -> int: ...
def dense_linear(
    forward: bool,
    dtype: int,
    x: int,
    weight: int,
    bias: int,
    scale: float,
    y: int,
    m: int,
    n: int,
    k: int,
    scratch: int,
    scratch_bytes: int,
) -> int: ...
def experts_4bit(
    dtype: int,
    x: int,
    offsets: int,
    num_offsets: int,
    stored_down: int,
    stored_up: int,
    down: int,
    up: int,
    r: int,
    scale: float,
    y: int,
    low: int,
    m: int,
    n: int,
    k: int,
    weight: tuple[int, ...],
    scratch: int,
    scratch_bytes: int,
) -> int: ...
def experts_4bit_backward(
    dtype: int,
    grad_y: int,
    x: int,
    offsets: int,
    num_offsets: int,
    xa: int,
    down: int,
    up: int,
    r: int,
    scale: float,
    low: int,
    grad_x: int,
    grad_a: int,
    grad_b: int,
    m: int,
    n: int,
    k: int,
    weight: tuple[int, ...],
    scratch: int,
    scratch_bytes: int,
) -> int: ...
def linear_scratch_bytes(dtype: int, m: int, n: int, k: int) -> int: ...
def outer(
    dtype: int,
    left: int,
    right: int,
    m: int,
    r: int,
    width: int,
    scale: float,
    out: int,
    scratch: int,
    scratch_bytes: int,
) -> int: ...
def adamw_step(
    rows: int,
    num_tensors: int,
    options: list[tuple[float, float, float, float, float, bool]],
    grad_factor: float,
    pager: Pager | None = None,
    numbers: int = 0,
    budget_bytes: int = 0,
) -> None: ...
def lion_step(
    rows: int,
    num_tensors: int,
    options: list[tuple[float, float, float, float]],
    grad_factor: float,
    pager: Pager | None = None,
    numbers: int = 0,
    budget_bytes: int = 0,
) -> None: ...
def gradient_norm(rows: int, num_tensors: int) -> float: ...
def state_code(signed: bool) -> list[list[float]]: ...

class PageFileError(OSError): ...

class PagePlan:
    def __init__(
        self, forms: list[tuple[int, int, bool]], page_bytes: int, chunk_bytes: int, block_bytes: int
    ) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def places(self) -> list[tuple[int, int, int, int]]: ...
    @property
    def largest_chunk(self) -> int: ...

class FileStore:
    def __init__(self, num_bytes: int, folder: str, in_file: bool) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def bytes_in_file(self) -> int: ...
    @property
    def bytes_in(self) -> int: ...
    @property
    def bytes_out(self) -> int: ...
    def resident_bytes(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Pager:
    def __init__(self) -> None: ...
    def add(self, store: FileStore, plan: PagePlan) -> None: ...
    def to_file(self) -> None: ...
    def to_memory(self) -> bool: ...
    def evict(self) -> None: ...
    @property
    def look_ahead(self) -> int: ...
    @property
    def stalls(self) -> int: ...
    @property
    def stall_seconds(self) -> float: ...

def lies_in_memory(folder: str) -> bool: ...

class MappedFileError(OSError): ...

class MappedFile:  # on Linux
    def __init__(self, path: str) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def path(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...
    def change(self) -> str: ...
    def release(self, begin: int, end: int) -> None: ...
    def resident_bytes(self, begin: int, end: int) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

MappedParts = Sequence[tuple[MappedFile, int, int]]

class WeightStream:  # on Linux
    def __init__(
        self, units: Sequence[MappedParts], resident: MappedParts, rows: MappedParts
    ) -> None: ...
    def want(self, units: list[int], now: int, begins_pass: bool) -> bool: ...
    def settle(self) -> None: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def stalls(self) -> int: ...
    @property
    def stall_seconds(self) -> float: ...
    @property
    def held(self) -> set[int]: ...

optim_row_length: int
page_bytes: int
block_bytes: int
state_block: int

def decode_scales(
    absmax_codes: int,
    nested_absmax: int,
    nested_offset: int,
    nested_code: int,
    blocks: int,
    scales: int,
) -> None: ...
def softmax_loss(
    dtype: int, logits: int, targets: int, rows: int, vocabulary: int, need_gradient: bool, losses: int
) -> None: ...
def rms_norm(
    dtype: int, x: int, weight: int, eps: float, rows: int, width: int, y: int, rstd: int
) -> None: ...
def rms_norm_backward(
    dtype: int, grad_y: int, x: int, weight: int, rstd: int, rows: int, width: int, grad_x: int
) -> None: ...
def rotary(
    dtype: int,
    x: int,
    x_strides: tuple[int, ...],
    cos: int,
    sin: int,
    angle_batches: int,
    shape: tuple[int, ...],
    inverse: bool,
    y: int,
    y_strides: tuple[int, ...],
) -> None: ...
def swiglu(dtype: int, gate: int, up: int, numel: int, y: int) -> None: ...
def swiglu_backward(
    dtype: int, grad_y: int, gate: int, up: int, numel: int, grad_gate: int, grad_up: int
) -> None: ...

Heads = tuple[int, int, int, int]

def causal_attention_scratch_bytes(dtype: int, shape: tuple[int, ...], backward: bool) -> int: ...
def causal_attention(
    dtype: int,
    shape: tuple[int, ...],
    scale: float,
    q: Heads,
    k: Heads,
    v: Heads,
    out: Heads,
    lse: int,
    scratch: int,
) -> None: ...
def causal_attention_backward(
    dtype: int,
    shape: tuple[int, ...],
    scale: float,
    q: Heads,
    k: Heads,
    v: Heads,
    out: Heads,
    lse: int,
    grad_out: Heads,
    grad_q: Heads,
    grad_k: Heads,
    grad_v: Heads,
    scratch: int,
) -> None: ...
