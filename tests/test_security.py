"""Nothing that tether reads can run code, write elsewhere, or give away a secret. docs/threat_model.md has the list."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from commandline import contents, tether, workspace, write_rows
from tether.cli import main
from tether.report.page import samples, write_page
from tether.report.plots import Panel, Series, svg
from tether.runtime.files import remove, whole
from tether.untrusted import one_line, printable, redacted

ROOT = Path(__file__).resolve().parents[1]

# What stands in the source ------------------------------------------------------------------------------------------

SOURCES = ("src", "scripts", "benchmarks", "examples")
"""Not tests: they make the hostile pickles that the commands then have to refuse."""
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
"""Functions that are not even named, under whatever alias."""
ONLY = {
    "trust_remote_code": "False",
    "allow_pickle": "False",
    "shell": "False",
    "weights_only": "True",
    "use_safetensors": "True",
}
"""Arguments with one value that is safe; anything else, a variable too, is not."""
SAFE_LOADERS = ("yaml.SafeLoader", "yaml.CSafeLoader")
NO_WEIGHTS = ("Tokenizer", "TokenizerFast", "Config", "Processor")
"""How the classes end whose from_pretrained reads no weights."""


def aliases(tree: ast.AST) -> dict[str, str]:
    """Local names of what is imported anywhere in a file: ``from torch import load as l`` gives l: torch.load."""
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
    """``t.load`` as ``torch.load`` where t is torch; ``getattr(torch, "load")`` too; empty for what is no name."""
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
    """What could run code that comes from a file, one text each."""
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


FILES = sorted(path for part in SOURCES for path in (ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_no_source_can_be_made_to_run_what_it_reads(path):
    assert list(unsafe(path.read_text(encoding="utf-8"))) == []


def test_the_package_starts_no_other_program():
    """So it cannot run what a model wrote either; a reward function that does so is the user's."""
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [name for node in ast.walk(tree) for name in imported(node, aliases(tree))]
        assert not [name for name in found if within(name, ("subprocess", "multiprocessing", "pty", "code", "runpy"))]


def test_the_threat_model_names_tests_that_are_here():
    page = (ROOT / "docs" / "threat_model.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 10
    assert named <= globals().keys()


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
def test_every_rule_catches_what_it_is_for_and_no_more(rule):
    caught, passed = RULES[rule]
    assert list(unsafe(caught))
    assert list(unsafe(passed)) == []


# What stands in a model ---------------------------------------------------------------------------------------------

MARKER = "marker"
RUNS = "from pathlib import Path\nPath('marker').write_text('ran')\nclass A: pass\n"
GRPO = "grpo --max-new-tokens 2 --steps 1 --prompts-per-step 2 --group-size 2"
TASK = f"{GRPO} --prompts p.jsonl --reward r.py:fn"
AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")


class Touch:
    """Unpickled, it makes the marker."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


def complaint(line: str, capfd, *more: object) -> str:
    """The one line of a command that is refused; the marker must not have been made."""
    capfd.readouterr()
    assert tether(line, *more) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert not Path(MARKER).exists()
    return said


def settle(file: str, **values) -> Callable[[Path], None]:
    """Entries of one of a model's JSON files, and Python code beside it."""

    def change(model: Path) -> None:
        (model / file).write_text(json.dumps({**json.loads((model / file).read_text()), **values}))
        (model / "evil.py").write_text(RUNS)

    return change


def pickled_weights(name: str) -> Callable[[Path], None]:
    """The weights as a pickle that makes the marker, under ``name``."""

    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(pickle.dumps(Touch()))

    return change


def index_of(file: str) -> Callable[[Path], None]:
    """Weights in several files, the first of them a pickle beside the model or a file elsewhere."""

    def change(model: Path) -> None:
        pickled_weights("pytorch_model.bin")(model)
        index = {"metadata": {}, "weight_map": {"lm_head.weight": file}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def adapter(model: Path) -> None:
    """An adapter of peft, whose library a model may name."""
    mapping = {"base_model_class": "A", "parent_library": "evil"}
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "auto_mapping": mapping}
    (model / "adapter_config.json").write_text(json.dumps(config))
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Touch()))
    (model / "evil.py").write_text(RUNS)


