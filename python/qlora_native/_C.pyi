from typing import Any

def build_info() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def levels(quant_type: int) -> list[float]: ...
def boundaries(quant_type: int) -> list[float]: ...
def nested_code() -> list[float]: ...
def quantize_4bit(
    x: int, dtype: int, numel: int, block_size: int, quant_type: int, packed: int, absmax: int
) -> int: ...
def quantize_scales(absmax: int, blocks: int, codes: int, nested_absmax: int, nested_offset: int) -> None: ...
def dequantize_4bit(
    dtype: int,
    out: int,
    row_length: int,
    row_begin: int,
    row_end: int,
    column_begin: int,
    column_end: int,
    packed: int,
    absmax: int,
    absmax_codes: int,
    nested_absmax: int,
    nested_offset: int,
    nested_code: int,
    levels: int,
    quant_type: int,
    numel: int,
    block_size: int,
) -> None: ...

linear_4bit_max_tokens: int

def linear_4bit(
    dtype: int,
    x: int,
    bias: int,
    y: int,
    m: int,
    n: int,
    k: int,
    packed: int,
    absmax: int,
    absmax_codes: int,
    nested_absmax: int,
    nested_offset: int,
    nested_code: int,
    levels: int,
    quant_type: int,
    numel: int,
    block_size: int,
) -> None: ...
def adamw_step(
    rows: int,
    num_tensors: int,
    options: list[tuple[float, float, float, float, float, bool]],
    grad_factor: float,
) -> None: ...
def lion_step(
    rows: int, num_tensors: int, options: list[tuple[float, float, float, float]], grad_factor: float
) -> None: ...
def gradient_norm(rows: int, num_tensors: int) -> float: ...
def state_code(signed: bool) -> list[list[float]]: ...

optim_row_length: int
state_block: int

def decode_scales(
    absmax_codes: int, nested_absmax: int, nested_offset: int, nested_code: int, blocks: int, scales: int
) -> None: ...
