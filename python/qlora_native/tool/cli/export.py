"""``qlora export``: a model, or a model and an adapter, in the form that another program reads."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from qlora_native._io import (
    as_user_error,
    as_write_error,
    atomic_file,
    atomic_folder,
    is_own_file,
    read_json,
    reason,
    user_path,
)
from qlora_native.errors import UserError
from qlora_native.tool.cli._run import add_to, print_result, refuse_existing, require, stopwatch
from qlora_native.tool.cli._weights import (
    add_base,
    add_quantizing,
    add_shard_size,
    as_trained,
    has_four_bit_config,
    merge_base,
    run_of,
)
from qlora_native.tool.cli.merge import write_merged


def configure(parser: argparse.ArgumentParser) -> None:
    add = add_to(parser)
    add("model", "MODEL", "a model folder or a .gguf file; for gguf-adapter an adapter too")
    add("--adapter", "DIR", "a folder in PEFT's format, or a checkpoint of a run")
    add("--to", (*_MAKERS, "hub"), "what to make", required=True)
    add("--repo", "USER/NAME", "--to hub: the repository, which is made if it is not there")
    add("--private", None, "--to hub: make a private one")
    out = "the folder or .gguf file; it must not exist yet (default, for gguf-adapter alone: DIR.gguf)"
    parser.add_argument("--out", "-o", type=user_path, metavar="PATH", help=out)
    kind = (
        "of the matrices; safetensors takes f16, bf16 and f32; keep: MODEL's own, a GGUF file's (default: bf16, for "
        "gguf f16, or q8_0 where MODEL is a GGUF file of fewer bits)"
    )
    add("--type", ("f16", "bf16", "f32", "q8_0", "q4_0", "q4_1", "q4_k", "iq4_nl", "keep"), kind)
    text = "--type keep: text such as the model will meet, any file that training reads"
    add("--calibration", "FILE", text)
    add_base(parser)
    add_quantizing(parser)
    add_shard_size(parser)
    add("--json", None, "print the result as one JSON object")
    parser.epilog = """safetensors: a 16-bit folder that transformers loads. gguf: one file with the tokenizer and chat
template in it, which llama.cpp runs: llama, mistral, qwen2, qwen3, gemma and gemma2. peft: the adapter alone, checked
against MODEL, which it then names as its base. gguf-adapter: the adapter alone for llama.cpp, which runs it over the
GGUF file of the same base; without --adapter MODEL is the adapter, over the base that it names. Tensors are read and
written a few megabytes at a time. --type keep writes MODEL, a GGUF file, once more, in which adapted weights have other
codes under the scales that they have. hub: the files of an adapter, MODEL, in a repository of the Hugging Face hub;
without config.yaml, which has paths of this machine.