def own_generation(model: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(RUNS)


IGNORED = {
    "code for a known architecture": settle("config.json", auto_map=dict.fromkeys(AUTO, "evil.A")),
    "code for a known tokenizer": settle("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]}),
    "code for generation": own_generation,
}
REFUSED = {
    "code for an unknown architecture": (
        settle("config.json", auto_map=dict.fromkeys(AUTO, "evil.A"), model_type="evil", architectures=["A"]),
        "custom code",
    ),
    "code of another repository": (
        settle("config.json", auto_map=dict.fromkeys(AUTO, "nobody/nothing--evil.A"), model_type="evil"),
        "cannot be read",
    ),
    "code for an unknown tokenizer": (
        settle("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]}, tokenizer_class="A"),
        "custom code",
    ),
    "pickled weights": (pickled_weights("pytorch_model.bin"), "weights in a pickle are not loaded"),
    "a pickle named safetensors": (pickled_weights("model.safetensors"), "cannot be loaded"),
    "an adapter": (adapter, "has an adapter (adapter_config.json), which is not loaded"),
}


WITHHELD = {
    "a kernel from the hub": (settle("config.json", _attn_implementation="nobody/nothing:f"), "nobody/nothing:f"),
    "an index that names a pickle": (index_of("pytorch_model.bin"), "'pytorch_model.bin'"),
    "an index that points elsewhere": (index_of("../other/model.safetensors"), "'../other/model.safetensors'"),
}
"""Refused before transformers would fetch, unpickle or follow them."""


@pytest.fixture
def model(here, tiny):
    return Path(shutil.copytree(tiny, here / "m"))


@pytest.mark.parametrize("kind", IGNORED)
def test_code_that_comes_with_a_model_is_ignored(kind, model):
    IGNORED[kind](model)
    assert tether(f"{TASK} --model m --out out --quiet") == 0
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_needs_code_or_a_pickle_is_refused(kind, model, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    change, says = REFUSED[kind]
    change(model)
    assert says in complaint(f"{TASK} --model m --out out", capfd)
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", WITHHELD)
def test_what_a_model_asks_for_elsewhere_is_withheld(kind, model, capfd, monkeypatch):
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("torch.load was called"))
    change, says = WITHHELD[kind]
    change(model)
    said = complaint(f"{TASK} --model m --out out", capfd)
    assert "json" in said
    assert says in said


def test_the_hostile_pickle_is_one(here):
    """Without this, the tests above could pass with a pickle that does nothing."""
    pickle.loads(pickle.dumps(Touch()))
    assert Path(MARKER).exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch marker') }}",
        "{{ lipsum.__globals__['os'].popen('touch marker').read() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(template, model, capfd):
    (model / "chat_template.jinja").write_text(template)
    write_rows(Path("chat.jsonl"), [{"prompt": [{"role": "user", "content": "hi"}]}])
    said = complaint(f"{GRPO} --prompts chat.jsonl --reward r.py:fn --model m --out out", capfd)
    assert "the chat template of m refuses the conversation" in said
    assert "unsafe" in said


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(99999999) %}x{% endfor %}", "Range too big"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_chat_template_that_fails_is_one_line(template, says, model, capfd):
    (model / "chat_template.jinja").write_text(template)
    write_rows(Path("chat.jsonl"), [{"prompt": [{"role": "user", "content": "hi"}]}])
    assert says in complaint(f"{GRPO} --prompts chat.jsonl --reward r.py:fn --model m --out out", capfd)


def test_a_script_that_comes_with_data_is_not_run(here, tiny, capfd):
    data = here / "data"
    data.mkdir()
    (data / "data.py").write_text(RUNS)
    assert "data" in complaint(f"{GRPO} --prompts data --reward r.py:fn --out out --model", capfd, tiny)


# What stands in a run directory -------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
"""A few hundred characters that stand for nine to the twelfth."""
QUADRATIC = f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 10_000)}]\n"
YAMLS = {
    "an object": ("command: !!python/object/apply:os.system ['touch marker']\n", "not valid YAML"),
    "a name": ("command: !!python/name:os.system\n", "not valid YAML"),
    "a bomb": (BOMB, "a reference"),
    "a long text, often": (QUADRATIC, "a reference"),
    "itself": ("a: &a [*a]\n", "a reference"),
    "depth": ("a: " + "[" * 20_000 + "]" * 20_000, "a collection in a collection"),
    "a list": ("- a\n", "name: value"),
    "not UTF-8": (b"\xff\xfe", "UTF-8"),
    "no such day": ("a: 2020-99-99\n", "not valid YAML"),
    "a long number": (f"a: {'9' * 5000}\n", "not valid YAML"),
    "a list for a name": ("{[1]: 2}\n", "not valid YAML"),
}


