"""``python -m qlora_native``: the same command line as ``qlora``, for ``torchrun -m`` and for environments without scripts."""

from qlora_native.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