examples:
  qlora export Llama-3.1-8B-Instruct --adapter run/adapter --to gguf --type q8_0 --out tuned.gguf
  qlora export llama.gguf --adapter run/adapter --to gguf --type keep --calibration train.jsonl --out tuned.gguf
  qlora export Llama-3.1-8B-Instruct --adapter run/adapter --to safetensors --out tuned
  qlora export Llama-3.1-8B-Instruct --adapter run/step-000200 --to peft --out tuned-adapter
  qlora export run/adapter --to gguf-adapter --out tuned-adapter.gguf
  qlora export run/adapter --to hub --repo me/tuned"""


def run(args: argparse.Namespace) -> int:
    if args.to == "hub":
        return _upload(args)
    if args.to == "gguf-adapter" and args.adapter is None:
        args.adapter, args.model = args.model, _base_of(args.model)
    if args.out is None:
        if args.to != "gguf-adapter":
            raise UserError(
                f"qlora export: --to {args.to} needs --out PATH, the folder or file to make"
            )
        args.out = args.adapter.with_name(f"{args.adapter.name}.gguf")
    refuse_existing(args.out, "--out")
    if args.to.startswith("gguf") and args.out.suffix != ".gguf":
        raise UserError(f"qlora export: --out is {args.out}: expected a name that ends in .gguf")
    if args.to in ("peft", "gguf-adapter") and args.type is not None:
        raise UserError(
            f"qlora export: --to {args.to} takes no --type: the adapter is written as it is"
        )
    seconds = stopwatch()
    with as_user_error():
        made = _MAKERS[args.to](args, args.out)
    result = {"out": str(args.out), "to": args.to, **made, "seconds": seconds()}
    lines = [f"{args.out}: {result['num_bytes'] / 2**20:,.1f} MiB; took {result['seconds']:.1f} s"]
    for kind, count in Counter(result.get("other_types", {}).values()).items():
        lines.append(
            f"{count} matrices are {kind}: embeddings, or rows that are no whole blocks of {args.type}"
        )
    if (changed := result.get("changed")) is not None:
        share = 100 * sum(changed.values()) / len(changed)
        lines.append(f"{len(changed)} weights took the adapter; {share:.1f} % of their bytes changed")
    print_result(args, result, lines)
    return 0


def _merging(args: argparse.Namespace, to: str) -> Any:
    from qlora_native.models.merge_files import Merging

    # Where nothing is added there is nothing to choose.
    args.base = args.base if args.adapter or not has_four_bit_config(args.model) else None
    args.base, base = merge_base(args)
    return Merging(base.path, args.adapter, base=args.base, to=to, **base.options)


def _safetensors(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    types = {"f16": "fp16", "bf16": "bf16", "f32": "fp32", None: "bf16"}
    if args.type not in types:
        raise UserError(
            f"qlora export: --type {args.type} is of GGUF: expected f16, bf16 or f32 with --to safetensors"
        )
    work = _merging(args, types[args.type])
    write_merged(work, out, args.shard_size)
    return {"files": work.report.files, "num_bytes": work.report.num_bytes}


def _gguf(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    require("qlora export --to gguf", "gguf")
    from qlora_native.models.progress import layer_progress
    from qlora_native.tool.export.gguf import architecture_of, export_gguf, near_type
    from qlora_native.tool.export.gguf_kept import export_kept
    from qlora_native.weights.open import load_tokenizer, open_source

    source = open_source(args.model)
    architecture_of(source)  # before minutes of work
    work = _merging(args, "fp32")
    if (args.type == "keep") != bool(args.calibration):
        raise UserError(
            "qlora export: --type keep and --calibration FILE, text such as the model will meet, go together"
        )
    if args.type == "keep":
        with as_write_error(out), atomic_file(out) as partial, layer_progress() as progress:
            return export_kept(work, partial, args.adapter, args.calibration, progress)
    is_gguf = source.path.suffix == ".gguf"
    tokenizer = source.path if is_gguf else load_tokenizer(str(args.model), args.adapter)
    kind = args.type or (near_type(source) if is_gguf else "f16")
    with as_write_error(out), atomic_file(out) as partial:
        made = export_gguf(work, partial, kind, tokenizer, source.path)
    if args.type is None:
        args.type = kind
        near = f", near that of {source.path.name}" if is_gguf else ""
        print(f"type {kind}{near}; --type sets another", file=sys.stderr)
    return made


def _peft(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    from qlora_native.data.template import TEMPLATE
    from qlora_native.lora.adapter import CONFIG_NAME, TENSORS_NAME
    from qlora_native.weights.open import open_source

    if args.adapter is None:
        raise UserError("qlora export: --to peft needs MODEL, the base, and --adapter DIR")
    work = _merging(args, "fp32")  # raises UserError if model and adapter do not belong together
    config = read_json(args.adapter / CONFIG_NAME)
    is_given = work.source.path == open_source(args.model).path
    config["base_model_name_or_path"] = str(args.model if is_given else work.source.path)
    with as_write_error(out), atomic_folder(out) as partial:
        (partial / CONFIG_NAME).write_text(
            json.dumps(config, indent=2) + "\n",
            encoding="utf-8",  # the first pattern that matches counts
        )
        for name in (TENSORS_NAME, "README.md", "tokenizer.json", "tokenizer_config.json", TEMPLATE):
            if is_own_file(args.adapter / name):
                shutil.copyfile(args.adapter / name, partial / name)
    return {"num_bytes": (out / TENSORS_NAME).stat().st_size}


def _gguf_adapter(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    require("qlora export --to gguf-adapter", "gguf")
    from qlora_native.tool.export.gguf import architecture_of
    from qlora_native.tool.export.gguf_adapter import export_adapter
    from qlora_native.weights.open import open_source

    run = run_of(args.adapter)
    if args.base is None and run is not None and as_trained(args).options.get("quant_type") != "keep":
        architecture_of(open_source(args.model))  # else the advice would not work
        command = shlex.join(
            ["qlora", "export", str(args.model), "--adapter", str(args.adapter), "--to", "gguf"]
        )
        raise UserError(
            f"{args.adapter} was trained on 4-bit weights, and llama.cpp adds it to those of a GGUF file: "
            f"`{command} --out tuned.gguf` writes the model that was trained; --base original writes the adapter alone"
        )
    args.base = "dequantized" if has_four_bit_config(args.model) else "original"
    work = _merging(args, "fp32")
    with as_write_error(out), atomic_file(out) as partial:
        return export_adapter(work, partial)


def _upload(args: argparse.Namespace) -> int:
    from qlora_native.lora.adapter import CONFIG_NAME

    folder = args.model
    patterns = ["adapter_*", "README.md", "*token*", "chat_template.jinja"]
    if not (folder / CONFIG_NAME).is_file() or args.repo is None:
        raise UserError(
            "qlora export: --to hub takes an adapter's folder as MODEL, and --repo USER/NAME"
        )
    words = [
        args.repo,
        str(folder),
        *(f"--include={pattern}" for pattern in patterns),
        *["--private"] * args.private,
    ]
    try:
        from huggingface_hub import HfApi

        api = HfApi()
        repo = api.create_repo(args.repo, private=args.private or None, exist_ok=True).repo_id
        done = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=patterns)
    # No package, no network, no token, no permission: each has errors of its own.
    except Exception as error:
        command = shlex.join(["hf", "upload", *words])
        raise UserError(
            f"{folder} is not uploaded ({reason(error)}); where that can be done: {command}"
        ) from error
    print_result(
        args, {"repo": repo, "to": "hub", "url": str(done)}, [f"{folder} is uploaded: {done}"]
    )
    return 0


def _base_of(adapter: Path) -> Path:
    """The base that an adapter names."""
    from qlora_native.lora.adapter import read_settings

    base = read_settings(adapter).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{adapter} names no base: give it as MODEL, and the adapter as --adapter DIR")
    return user_path(base)


_MAKERS = {"safetensors": _safetensors, "gguf": _gguf, "peft": _peft, "gguf-adapter": _gguf_adapter}
