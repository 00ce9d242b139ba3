"""What in a Python source could run code that comes from a file, found in its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator

UNPICKLING = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
FETCHING = ("torch.hub", "torch.package")
CALLS = {
    "unpickles": "torch.load torch.jit.load torch.export.load torch.serialization.load pandas.read_pickle",
    "makes objects of YAML": "yaml.unsafe_load yaml.unsafe_load_all yaml.full_load yaml.full_load_all",
    "runs text": "eval exec compile builtins.eval builtins.exec builtins.compile",
    "runs a shell": "os.system os.popen subprocess.getoutput subprocess.getstatusoutput "
    "asyncio.create_subprocess_shell",
}
FORBIDDEN = {name: why for why, names in CALLS.items() for name in names.split()}
"""Functions that may not be named, under any alias."""
ONLY = {
    "trust_remote_code": "False",
    "allow_pickle": "False",
    "shell": "False",
    "weights_only": "True",
    "use_safetensors": "True",
}
"""Arguments with one safe value; any other value is unsafe, a variable too."""
SAFE_LOADERS = ("yaml.SafeLoader", "yaml.CSafeLoader")
NO_WEIGHTS = ("Tokenizer", "TokenizerFast", "Config", "Processor")
"""Endings of the classes whose from_pretrained reads no weights."""


def aliases(tree: ast.AST) -> dict[str, str]:
    """Local names of what a file imports, in any scope: ``from torch import load as l`` gives ``l: torch.load``."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.asname and alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: full or name for name, full in names.items()}


def imported(node: ast.AST, names: dict[str, str]) -> list[str]:
    """The dotted names that a node imports, by a statement or by a call."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    by_call = ("importlib.import_module", "__import__", "builtins.__import__", "runpy.run_module")
    if isinstance(node, ast.Call) and dotted(node.func, names) in by_call and node.args:
        return [str(node.args[0].value)] if isinstance(node.args[0], ast.Constant) else []
    return []


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """``t.load`` as ``torch.load`` where t is torch; ``getattr(torch, "load")`` too; empty where there is no name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names) or '?'}.{node.attr}"
    if isinstance(node, ast.Call) and dotted(node.func, names) == "getattr" and len(node.args) > 1:
        attribute = node.args[1]
        return f"{dotted(node.args[0], names)}.{attribute.value}" if isinstance(attribute, ast.Constant) else ""
    if isinstance(node, ast.Call):
        return (imported(node, names) or [""])[0]
    return ""


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def settings(node: ast.AST) -> dict[str, ast.expr]:
    """Keyword arguments of a call, and the entries of a dict that may become some."""
    if isinstance(node, ast.Call):
        return {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {str(key.value): value for key, value in pairs if isinstance(key, ast.Constant)}
    return {}


def unsafe(source: str) -> Iterator[str]:
    """What could run code that comes from a file, one line each."""
    tree = ast.parse(source)
    names = aliases(tree)
    for node in ast.walk(tree):
        name, given = dotted(node, names), settings(node)
        for what in [*imported(node, names), name]:
            if within(what, (*UNPICKLING, *FETCHING)):
                yield f"{what} runs code from a file"
            elif what in FORBIDDEN:
                yield f"{what} {FORBIDDEN[what]}"
        for option, value in given.items():
            if ast.unparse(value) != ONLY.get(option, ast.unparse(value)):
                yield f"{option}={ast.unparse(value)}"
        called = dotted(node.func, names) if isinstance(node, ast.Call) else ""
        loader = given.get("Loader", next(iter(node.args[1:]), None) if called else None)
        if called in ("yaml.load", "yaml.load_all") and (not loader or dotted(loader, names) not in SAFE_LOADERS):
            yield f"{called} without SafeLoader"
        elif "Loader" in given and dotted(given["Loader"], names) not in SAFE_LOADERS:
            yield f"Loader={ast.unparse(given['Loader'])}"
        if called.endswith("load_dataset") and "trust_remote_code" not in given:
            yield f"{called} without trust_remote_code"
        if (owner := called.removesuffix(".from_pretrained")) != called:
            needed = ["trust_remote_code", *([] if owner.endswith(NO_WEIGHTS) else ["use_safetensors"])]
            yield from (f"{called} without {option}" for option in needed if option not in given)
