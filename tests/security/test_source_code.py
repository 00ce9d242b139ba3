"""Nothing in the source can run code that comes from a file, and the package starts no other program."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from audit import aliases, imported, unsafe, within

ROOT = Path(__file__).resolve().parents[2]


SOURCES = ("src", "scripts", "benchmarks", "examples")
"""Not tests: they make the hostile pickles that the commands have to refuse."""
FILES = sorted(path for part in SOURCES for path in (ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_no_source_can_be_made_to_run_what_it_reads(path):
    assert list(unsafe(path.read_text(encoding="utf-8"))) == []


STARTS = {ROOT / "src" / "tether" / name for name in ("rewards/grader.py", "labellers/program.py")}
"""The first starts a program of the package, the second one that the command line names, without a shell. To both, what
a model wrote is data on standard input (test_graders.py, test_labellers.py)."""


def test_the_package_starts_no_other_program():
    """So it cannot run what a model wrote. A reward function that does is the user's code."""
    for path in set((ROOT / "src").rglob("*.py")) - STARTS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = aliases(tree)
        found = [name for node in ast.walk(tree) for name in imported(node, names)]
        assert not [name for name in found if within(name, ("subprocess", "multiprocessing", "pty", "code", "runpy"))]


LOAD = "AutoModel.from_pretrained(n, trust_remote_code=False, use_safetensors=True)"
RULES = {
    # rule: (must be caught, must not be)
    "import": ("import pickle", "import json"),
    "import, dotted": ("import os, dill.source", "import torch.nn"),
    "import, in a function": ("def f():\n    from joblib import load", "def f():\n    from json import load"),
    "import, of a module from": ("from torch import hub", "from torch import nn"),
    "import, by name": ("import importlib\nimportlib.import_module('shelve')", "importlib.import_module(source)"),
    "import, by alias": ("from importlib import import_module as i\ni('marshal')", "i('marshal')"),
    "import, by dunder": ("__import__('cloudpickle').loads(b)", "__import__('json').loads(b)"),
    "torch.load": ("import torch\ntorch.load('x', weights_only=True)", "safetensors.torch.load_file('x')"),
    "torch.load, of an alias": ("import torch as t\nt.load('x')", "import thing as t\nt.load('x')"),
    "torch.load, imported": ("from torch import load", "from json import load\nload(f)"),
    "torch.load, renamed": ("import torch\nread = torch.load", "read = json.load"),
    "torch.load, by getattr": ("import torch\ngetattr(torch, 'load')('x')", "getattr(torch, 'float32')"),
    "torch.jit.load": ("from torch import jit\njit.load('x')", "from torch import jit\njit.script(f)"),
    "torch.hub": ("import torch\ntorch.hub.load('a/b', 'c')", "import torch\ntorch.compile(f)"),
    "numpy.load": ("import numpy as np\nnp.load('x', allow_pickle=True)", "np.load('x', allow_pickle=False)"),
    "pandas": ("import pandas as pd\npd.read_pickle('x')", "import pandas as pd\npd.read_csv('x')"),
    "yaml.load": ("import yaml\nyaml.load(text)", "import yaml\nyaml.safe_load(text)"),
    "yaml.load, a loader": ("import yaml\nyaml.load(t, yaml.Loader)", "import yaml\nyaml.load(t, yaml.SafeLoader)"),
    "yaml.unsafe_load": ("from yaml import unsafe_load", "from yaml import safe_load"),
    "yaml.full_load": ("import yaml as y\ny.full_load(t)", "import yaml as y\ny.safe_load_all(t)"),
    "Loader": ("import yaml\nyaml.scan(t, Loader=yaml.Loader)", "import yaml\nyaml.scan(t, Loader=yaml.SafeLoader)"),
    "eval": ("eval(text)", "model.eval()"),
    "exec": ("exec(compile(t, 'f', 'exec'))", "loader.exec_module(module)"),
    "compile": ("import builtins\nbuiltins.compile(t, 'f', 'exec')", "import re\nre.compile(t)"),
    "os.system": ("from os import system", "import os\nos.replace(a, b)"),
    "shell": ("subprocess.run(line, shell=True)", "subprocess.run([a, b], check=True)"),
    "shell, a variable": ("subprocess.run(line, shell=flag)", "subprocess.run([a, b], shell=False)"),
    "weights_only": ("f(weights_only=False)", "f(weights_only=True)"),
    "use_safetensors": ("f(use_safetensors=None)", "f(use_safetensors=True)"),
    "trust_remote_code": ("f(trust_remote_code=True)", "f(trust_remote_code=False)"),
    "trust_remote_code, a variable": ("f(trust_remote_code=options.trust)", "trust = False"),
    "trust_remote_code, in a dict": ("f(**{'trust_remote_code': True})", "f(**{'trust_remote_code': False})"),
    "from_pretrained": ("AutoModel.from_pretrained(n)", LOAD),
    "load_dataset": ("datasets.load_dataset(n)", "datasets.load_dataset(n, trust_remote_code=False)"),
    "from_pretrained, safetensors": ("auto.from_pretrained(n, trust_remote_code=False)", LOAD),
    "from_pretrained, tokenizer": (
        "AutoTokenizer.from_pretrained(n)",
        "AutoTokenizer.from_pretrained(n, trust_remote_code=False)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_catches_what_it_is_for_and_nothing_else(rule):
    caught, passed = RULES[rule]
    assert list(unsafe(caught))
    assert list(unsafe(passed)) == []