@pytest.mark.parametrize("command", ["report run", f"{TASK} --out out --model m --config run/config.yaml"])
@pytest.mark.parametrize("kind", YAMLS)
def test_a_configuration_is_names_and_values_and_no_more(kind, command, here, capfd):
    content, says = YAMLS[kind]
    run_directory("config.yaml", content)
    start = time.perf_counter()
    said = complaint(command, capfd)
    assert says in said
    assert "run/config.yaml" in said
    assert len(said) < 500
    assert time.perf_counter() - start < 5


def run_directory(file: str, content: str | bytes) -> Path:
    """A run with one file of this content."""
    run = Path("run")
    run.mkdir()
    (run / "config.yaml").write_text("command: grpo\nmodel: m\n")
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return run


LEFTOVERS = {
    "metrics": ("metrics.jsonl", "garbage\n"),
    "summary": ("summary.json", "garbage"),
    "summary, not UTF-8": ("summary.json", b"\xff"),
    "summary, a list": ("summary.json", "[1]"),
    "summary, depth": ("summary.json", "[" * 100_000),
    "summary, other values": ("summary.json", '{"evaluation": {"policy": {"reward": "high"}}}'),
    "rollouts": ("rollouts/step_000001.parquet", "garbage"),
    "quickstart": ("samples.jsonl", "garbage"),
}


@pytest.mark.parametrize("kind", LEFTOVERS)
def test_garbage_in_a_run_directory_is_one_line(kind, here, capfd):
    file, content = LEFTOVERS[kind]
    run = run_directory(file, content)
    assert str(run) in complaint("report run", capfd)
    assert not (run / "report.html").exists()


METRICS = {
    "not UTF-8": b"\xff\n",
    "a list": b"[1]\n",
    "nothing": b"null\n",
    "text": b'{"step": 1.0, "reward": "high"}\n',
    "an object": b'{"step": 1.0, "reward": {"a": 1}}\n',
    "depth": b"[" * 100_000 + b"\n",
    "a long number": b'{"step": ' + b"9" * 5000 + b"}\n",
}


@pytest.mark.parametrize("kind", METRICS)
def test_metrics_are_objects_of_numbers(kind, here, capfd):
    run = run_directory("metrics.jsonl", b'{"step": 0.0}\n' + METRICS[kind])
    assert f"{run}/metrics.jsonl:2" in complaint("report run", capfd)


def linked(here: Path, name: str) -> Path:
    """A link called ``name`` to a directory that holds a year's work; gives the work."""
    target = here / "elsewhere"
    target.mkdir()
    work = target / "thesis.tex"
    work.write_text("a year")
    (here / name).symlink_to(target)
    return work


def replace(path: Path) -> None:
    """A directory in the place of ``path``."""
    with whole(path) as partial:
        partial.mkdir()


def test_a_run_is_replaced_and_what_its_links_point_to_is_not(here, tiny):
    assert tether(f"{TASK} --out out --quiet --model", tiny) == 0
    for name in ("model", "checkpoints"):
        shutil.rmtree(here / "out" / name)
    work = linked(here, "out/model")
    (here / "out" / "checkpoints").symlink_to(work.parent)
    assert tether(f"{TASK} --out out --quiet --overwrite --model", tiny) == 0
    assert contents(work.parent) == {"thesis.tex": b"a year"}
    assert not (here / "out" / "model").is_symlink()


@pytest.mark.parametrize("take", [remove, replace])
def test_a_link_goes_and_what_it_points_to_stays(take, here):
    work = linked(here, "model")
    take(here / "model")
    assert not (here / "model").is_symlink()
    assert work.read_text() == "a year"


def test_a_link_as_the_run_directory_is_the_directory_it_points_to(here, tiny, capfd):
    """The user names it, so it is followed; and what is not a run is left alone behind a link too."""
    work = linked(here, "out")
    assert "not a run" in complaint(f"{TASK} --out out --overwrite --model", capfd, tiny)
    assert work.read_text() == "a year"
    work.unlink()
    assert tether(f"{TASK} --out out --quiet --model", tiny) == 0
    assert (work.parent / "config.yaml").is_file()
    assert (here / "out").is_symlink()


