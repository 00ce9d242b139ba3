"""``model/README.md``: what a model was made of and how well it does, for whoever gets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from tether import __version__
from tether.commands import TABLE, find
from tether.flags import options_of
from tether.models.adapters import CONFIG as ADAPTER_CONFIG
from tether.models.classifiers import in_the_library
from tether.models.loading import model_config
from tether.rewards.resolve import short_name, split_name, split_weight
from tether.runtime.changes import CONTENT_DECIDES, OF_THE_PROCESS, REWARDS
from tether.untrusted import printable, read_flat_yaml

NAMED = CONTENT_DECIDES | {*REWARDS}
"""Options that name inputs, which have a table of their own."""
UNTOLD = OF_THE_PROCESS | {"device", "matmul_dtype", "save_every", "keep_last", "keep_checkpoints", "rollouts_every"}
"""Options that say nothing of the model."""
METHODS = {
    "sft": "supervised fine-tuning",
    "reward": "a reward model of preference pairs (Bradley-Terry)",
    "dpo": "direct preference optimisation (DPO)",
    "rejection-sampling": "rejection sampling",
    "ppo": "PPO",
    "grpo": "GRPO",
}
OWN = """The library has no class for reward models of this architecture; tether has one.

```python
from tether.models.reward import load_reward_model

model, tokenizer = load_reward_model("DIRECTORY")
```"""


def write_card(run: Path, summary: Mapping[str, Any]) -> None:
    """Write the card of the model of ``run``, which is there already."""
    model = run / "model"
    options = read_flat_yaml(run / "config.yaml")
    own = options["command"] == "reward" and not in_the_library(model_config(str(model)))
    text = card(options, summary, adapter=(model / ADAPTER_CONFIG).is_file(), own=own)
    (model / "README.md").write_text(text, encoding="utf-8")


def card(options: Mapping[str, Any], summary: Mapping[str, Any], *, adapter: bool, own: bool = False) -> str:
    """The card of a model that a command with these ``options`` made; ``own`` is a reward model of a class of ours. It
    names files by their last part, and holds neither times nor anything of the machine, so that a run that is repeated
    has the same."""
    command = str(options["command"])
    kind = "reward" if command == "reward" else "policy"
    base = short(options.get("model"))
    front: dict[str, Any] = {
        "library_name": "tether" if own else "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if kind == "reward" else "text-generation",
        "tags": ["tether", command],
    }
    if "/" in base:
        front["base_model"] = base
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {base}, by {METHODS.get(command, command)}",
        f"Made with tether {__version__} by `tether {command}` from `{cell(base)}`"
        f"{', as an adapter (LoRA)' if adapter else ''}.",
        section("Data and rewards", table(("option", "value"), inputs(options))),
        section("Options that are not the defaults", table(("option", "value"), changed(command, options))),
        section("Results", results(summary)),
        section("How to load it", OWN if own else loading(kind, adapter=adapter)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def inputs(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for name in sorted(NAMED & options.keys() - {"model"}):
        value = options[name]
        for one in value if isinstance(value, list) else [value]:
            if one:
                found.append((name, reward_name(str(one)) if name in REWARDS else short(one)))
    return found


def changed(command: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    row = find(command, TABLE)
    if row is None:
        return []
    defaults = {option.name: option.default for option in options_of(row.options_class())}
    return [
        (name, str(value))
        for name, value in options.items()
        if name not in NAMED | UNTOLD and name in defaults and value != as_plain(defaults[name])
    ]


def as_plain(value: Any) -> Any:
    """A default as ``config.yaml`` has it."""
    return list(value) if isinstance(value, tuple) else value


def results(summary: Mapping[str, Any]) -> str:
    """What the run found on held-out data, with its intervals."""
    if compared := summary.get("evaluation"):
        rows: list[tuple[str, ...]] = [
            (
                who,
                f"{found['reward']:.3f} ± {found['reward_ci95']:.3f}",
                f"{found['win_rate']:.1%}",
                f"{found['kl']:.2f}",
                f"{found['mean_length']:.1f}",
            )
            for who, found in compared.items()
        ]
        return table(("held-out prompts", "reward (95%)", "wins", "KL, nats", "tokens"), rows)
    if "accuracy" in summary:
        low, high = summary["accuracy_ci95"]
        longer = summary.get("longer_wins")
        rows = [("accuracy on held-out pairs", f"{summary['accuracy']:.3f} [{low:.3f}, {high:.3f}]")]
        if longer is not None:
            rows.append(("of the rule that the longer side wins", f"{longer:.3f}"))
        return table(("figure", "value (95%)"), rows)
    return "Not measured on held-out data."


def loading(kind: str, *, adapter: bool) -> str:
    task, labels = ("SequenceClassification", ", num_labels=1") if kind == "reward" else ("CausalLM", "")
    name = f"AutoPeftModelFor{task}" if adapter else f"AutoModelFor{task}"
    imports = (
        f"from peft import {name}\nfrom transformers import AutoTokenizer"
        if adapter
        else f"from transformers import {name}, AutoTokenizer"
    )
    call = f'model = {name}.from_pretrained("DIRECTORY"{labels})'
    return f'```python\n{imports}\n\n{call}\ntokenizer = AutoTokenizer.from_pretrained("DIRECTORY")\n```'


def short(value: Any) -> str:
    """A hub id as it is, a path by its last part."""
    text = str(value)
    return PurePath(text).name if PurePath(text).is_absolute() or text.startswith(".") else text


def reward_name(value: str) -> str:
    name, rest = split_name(value)
    spec, weight = split_weight(rest)
    return f"{name or short_name(spec)}{'' if weight == 1.0 else f' (weight {weight:g})'}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def cell(text: str) -> str:
    """Text within a cell: printable, and no markup."""
    return "".join("\\" + c if c in "\\`*_{}[]<>#|" else c for c in printable(text))


def section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""
