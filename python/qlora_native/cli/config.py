"""``qlora config``: list the shipped configs, write one to start from, check a file before a run."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from qlora_native.errors import UserError

DEFAULT = "smollm2"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the three actions."""
    parser.usage = "qlora config list | init [NAME|MODEL] [--gpu SIZE] [--out FILE] | check CONFIG [--key value ...]"
    parser.add_argument("action", choices=("list", "init", "check"))
    parser.add_argument("name", nargs="?", help="init: a shipped config or a model; check: a config file")
    parser.add_argument("--gpu", metavar="SIZE", help="init MODEL: memory of the card, such as 24GB")
    parser.add_argument("--out", metavar="FILE", help="init: where to write it (default: to the screen)")
    parser.epilog = f"""list shows the shipped configs. init writes one of them, {DEFAULT} unless named; or, for the
folder of a model, one whose batch size and length fit the card, or this machine.
check reports every mistake in a file at once, or prints it with all defaults filled in.

examples:
  qlora config list
  qlora config init {DEFAULT} --out config.yaml
  qlora config init Llama-3.1-8B-Instruct --gpu 24GB --out config.yaml
  qlora config check config.yaml --lr 1e-4"""


def shipped() -> dict[str, Path]:
    """The configs inside the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))}


def run(args: argparse.Namespace) -> int:
    """One of the three actions."""
    if args.action == "check":
        return _check(args)
    if args.overrides:
        raise UserError(
            f"qlora config {args.action} takes no {args.overrides[0]}; `qlora config --help` shows its options"
        )
    if args.action == "list":
        for name, entry in shipped().items():
            first = entry.read_text(encoding="utf-8").partition("\n")[0]
            print(f"{name:<12} {first.removeprefix('# ').removesuffix(' Start it with:')}")
        return 0
    return _init(args.name or DEFAULT, args.out, args.gpu)


def _init(name: str, out: str | None, gpu: str | None) -> int:
    configs = shipped()
    if Path(name).expanduser().exists():
        from qlora_native.cli.config_for import config_for

        text = config_for(Path(name).expanduser(), gpu, out or "config.yaml")
    elif gpu is not None:
        raise UserError(
            f"{name} is no model folder: --gpu fits a config to a model, as in `qlora config init FOLDER --gpu 24GB`"
        )
    elif name in configs:
        text = configs[name].read_text(encoding="utf-8")
    else:
        near = difflib.get_close_matches(name, configs, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(configs)}"
        raise UserError(f"there is no shipped config {name!r}; {hint}, or give the folder of a model")
    if out is None:
        sys.stdout.write(text)
        return 0
    try:
        with Path(out).open("x", encoding="utf-8") as file:
            text = text.replace(f"{name}.yaml", out)
            file.write(text)
    except FileExistsError:
        raise UserError(f"{out} exists already; choose another --out or remove it") from None
    except OSError as error:
        raise UserError(f"could not write {out}: {error.strerror}") from error
    start = text.splitlines()[1].removeprefix("#").strip()
    print(f"{out} is written; set model and data.train in it, then: {start}")
    return 0


def _check(args: argparse.Namespace) -> int:
    if args.name is None:
        raise UserError("qlora config check needs a file: qlora config check config.yaml")
    from qlora_native.train.config import TrainConfig

    config = TrainConfig.from_file(args.name, args.overrides)
    sys.stdout.write(config.to_yaml())
    return 0
