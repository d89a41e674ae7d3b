"""People run the exported code with trust_remote_code: it must not reach beyond the model, at import or in forward."""

import ast

import pytest

from kimi_linear.hub_card.code_flattening import flatten_sources

# Modules of the standard library without files, processes, network, serialisation or interpreter internals.
HARMLESS_MODULES = {
    "__future__", "abc", "bisect", "collections", "contextlib", "copy", "dataclasses", "enum", "functools", "hashlib",
    "inspect", "itertools", "json", "math", "numbers", "operator", "re", "threading", "types", "typing", "warnings",
    "weakref",
}  # fmt: skip
PACKAGES = {"torch", "transformers", "safetensors", "triton", "fla", "compressed_tensors"}
# What of these packages downloads, compiles, loads pickles or talks to other machines.
DENIED_SUBMODULES = (
    "torch.hub", "torch.package", "torch.serialization", "torch.distributed", "torch.multiprocessing",
    "torch.utils.cpp_extension", "torch.utils.model_zoo", "torch._inductor.codecache", "transformers.utils.hub",
    "transformers.dynamic_module_utils", "transformers.file_utils", "triton.runtime.cache",
)  # fmt: skip
# Adding up counts over a process group that the user has opened; nothing else of torch.distributed, whose object
# collectives pickle and whose initialisation opens connections.
ALLOWED_IN_DENIED = {f"torch.distributed.{name}" for name in ("is_available", "is_initialized", "all_reduce")}
# Cuts a tensor for a process group that the user has opened, where the parameter that it fills is cut.
ALLOWED_IN_DENIED.add("torch.distributed.tensor.distribute_tensor")
DENIED_BUILTINS = {
    "eval", "exec", "compile", "open", "input", "breakpoint", "globals", "locals", "vars", "memoryview",
    "__import__", "__builtins__", "__loader__", "__spec__",
}  # fmt: skip
DENIED_ATTRIBUTES = {
    "environ", "putenv", "unsetenv", "system", "popen", "Popen", "fork", "spawn", "kill", "execv", "hub", "socket",
    "write_text", "write_bytes", "unlink", "rmtree", "rename", "touch", "mkdir", "makedirs", "tofile", "fromfile",
    "from_file", "urlopen", "urlretrieve", "load_state_dict_from_url", "load_inline", "load_library", "cpp_extension",
    "import_module", "find_class", "from_pretrained", "save_pretrained", "push_to_hub", "save_file", "load_file",
    "__import__", "__builtins__", "__globals__", "__subclasses__", "__code__", "__loader__", "__reduce__",
}  # fmt: skip
# Functions of torch that read or write pickles, and those that change settings of the whole process.
DENIED_TORCH = ("save", "load", "manual_seed", "seed", "use_deterministic_algorithms")
# `KimiLinearCache.save(path)` writes one file, where its caller says, in a format that holds tensors and text only.
# The model's `save_pretrained` is transformers' own, of another state.
ALLOWED_BY_FILE = {
    "cache_snapshots.py": "imports safetensors.torch.save_file",
    "checkpoint_mixin.py": ("reaches for super().save_pretrained", "reaches for super().from_pretrained"),
    # Looks for libraries that are loaded already, and reads what a wrapped forward closes over; it runs neither.
    "plain_modules.py": ("imports sys", "reaches for function.__code__"),
}


