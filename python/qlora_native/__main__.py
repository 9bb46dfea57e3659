"""``python -m qlora_native``: the command line ``qlora``, for ``torchrun -m`` and where scripts are not on the path."""

from qlora_native.tool.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
