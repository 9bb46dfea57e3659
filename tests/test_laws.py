"""The tree obeys laws.py; each law finds a breach and passes sound code."""

from __future__ import annotations

import inspect
import subprocess
import sys

import laws
import pytest
from laws import Law, Tree

P = laws.PACKAGE
# A breach of each law. A law that finds nothing here could not fail.
BREACHES: list[tuple[Law, Tree]] = [
    (laws.includes_point_one_way, {"cpp/core/a.h": '#include "cpu/b.h"\n', "cpp/cpu/b.h": ""}),
    (laws.includes_point_one_way, {"cpp/cpu/a.cc": '#include "../../cuda/b.h"\n', "cuda/b.h": ""}),
    (laws.includes_point_one_way, {"cuda/a.cu": '#include "cpu/b.h"\n', "cpp/cpu/b.h": ""}),
    (laws.includes_point_one_way, {"cpp/cpu/a.cc": '#include "cpu/gone.h"\n'}),
    (laws.includes_point_one_way, {"cpp/core/a.h": "#include <omp.h>\n"}),
    (laws.includes_point_one_way, {"cpp/cpu/a.h": "#include <pybind11/pybind11.h>\n"}),
    (laws.no_torch_header, {"cpp/python/a.cc": "#include <torch/extension.h>\n"}),
    (laws.no_torch_header, {"cuda/a.cu": '#include "c10/cuda/CUDAStream.h"\n'}),
    (laws.cuda_calls_only_in_cuda, {"cpp/cpu/a.cc": "  cudaMemcpy(a, b, 4);\n"}),
    (laws.cuda_calls_only_in_cuda, {"cpp/python/a.cc": "#include <cuda_runtime.h>\n"}),
    (laws.inline_assembly_only_in_wp, {"cuda/linear_4bit.cuh": '  asm volatile("cp.async;");\n'}),
    (laws.inline_assembly_only_in_wp, {"cpp/cpu/a.cc": '  __asm__("nop");\n'}),
    (laws.openmp_only_in_parallel, {"cpp/cpu/a.cc": "  return omp_get_max_threads();\n"}),
    (laws.openmp_only_in_parallel, {"cpp/python/a.cc": "#pragma omp parallel for\n"}),
    (laws.architecture_branches_only_in_wp, {"cuda/linear_4bit.cu": "#if __CUDA_ARCH__ >= 800\n"}),
    (laws.architecture_branches_only_in_wp, {"cpp/core/a.h": "#if __CUDA_ARCH__ >= 800\n"}),
    (laws.architecture_branches_only_in_wp, {"cuda/linear_4bit.cuh": "#ifdef FAST\n"}),
    (laws.no_abort_on_user_input, {"cpp/cpu/a.cc": "  assert(n > 0);\n"}),
    (laws.no_abort_on_user_input, {"cpp/cpu/a.cc": "  std::abort();\n"}),
    (laws.launchers_never_synchronize, {"cuda/a.cu": "  cudaStreamSynchronize(stream);\n"}),
    (laws.imports_point_one_way, {P + "ops.py": "from . import nn\n", P + "nn.py": ""}),
    (laws.imports_point_one_way, {P + "ops/a.py": "from ..lora import x\n", P + "lora/__init__.py": ""}),
    (
        laws.imports_point_one_way,
        {P + "nn.py": "def f():\n import qlora_native.tool.cli.main\n", P + "tool/cli/main.py": ""},
    ),
    (laws.imports_point_one_way, {P + "lora.py": "from . import __version__\n"}),
    (laws.imports_point_one_way, {P + "__init__.py": "from .tool import train\n", P + "tool/train.py": ""}),
    (laws.imports_point_one_way, {P + "a_new_room.py": ""}),
    (
        laws.units_do_not_import_each_other,
        {P + "data/a.py": "from ..tool import train\n", P + "tool/train/b.py": "from ...data import a\n"},
    ),
    (
        laws.units_do_not_import_each_other,
        {
            P + "__init__.py": "_LAZY = {'Quantizer': 'interop.quantizer'}\n",
            P + "export.py": "import qlora_native as qn\nqn.Quantizer\n",
            P + "interop/quantizer.py": "from .. import export\n",
        },
    ),
    (
        laws.files_do_not_import_each_other,
        {P + "nn/a.py": "from .b import B\n", P + "nn/b.py": "def f():\n from . import a\n"},
    ),
    (
        laws.files_do_not_import_each_other,
        {P + "nn/a.py": "if TYPE_CHECKING:\n from .b import B\n", P + "nn/b.py": "from .a import A\n"},
    ),
    (
        laws.train_is_imported_by_its_commands,
        {P + "tool/cli/chat.py": "from ..train import loop\n", P + "tool/train/loop.py": ""},
    ),
    (laws.core_needs_only_the_core_packages, {P + "lora.py": "def f():\n    from transformers import X\n"}),
    (laws.core_needs_only_the_core_packages, {P + "nn.py": "import scipy.stats\n"}),
    (laws.core_needs_only_the_core_packages, {P + "load.py": "import bitsandbytes\n"}),
    (laws.one_stem_per_op, {P + "ops/_library.py": "SCHEMAS = {'a_4bit': '() -> ()'}\n", P + "ops/a_4bit.py": ""}),
    (laws.one_stem_per_op, {P + "ops/_library.py": "SCHEMAS = {'a_4bit': ''}\n", "tests/test_a_4bit.py": ""}),
    (laws.one_stem_per_op, {"cpp/cpu/a_4bit.h": "", "cpp/cpu/a_4bit.cc": "", "cpp/python/bind_a_4bit.cc": ""}),
    (laws.one_stem_per_op, {"cuda/a_4bit.h": "", "cuda/a_4bit.cuh": "", "cuda/a_4bit.cu": ""}),
    (laws.package_keeps_its_budget, {P + "a.py": "x = 1\n" * 80_000}),
    (laws.package_keeps_its_budget, {P + "a.py": "x = [1, 2, 3, 4, 5, 6, 7]\n"}),
    (laws.no_file_over_500_lines, {"cuda/a.cuh": "\n" * 501}),
    (laws.nf4_levels_only_in_core, {"cuda/a.cuh": ", ".join(f"0.{digits}f" for digits in (6962, 5251, 3949))}),
    (laws.no_machine_paths, {"docs/a.md": "see " + "/".join(["", "work", "main"])}),
    (laws.no_machine_paths, {"docs/a.md": "see " + ".".join(["pypi", "org"])}),
    (laws.no_machine_paths, {"docs/a.md": "see " + ".".join(["pytorch", "org/whl/cu130"])}),
    (laws.pages_have_short_lines, {"docs/reference/a.md": "word " * 30 + "\n"}),
    (laws.pages_have_short_lines, {"README.md": "```\ncode\n```\n" + "word " * 30 + "\n"}),
    (laws.no_unfinished_marks, {"cpp/cpu/a.cc": "// TO" + "DO: the tail\n"}),
    (laws.plain_words, {"docs/a.md": "as To" + "ld above\n"}),
    (laws.plain_words, {P + "ops.py": "un" + "tol" + "d_ranks = beh" + "eld\n"}),
    (laws.plain_words, {"docs/b.md": "the rooms of the package\n"}),
    (laws.plain_words, {"CONTRIBUTING.md": "a bug of ours\n"}),
    (
        laws.sentences_belong_to_tests,
        {"tests/sentences.json": '{"test_a.py::test_gone[1]": []}', "tests/test_a.py": ""},
    ),
    (
        laws.sentences_stand_in_one_file,
        {"tests/test_a.py": "with raises(E, match=rf'a {key} is 3, but this {name} has none'): ...\n"},
    ),
    (laws.sentences_stand_in_one_file, {"tests/a.py": "assert 'it (this line) has \\'six\\' words' in out\n"}),
    (laws.sentences_stand_in_one_file, {"tests/a.py": "mark.parametrize('x', [(1, 'a rank must be above zero')])\n"}),
    (laws.environment_is_on_one_page, {"cpp/cpu/a.cc": 'getenv("QLORA_NATIVE_SECRET")', "docs/environment.md": ""}),
    (laws.environment_is_on_one_page, {P + "ops.py": 'os.environ.get("QLORA_NATIVE_SECRET")'}),
]