def test_a_run_directory_that_reads_as_an_address_is_a_directory(here, tiny):
    write_rows(here / "p.jsonl", [{"prompt": "a"}])
    assert tether(f"{TASK} --out mock:/out --quiet --model", tiny) == 0
    assert tether("report mock:/out") == 0
    assert (
        tether(f"{GRPO} --prompts mock:/out/rollouts/step_000001.parquet --reward r.py:fn --out two --model", tiny) == 0
    )


# Names and texts ----------------------------------------------------------------------------------------------------

HOSTILE = "../../x<script>alert(1)</script>--><b onload='x'>&\x1b]0;owned\x07\x1b[31m\x9b2J\u202e$x_{$\\frac"


@dataclass
class Tags:
    """The markup of a page, apart from its text."""

    page: str

    def __post_init__(self) -> None:
        from html.parser import HTMLParser

        self.names: set[str] = set()
        self.attributes: set[str] = set()
        parser = HTMLParser()
        parser.handle_starttag = self.take  # type: ignore[method-assign]
        parser.handle_startendtag = self.take  # type: ignore[method-assign]
        parser.feed(self.page)

    def take(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attributes}


def test_hostile_names_and_texts_stay_text_and_in_the_run_directory(here, tiny, capfd):
    """Reward, columns, prompts and data file are named to climb out, to be markup, formulas or orders to a terminal."""
    here = here / "inside"  # so that ../.. is in the test's own directory too
    here.mkdir()
    os.chdir(here)
    (here / "r.py").write_text(
        f"def fn(completions, **columns):\n    return [1.0] * len(completions)\nglobals()[{HOSTILE!r}] = fn\n"
        "globals()['$y_{$'] = fn\n"
    )
    write_rows(here / "p.jsonl", [{"prompt": f"{i} {HOSTILE}", HOSTILE: HOSTILE, "../x": "/etc/x"} for i in range(3)])
    rewards = ("--reward", f"r.py:{HOSTILE}", "r.py:$y_{$")
    write_rows(here / "e.jsonl", [{"prompt": f"held out {HOSTILE}"}])
    line = f"{GRPO} --prompts p.jsonl --eval-prompts e.jsonl --out out --model"
    before = contents(here.parent)
    capfd.readouterr()
    assert tether(line, tiny, *rewards) == 0
    assert tether("report out") == 0
    printed = capfd.readouterr()
    assert printable(line_free(printed.out + printed.err)) == line_free(printed.out + printed.err)
    new = contents(here.parent).keys() - before.keys()
    assert {Path(name).parts[:2] for name in new if "__pycache__" not in name} == {("inside", "out")}
    page = (here / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("&lt;script&gt;alert(1)") >= 4
    harmless(page)


def line_free(text: str) -> str:
    return text.replace("\n", "")


def harmless(page: str) -> None:
    """A page without a script or anything that would load or run one."""
    tags = Tags(page)
    assert not tags.names & {"script", "b", "img", "iframe", "object", "embed", "link", "base", "form", "foreignobject"}
    assert not [name for name in tags.attributes if name.startswith("on") or name in ("src", "action", "formaction")]


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "</td></table><img src=x onerror=alert(1)>",
        "'\"><svg onload=alert(1)>",
        "<!-- --><style>*{}</style>",
        "&lt;script&gt;&#60;script>",
        "\x00\x1b[2J\ud800\u202e",
    ],
)
def test_no_text_becomes_markup_of_a_report(text, tmp_path):
    panel = Panel(title=text, x_label=text, y_label=text, series=[Series(label=text, x=[1], y=[2], colour="k")] * 2)
    drawing = svg([panel]) if text.isprintable() else ""  # titles and axes are tether's own; labels are data
    drawing += svg([Panel(title="t", x_label="x", y_label="y", series=panel.series)])
    write_page(tmp_path / "r.html", text, text, samples([(text, text, text)]), drawing)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    harmless(page)
    assert "\ud800" not in page


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("a b é 漢 😀") == "a b é 漢 😀"
    assert printable("\x1b[31m \x9b2J \x7f \u202e \n") == r"\u001b[31m \u009b2J \u007f \u202e \n"
    line = json.dumps({"a": "\x9b 😀 \ud800 \U000e0001"}, ensure_ascii=False)
    assert json.loads(printable(line)) == json.loads(line)
    assert printable(line).isprintable()
    assert one_line("a\n\tb\x1b") == r"a b\u001b"


ORDER = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e"
"""What a terminal obeys."""


