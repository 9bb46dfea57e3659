"""An adapter as the GGUF file that llama.cpp loads over its base: nothing is merged."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf

from qlora_native.errors import UserError
from qlora_native.models.merge_files import Merging
from qlora_native.tool.export.gguf import architecture_of, names_of
from qlora_native.weights.gguf import interleaved, reordered_heads


def export_adapter(work: Merging, path: Path) -> dict[str, Any]:
    """Write ``path`` with lora_a [r, K] and lora_b [N, r] of every adapted matrix, in fp32, under llama.cpp's names.

    llama.cpp multiplies each product by one alpha over its rank; a layer with another scale has the rest of it in
    lora_b. UserError for what it does not compute.

    Source: src/llama-adapter.cpp of https://github.com/ggml-org/llama.cpp.
    """
    config = work.source.config
    adapter = work.adapter
    where = work.source.path
    architecture = architecture_of(work.source)
    name_of = names_of(work.source)
    if adapter.saved:
        raise UserError(
            f"the adapter trains {min(adapter.saved)}, which a GGUF adapter cannot hold: export --to gguf merges it."
        )
    if work.untied:
        raise UserError(
            f"the adapter changes the output embedding, which {where} ties to the input's: llama.cpp has one tensor "
            "for both; export --to gguf merges it."
        )
    alphas = [scale * len(a) for a, _, scale in adapter.pairs.values()]
    alpha = alphas[0] or 1.0
    num_bytes = 0
    with closing(gguf.GGUFWriter(path, architecture.name)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(where.stem if where.is_file() else where.name)
        for (module, (a, b, _)), own in zip(adapter.pairs.items(), alphas, strict=True):
            name = name_of(f"{module}.weight")
            heads = reordered_heads(config, architecture, module)
            b = b.float() * (own / alpha)
            for side, matrix in (
                ("a", a.float()),
                ("b", b if heads is None else interleaved(b, heads)),
            ):
                writer.add_tensor(f"{name}.lora_{side}", matrix.contiguous().numpy())
                num_bytes += matrix.nbytes
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return {"tensors": 2 * len(adapter.pairs), "num_bytes": num_bytes, "alpha": alpha}
