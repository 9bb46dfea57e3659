"""``qlora config``: list the shipped configs, write one to start from, check a file before a run."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from qlora_native._io import as_user_error, as_write_error, user_path
from qlora_native.data.readers import hub_id
from qlora_native.errors import UserError
from qlora_native.tool.cli._run import add_to, refuse_existing, require
from qlora_native.tool.cli._start import MARGIN, ROWS, free_bytes, measured_rows, start
from qlora_native.tool.cli.estimate import card_bytes, size

DEFAULT = "smollm2"
LINEAR, ATTENTION = "all-linear", "[q_proj, k_proj, v_proj, o_proj]"
# Of the presets; note says what the chat template does.
COLUMNS = ("model", "length", "lr", "modules", "note")
PRESETS = {
    "deepseek-r1-7b": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 2048, 2e-4, LINEAR, "drops thoughts from answers"),
    "gemma-2-9b": ("google/gemma-2-9b-it", 1024, 2e-4, LINEAR, "refuses system messages, which go into the question"),
    "gemma-3-1b": ("google/gemma-3-1b-it", 1024, 3e-4, LINEAR, "puts the system message into the first question"),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", 2048, 2e-4, LINEAR, "writes a system message with a date"),
    "mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.3", 2048, 1e-4, LINEAR, "takes questions and answers in turn"),
    "mixtral-8x7b": ("mistralai/Mixtral-8x7B-Instruct-v0.1", 1024, 1e-4, ATTENTION, "takes questions, answers in turn"),
    "phi-4": ("microsoft/phi-4", 2048, 1e-4, LINEAR, "writes what it is given"),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", 2048, 2e-4, LINEAR, "writes a system message if there is none"),
    "qwen3-8b": ("Qwen/Qwen3-8B", 2048, 2e-4, LINEAR, "puts an empty thought before the last answer"),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 2048, 3e-4, LINEAR, "writes a system message of its own"),
}  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    add = add_to(parser)
    parser.usage = "qlora config list | init [NAME|MODEL] [options] | check CONFIG [--key value ...]"
    parser.add_argument("action", choices=("list", "init", "check"))
    parser.add_argument(
        "name", nargs="?", help="init: a shipped config or a model; check: a config file"
    )
    add(
        "--preset",
        list(PRESETS),
        f"init: for a family of models: {', '.join(PRESETS)}",
        metavar="NAME",
    )
    add("--gpu", "SIZE", "init MODEL: memory of the card, such as 24GB")
    add(
        "--train",
        "FILE",
        "init MODEL: the training rows, whose number and lengths choose the steps",
        type=str,
    )
    add("--out", "FILE", "init: where to write it (default: to the screen)")
    parser.epilog = f"""list shows the shipped configs. init writes one of them, {DEFAULT} unless named; or, for the
folder of a model, one whose batch size and length fit the rows and the card, or this machine.
check reports every mistake in a file at once, or prints it with all defaults filled in.

examples:
  qlora config list
  qlora config init {DEFAULT} --out config.yaml
  qlora config init --preset llama-3.1-8b --out config.yaml
  qlora config init Llama-3.1-8B-Instruct --train rows.jsonl --gpu 24GB --out config.yaml
  qlora config check config.yaml --lr 1e-4"""


CONFIGS = Path(__file__).parents[1] / "configs"


def shipped() -> dict[str, Path]:
    """The configs inside the package, by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def run(args: argparse.Namespace) -> int:
    if args.action == "check":
        _check(args)
    elif args.overrides:
        raise UserError(
            f"qlora config {args.action} takes no {args.overrides[0]}; `qlora config --help` shows its options"
        )
    elif args.action == "init":
        _init(args.preset or args.name or DEFAULT, args)
    else:
        for name, entry in shipped().items():
            first = entry.read_text(encoding="utf-8").partition("\n")[0]
            print(f"{name:<12} {first.removeprefix('# ').removesuffix(' Start it with:')}")
        print(f"--preset     {', '.join(PRESETS)}")
    return 0


def _check(args: argparse.Namespace) -> None:
    require("qlora config check", "pydantic", "yaml")
    if args.name is None:
        raise UserError("qlora config check needs a file: qlora config check config.yaml")
    from qlora_native.tool.config import TrainConfig

    config = TrainConfig.from_file(args.name, args.overrides)
    data, template = config.data, config.data.chat_template or "{"
    named = [("model", config.model), *(("data.train", path) for path in data.files)]
    named += [("data.eval", data.eval or ""), ("quant.calibration", config.quant.calibration or "")]
    on_hub = dict.fromkeys(path for _, path in named if hub_id(path))
    named += [] if "{" in template else [("data.chat_template", template)]
    for path in on_hub:
        print(f"read from the hub: {path}", file=sys.stderr)
    missing = [
        (key, path)
        for key, path in named
        if path not in {"", *on_hub} and not user_path(path).exists()
    ]
    if missing:
        raise UserError(
            *(f"{args.name}: {key} is {path}, which is not there" for key, path in missing)
        )
    sys.stdout.write(config.to_yaml())


def preset(name: str) -> str:
    """The text of a config for a family of models."""
    text = (CONFIGS / "preset.txt").read_text(encoding="utf-8")
    return text.format(name=name, **dict(zip(COLUMNS, PRESETS[name], strict=True)))