# What the laws allow, so that none of them fails on everything.
ALLOWED: Tree = {
    "cpp/core/layout.h": "#include <cstdint>\n#if defined(__CUDA_ARCH__)\n#endif\nstatic_assert(sizeof(int) == 4);\n",
    "cpp/cpu/quantize_4bit.h": '#include "core/layout.h"\n',
    "cpp/cpu/quantize_4bit.cc": '#include "cpu/quantize_4bit.h"\n#include <unistd.h>\n',
    "cpp/cpu/parallel.h": "#include <omp.h>\n#pragma omp parallel\n  f(omp_get_thread_num());\n",
    "cpp/python/bind_quantize_4bit.cc": '#include <pybind11/pybind11.h>\n#include "cpu/quantize_4bit.h"\n',
    "cuda/python/bind_quantize_4bit.cc": '#include "cuda/quantize_4bit.h"\n',
    "cuda/wp.cuh": '#if __CUDA_ARCH__ >= 800\n  asm volatile("cp.async;");\n#endif\n',
    "cuda/quantize_4bit.h": "",
    "cuda/quantize_4bit.cuh": "",
    "cuda/quantize_4bit.cu": '#include "core/layout.h"\n#include "wp.cuh"\n  f<<<1, 2>>>(x);\n',
    P + "ops/__init__.py": "from . import quantize_4bit\n",
    P + "ops/_library.py": "SCHEMAS: dict = {'quantize_4bit': '', 'quantize_4bit_grad_x': ''}\n",
    P + "ops/quantize_4bit.py": "import torch\nfrom .. import reference\n",
    P + "reference.py": "from __future__ import annotations\nimport math\n",
    P + "lora.py": "if TYPE_CHECKING:\n    from transformers import X\n    from . import cli\n",
    P + "models/load.py": "import transformers\nfrom ..lora import x\n",
    P + "nn.py": "from . import ops",
    P + "bitsandbytes/nn.py": "from ..nn import QuantizedLinear\n",
    P + "__init__.py": "_LAZY = {'load_model': 'models.load'}\ndef f():\n    from . import models\n",
    P + "tool/cli/main.py": "import qlora_native as qn\nfrom ...models import load\nqn.load_model\n",
    "tests/test_quantize_4bit.py": "def test_bytes(x): ...\n",
    "tests/test_export.py": "assert 'five words stand in a\\nline' in x, 'and six of them in the message'\n",
    "tests/sentences.json": '{"test_quantize_4bit.py::test_bytes[a::b]": []}',
    "docs/a.md": "at https://example.com/work, or pytorch.org/whl/cpu, with a loss of 0.6962\n",
    "docs/b.md": "".join(f"{text}\n" for text in ("| " * 90, "~~~", "x" * 130, "~~~", "https://a.com/" + "b" * 130)),
}
LAWS = list(dict.fromkeys(law for law, _ in BREACHES))