@pytest.mark.parametrize(
    "line",
    [
        ["grpo", "--reward", ORDER, "--model", "base", "--prompts", "p.jsonl", "--out", "out"],
        ["grpo", "--reward", "r.py:fn", "--model", ORDER, "--prompts", "p.jsonl", "--out", "out"],
        ["report", ORDER],
        [ORDER],
    ],
)
def test_an_error_gives_no_orders_to_the_terminal(line, here, capfd):
    assert main(line) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.isprintable()
    assert r"\u001b]0;owned" in said


def test_a_run_gives_no_orders_to_the_terminal(here, tiny, capfd, monkeypatch):
    """A reward that fails at first and a data file with a row twice are told of while the run goes on."""
    monkeypatch.setattr("tether.rewards.supervision.FIRST_PAUSE", 0.0)
    (here / "r.py").write_text(
        "calls = []\n"
        "def fn(completions, **_):\n"
        "    calls.append(1)\n"
        "    if not calls[1:]:\n"
        f"        raise OSError({ORDER!r})\n"
        "    return [1.0] * len(completions)\n"
    )
    write_rows(here / f"{ORDER}.jsonl", [{"prompt": "a"}] * 2)
    line = [*GRPO.split(), "--reward", "r.py:fn", "--reward-retries", "1", "--prompts", f"{ORDER}.jsonl"]
    assert main([*line, "--out", "out", "--model", tiny]) == 0
    said = capfd.readouterr().err.splitlines()
    assert sum(r"\u001b]0;owned" in one for one in said) == 2
    assert all(one.isprintable() for one in said)


def test_samples_give_no_orders_to_the_terminal(here, tiny, capfd):
    write_rows(here / "p.jsonl", [{"prompt": f"a {ORDER}"}])
    assert tether("generate --prompts p.jsonl --max-new-tokens 30 --group-size 8 --model", tiny) == 0
    lines = capfd.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert [json.loads(line)["prompt"] for line in lines] == [f"a {ORDER}"] * 8


# Secrets ------------------------------------------------------------------------------------------------------------

KEYS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")


def test_no_secret_of_the_environment_is_written_or_printed(here, tiny, capfd, monkeypatch):
    for key in KEYS:
        monkeypatch.setenv(key, f"hf_marker{key}")
    write_rows(here / "e.jsonl", [{"prompt": "held out"}])
    assert tether(f"{TASK} --eval-prompts e.jsonl --out out --save-every 1 --model", tiny) == 0
    assert tether("report out") == 0
    assert tether(f"{TASK} --out other --model nope") == 2
    tether("doctor")
    printed = capfd.readouterr()
    written = contents(here / "out")
    assert {"config.yaml", "summary.json", "report.html", "model/config.json"} <= written.keys()
    assert b"marker" not in b"".join(written.values())
    assert "marker" not in printed.out + printed.err
    assert "marker" not in "".join(written)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/x: no such file", "https://***@host/x: no such file"),
        ("'https://secret@host'", "'https://***@host'"),
        ("https://me:sec@ret@host/a@b", "https://***@host/a@b"),
        ("https:/me:secret@host/x/.partial", "https:/***@host/x/.partial"),
        ("https://host/x?token=secret: no such file", "https://host/x?***: no such file"),
        ("s3://bucket/key?X-Amz-Signature=secret&a=b", "s3://bucket/key?***"),
        ("name@host a/b:train[:10] r.py:fn=0.5 what? https://host/x", "name@host a/b:train[:10] r.py:fn=0.5 what? https://host/x"),
    ],
)  # fmt: skip
def test_an_address_is_shown_without_its_secrets(text, shown):
    assert redacted(text) == shown


ADDRESS = "https://me:secret@host/x?token=secret"


@pytest.mark.parametrize(
    "line",
    [
        f"{TASK} --out out --model {ADDRESS}",
        f"{GRPO} --model base --out out --prompts {ADDRESS} --reward r.py:fn",
        f"{GRPO} --model base --out out --prompts p.jsonl --reward {ADDRESS}",
        f"{GRPO} --model base --out out --prompts p.jsonl --reward {ADDRESS}:fn=2",
        f"{TASK} --model base --out {ADDRESS}",
        f"{TASK} --model base --out out --config {ADDRESS}",
        f"{TASK} --model base --out out --kl-coef {ADDRESS}",
        f"report {ADDRESS}",
        f"report run {ADDRESS}",
        ADDRESS,
    ],
)
def test_no_error_repeats_the_secrets_of_an_address(line, here, capfd):
    said = complaint(line, capfd)
    assert "secret" not in said
    assert "host" in said
    assert not Path("https:").exists()