def _init(name: str, args: argparse.Namespace) -> None:
    configs, model, out = shipped(), user_path(name), args.out
    missing = ["model", "data.train"]
    if args.preset is not None:
        text, missing = preset(name), ["data.train"]
    elif model.exists() or hub_id(name):
        text = config_for(model, args.gpu, str(out or "config.yaml"), args.train)
        missing = [] if args.train else ["data.train"]
    elif args.gpu is not None or args.train is not None:
        raise UserError(
            f"{name} is no model folder: --gpu and --train fit a config to a model, as in `qlora config init FOLDER "
            "--gpu 24GB`"
        )
    elif name in configs:
        text = configs[name].read_text(encoding="utf-8")
    else:
        near = difflib.get_close_matches(name, configs, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(configs)}"
        raise UserError(f"there is no shipped config {name!r}; {hint}, or give the folder of a model")
    if out is None:
        sys.stdout.write(text)
        return
    text = text.replace(f"{name}.yaml", str(out))
    refuse_existing(out, "--out")
    with as_write_error(out), out.open("x", encoding="utf-8") as file:
        file.write(text)
    command = text.splitlines()[1].removeprefix("#").strip()
    then = f"set {' and '.join(missing)} in it, then" if missing else "now"
    print(f"{out} is written; {then}: {command}")


def config_for(model: Path, gpu: str | None, name: str, train: str | None = None) -> str:
    """The text of a config for a model on a card, or on the CPU of this machine, and for the rows of ``train``.
    UserError if no row fits."""
    require("qlora config init MODEL", "transformers", "yaml", "pydantic")
    from qlora_native.tool.config import TrainConfig
    from qlora_native.tool.estimate import Estimator, Setting
    from qlora_native.tool.estimate.model import opened
    from qlora_native.weights.config import four_bit_config
    from qlora_native.weights.open import notes_of
    from qlora_native.weights.stream import AUTO, Source

    if gpu is not None:
        device, limit, where = "cuda", card_bytes(gpu), f"a card of {gpu}"
    else:
        device, limit, where = "cpu", free_bytes("cpu"), "the free memory of this machine"
    rows = {}
    if train is not None:
        config = TrainConfig.from_values(
            {"model": str(model), "data": {"train": train, "max_length": 1 << 20}}
        )
        rows = dict(zip(("rows", "longest"), measured_rows(config), strict=True))
    with as_user_error():
        source = opened(model)
        estimator = Estimator(source, Setting(device=device))
    if isinstance(source, Source):
        notes, is_as_it_is = notes_of(source), source.has_four_bit_weights or source.keeps(AUTO)
    else:
        notes, is_as_it_is = [], four_bit_config(source, model) is not None
    chosen = start(estimator, limit, **rows)
    estimate, optimizer = chosen.estimate, chosen.optimizer
    setting, needed = estimate.setting, size(estimate.total + estimate.reserve)
    if not chosen.fits:
        raise UserError(
            f"{model} does not fit {where}: a row of {setting.length} tokens takes {needed} of "
            f"{size(limit)}; take a larger card or a smaller model"
        )
    step = estimate.moments["step"]  # while the peak may be that of loading
    weights = step.weights + step.scales + step.dense
    usable = int(MARGIN * limit)
    longest, widest = estimator.longest(usable, 1), estimator.widest(usable, setting.length)
    here = {
        name: getattr(setting, name) for name in ("batch_size", "length", "optimizer", "micro_batches")
    }
    all_kept = size(estimator.at(checkpointing=False, **here).total)
    counted = f"for the {rows['rows']:,} rows" if rows else f"for some {ROWS:,} rows"
    quant = f"# The weights stay as they are in {model.name}: {size(weights)}.\n"
    if not is_as_it_is:
        quant = f"""quant:
  type: nf4                   # {size(weights)} of weights in all, embeddings in 16 bits
  block_size: 64              # weights that share a scale
  double_quant: true          # false keeps the scales in fp32, for {size(3 * step.scales)} more
  method: wmse                # the training rows choose the scales; rtn starts at once, and is taken if they are few
"""
    about, out = "".join(f"# {note}\n" for note in notes), model.name.removesuffix(".gguf")
    return f"""# {model.name} on {where}: {needed} of {size(limit)} by `qlora estimate`. Start it with:
#   qlora train {name}
# `qlora train --help` lists every key; those left out here keep their defaults.
{about}
model: {model}
output_dir: {out}-qlora  # gets adapter/, best/, step-000100/ ..., metrics.jsonl and report.html

data:
  train: {train or "train.jsonl":<20} # one JSON object per line; `qlora train --help` names the formats
  eval_fraction: 0.05         # rows held out to measure what was learned; or name a file with `eval:`
  max_length: {chosen.max_length:<16}# up to {longest:,} tokens fit with batch_size 1; longer rows are truncated
  train_on: answers           # all = learn the questions too: only for plain text

{quant}
lora:
  r: {setting.lora.r:<25}# {step.adapters / 4e6:,.1f} million trained weights, {size(2 * step.adapters)} with gradients
  alpha: 32                   # 2 * r is the usual start
  dropout: 0.0                # 0.05 to 0.1 helps on small data
  target_modules: all-linear  # attention alone, [q_proj, v_proj], trains less and learns less

train:
  epochs: {chosen.epochs:<20}# {counted}; more as long as the held-out loss falls: best/ has the best
  batch_size: {chosen.batch_size:<16}# rows in memory at once; up to {widest:,} fit
  grad_accum: {chosen.grad_accum:<16}# a step learns from {chosen.batch_size * chosen.grad_accum} rows, in as many parts
  eval_every: {chosen.eval_every:<16}# steps between evaluations on the held-out rows
  optimizer: {optimizer:<17}# its states take {size(step.optimizer)}; adamw8bit keeps them in a quarter of adamw's
  paged: auto                 # if memory runs short they wait elsewhere: slower, no crash
  lr: 2e-4                    # halve it if the loss jumps about
  grad_checkpointing: true    # false is about a third faster and takes {all_kept} here
  dtype: auto                 # of activations and of what is not 4-bit: bfloat16, or float16 on a card without it
"""
