def device_count() -> int: ...
def runtime_version() -> int: ...
def driver_version() -> int: ...
def dequantize_4bit(
    dtype: int,
    out: int,
    stream: int,
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