def root_of(node: ast.AST) -> str | None:
    """The name at the start of `name.attribute[index]...`."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def violations(text: str) -> list[str]:
    """What in a module could reach beyond the model, as `line: reason`."""
    tree = ast.parse(text)
    found, imported = [], set()

    def report(node: ast.AST, reason: str) -> None:
        found.append(f"{node.lineno}: {reason}")

    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{name}" for name in modules]
            for module in modules:
                if module.split(".")[0] not in HARMLESS_MODULES | PACKAGES:
                    report(node, f"imports {module}")
                if f"{module}.".startswith(tuple(f"{denied}." for denied in DENIED_SUBMODULES)):
                    report(node, f"imports {module}")
                if module.rpartition(".")[2] in DENIED_ATTRIBUTES or module in {f"torch.{n}" for n in DENIED_TORCH}:
                    report(node, f"imports {module}")
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    named = [node for node in attributes if ast.unparse(node) in ALLOWED_IN_DENIED]
    allowed = {id(part) for node in named for part in ast.walk(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in DENIED_BUILTINS:
            report(node, f"names {node.id}")
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if node.attr in DENIED_ATTRIBUTES or (dotted in DENIED_SUBMODULES and id(node) not in allowed):
                report(node, f"reaches for {dotted}")
            if root_of(node) == "torch" and (node.attr in DENIED_TORCH or node.attr.startswith("set_")):
                report(node, f"reaches for {dotted}")
            if isinstance(node.ctx, (ast.Store, ast.Del)) and root_of(node) in imported:
                report(node, f"changes {dotted}")
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if root_of(node) in imported:
                report(node, f"changes {ast.unparse(node)}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("setattr", "delattr") and root_of(node.args[0]) in imported:
                report(node, f"changes {ast.unparse(node.args[0])}")
            if node.func.id == "getattr" and root_of(node.args[0]) in imported:
                name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
                if name is None or name in DENIED_ATTRIBUTES | DENIED_BUILTINS | set(DENIED_TORCH):
                    report(node, f"looks up {ast.unparse(node)}")
    return found


def test_exported_code_stays_within_the_model():
    found = {name: violations(text) for name, text in flatten_sources().items()}
    for name, allowed in ALLOWED_BY_FILE.items():
        found[name] = [reason for reason in found[name] if not reason.endswith(allowed)]
    assert {name: reasons for name, reasons in found.items() if reasons} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "import socket",
        "import urllib.request",
        "from requests import get",
        "import subprocess as sp",
        "from os import system",
        "import os; os.environ['A'] = '1'",
        "import pickle",
        "from ctypes import CDLL",
        "import importlib",
        "import builtins",
        "from pathlib import Path",
        "import huggingface_hub",
        "import kimi_linear",
        "open('x', 'w')",
        "eval('1')",
        "f = exec",
        "compile('1', '', 'eval')",
        "__import__('os')",
        "(lambda: 0).__globals__",
        "().__class__.__base__.__subclasses__()",
        "import torch; torch.load('x')",
        "import torch; torch.save({}, 'x')",
        "from torch import load",
        "import torch; torch.hub.load('a', 'b')",
        "from torch import hub",
        "import torch.utils.cpp_extension",
        "from torch.utils import cpp_extension",
        "from torch.utils.cpp_extension import load_inline",
        "from torch.distributed import rpc",
        "from torch.distributed import all_reduce",
        "import torch; torch.distributed.init_process_group()",
        "import torch; torch.distributed.all_gather_object([], 1)",
        "import torch; d = torch.distributed",
        "import torch; torch.set_default_dtype(torch.float16)",
        "import torch; torch.backends.cuda.matmul.allow_tf32 = True",
        "import torch; torch.manual_seed(0)",
        "import torch; torch.nn.Linear.forward = None",
        "import torch; setattr(torch, 'relu', None)",
        "import torch; getattr(torch, 'lo' + 'ad')('x')",
        "import torch; getattr(torch, 'load')('x')",
        "import transformers.models.kimi_linear as m; del m.x",
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\nALL_ATTENTION_FUNCTIONS['sdpa'] = 1",
        "from transformers.utils.hub import cached_file",
        "from transformers import AutoModel\nAutoModel.from_pretrained('x')",
        "import torch\ntorch.zeros(1).numpy().tofile('x')",
    ],
)
@pytest.mark.parametrize("wrapper", ["{}", "class A:\n    def forward(self):\n        {}"])
def test_the_walk_finds_planted_violations(planted, wrapper):
    indent = wrapper.rpartition("\n")[2].removesuffix("{}")
    assert violations(wrapper.format(planted.replace("\n", "\n" + indent)))


def test_the_walk_passes_ordinary_model_code():
    text = """
import torch, re
from torch import nn
from .part import helper
re.compile("a")
class A(nn.Module):
    def forward(self, x):
        self.x = x
        x[0] = 1
        setattr(self, "y", 1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(x)
        return torch.compile(helper)(getattr(self, "x"))
"""
    assert violations(text) == []


def test_import_and_forward_touch_nothing_in_a_watched_process(isolated_report):
    assert isolated_report["events"] == []