def law_name(value: object) -> str:
    return next((name for name, law in vars(laws).items() if law is value), "")


@pytest.mark.parametrize("law", LAWS, ids=law_name)
def test_the_tree_obeys(law: Law) -> None:
    breaches = law(laws.tree())
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize(("law", "breach"), BREACHES, ids=law_name)
def test_the_law_sees_a_breach(law: Law, breach: Tree) -> None:
    assert law(breach)


@pytest.mark.parametrize("law", LAWS, ids=law_name)
def test_the_law_lets_sound_code_pass(law: Law) -> None:
    assert law(ALLOWED) == []


def test_the_tree_is_read() -> None:
    files = laws.tree()
    assert {"README.md", P + "errors.py", "cpp/core/codebook.h"} <= set(files)
    assert not any(path.startswith(("build/", ".ci-venv/")) for path in files)


def test_import_and_help_bring_only_the_core_packages() -> None:
    """Both must work, and stay quick, with nothing but torch, numpy and safetensors installed."""
    script = (
        "import sys\nfrom qlora_native.tool.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'transformers', 'peft', 'trl', 'datasets', "
        "'accelerate', 'bitsandbytes', 'pydantic', 'rich', 'yaml'})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=laws.ROOT / "tests")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "set()"), done.stderr


def missing_docstrings(names: dict[str, object]) -> list[str]:
    """Functions and classes without a docstring of their own; a dataclass's made-up signature is not one."""
    return [
        name
        for name, value in names.items()
        if inspect.isroutine(value) or inspect.isclass(value)
        if not (value.__doc__ or "").strip() or str(value.__doc__).startswith(f"{name}(")
    ]


def test_every_public_name_has_a_docstring() -> None:
    import qlora_native

    assert missing_docstrings({name: getattr(qlora_native, name) for name in qlora_native.__all__}) == []


def test_a_missing_docstring_is_seen() -> None:
    def bare() -> None: ...

    assert missing_docstrings({"bare": bare, "documented": missing_docstrings}) == ["bare"]
