from collections.abc import Sequence

def device_count() -> int: ...
def runtime_version() -> int: ...
def driver_version() -> int: ...
def image_error() -> str: ...
def adamw_step(
    tensors: int,
    chunks: int,
    num_tensors: int,
    num_chunks: int,
    options: int,
    num_groups: int,
    decoupled: bool,
    grad_factor: float,
    max_norm: float,
    grad_scale: int,
    found_inf: int,
    norm: int,
    grad_norm: int,
    skipped: int,
    finished: int,
    stream: int,
) -> None: ...
def dequantize_4bit(
    dtype: int,
    out: int,
    panel: tuple[int, int, int, int, int],  # row length, rows [begin, end), columns [begin, end)
    stream: int,
    weight: tuple[int, ...],  # Weight.pointers()
) -> None: ...
def gradient_norm(
    tensors: int,
    chunks: int,
    num_tensors: int,
    num_chunks: int,
    workspace: int,
    workspace_bytes: int,
    norm: int,
    stream: int,
) -> None: ...
def gradient_norm_workspace(num_chunks: int) -> int: ...
def linear_4bit(
    forward: bool,
    dtype: int,
    x: int,
    bias: int,
    low: int,
    up: int,
    r: int,
    y: int,
    m: int,
    n: int,
    k: int,
    plan: Sequence[int],
    workspace: int,
    workspace_bytes: int,
    stream: int,
    weight: tuple[int, ...],
) -> None: ...
def lion_step(
    tensors: int,
    chunks: int,
    num_tensors: int,
    num_chunks: int,
    options: int,
    num_groups: int,
    grad_factor: float,
    max_norm: float,
    grad_scale: int,
    found_inf: int,
    norm: int,
    grad_norm: int,
    skipped: int,
    finished: int,
    stream: int,
) -> None: ...
def optim_chunks(
    rows: int,
    num_tensors: int,
    updates: bool,
    second_moment: bool,
    num_groups: int,
    chunks: int,
    room: int,
) -> int: ...
def plan_matmul(question: Sequence[int]) -> list[int]: ...
def quantize_4bit(
    dtype: int,
    x: int,
    numel: int,
    block_size: int,
    quant_type: int,
    packed: int,
    absmax: int,
    first_bad: int,
    stream: int,
) -> None: ...
def quantize_scales(
    absmax: int,
    blocks: int,
    codes: int,
    nested_absmax: int,
    nested_offset: int,
    workspace: int,
    workspace_bytes: int,
    stream: int,
) -> None: ...
def quantize_scales_workspace(blocks: int) -> int: ...
def rms_norm(
    dtype: int, x: int, weight: int, eps: float, rows: int, width: int, y: int, rstd: int, stream: int
) -> None: ...
def rms_norm_backward(
    dtype: int,
    grad_y: int,
    x: int,
    weight: int,
    rstd: int,
    rows: int,
    width: int,
    grad_x: int,
    stream: int,
) -> None: ...
def rotary(
    dtype: int,
    x: int,
    x_strides: Sequence[int],
    cos: int,
    sin: int,
    angle_batches: int,
    shape: Sequence[int],
    inverse: bool,
    y: int,
    y_strides: Sequence[int],
    stream: int,
) -> None: ...
def softmax_loss(
    dtype: int,
    logits: int,
    targets: int,
    ignore_index: int,
    rows: int,
    vocabulary: int,
    need_gradient: bool,
    losses: int,
    stream: int,
) -> None: ...
def swiglu(dtype: int, gate: int, up: int, numel: int, y: int, stream: int) -> None: ...
def swiglu_backward(
    dtype: int, grad_y: int, gate: int, up: int, numel: int, grad_gate: int, grad_up: int, stream: int
) -> None: ...

managed_page_bytes: int
pinned_page_bytes: int

def has_concurrent_managed_access(device: int) -> bool: ...

class PageStore:
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def places(self) -> list[tuple[int, int, int, int]]: ...
    @property
    def largest_chunk(self) -> int: ...
    @property
    def is_resident(self) -> bool: ...
    @property
    def statistics(self) -> tuple[int, int, int]: ...
    def zero(self, budget_bytes: int, stream: int) -> None: ...
    def page_in(self, stream: int) -> None: ...
    def page_out(self, stream: int) -> None: ...
    def finish(self) -> None: ...
    def forget_residency(self) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class ManagedStore(PageStore):
    def __init__(
        self, forms: list[tuple[int, int, bool]], page_bytes: int, chunk_bytes: int
    ) -> None: ...
    def renew(self, stream: int) -> None: ...

class PinnedStore(PageStore):
    def __init__(
        self, forms: list[tuple[int, int, bool]], page_bytes: int, chunk_bytes: int
    ) -> None: ...
    @property
    def staging_bytes(self) -> int: ...

class StoreTable:
    def __init__(self, store: PageStore, row_of: list[int], staging: int) -> None: ...
    @property
    def rows(self) -> list[tuple[int, int, int, int, int]]: ...
    @property
    def chunks(self) -> list[tuple[int, int]]: ...
    def adamw_step(
        self,
        tensors: int,
        chunks: int,
        budget_bytes: int,
        options: int,
        num_groups: int,
        decoupled: bool,
        grad_factor: float,
        max_norm: float,
        grad_scale: int,
        found_inf: int,
        norm: int,
        grad_norm: int,
        skipped: int,
        finished: int,
        stream: int,
    ) -> None: ...
    def lion_step(
        self,
        tensors: int,
        chunks: int,
        budget_bytes: int,
        options: int,
        num_groups: int,
        grad_factor: float,
        max_norm: float,
        grad_scale: int,
        found_inf: int,
        norm: int,
        grad_norm: int,
        skipped: int,
        finished: int,
        stream: int,
    ) -> None: ...
