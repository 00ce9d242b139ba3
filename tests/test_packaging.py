"""What the wheel holds, what the package needs, and that the pinned set satisfies it."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tether

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = {
    canonicalize_name(name): pinned
    for name, pinned in (
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    )
}


def wheel_files() -> set[str]:
    """Paths inside the wheel, as the build backend chooses them."""
    return {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}


def assets() -> set[str]:
    folder = ROOT / "src" / "tether" / "assets"
    return {
        str(Path("tether") / file.relative_to(ROOT / "src" / "tether")) for file in folder.rglob("*") if file.is_file()
    }


def test_the_base_model_and_the_prompts_are_assets_of_at_most_16_mb():
    needed = {"base/config.json", "base/model.safetensors", "base/tokenizer.json", "base/tokenizer_config.json"}
    needed |= {"prompts_train.jsonl", "prompts_heldout.jsonl"}
    assert {f"tether/assets/{name}" for name in needed} <= assets()
    assert sum((ROOT / "src" / name).stat().st_size for name in assets()) <= 16e6


def test_nothing_that_the_package_needs_is_ignored_by_git():
    """The build backend leaves out what .gitignore names, at any depth unless it begins with a slash."""
    patterns = [line for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines() if line]
    unanchored = {pattern.strip("/") for pattern in patterns if not pattern.startswith("/")}
    parts = {part for name in assets() for part in Path(name).parts}
    assert not parts & unanchored
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["src/tether"]}


def test_the_wheel_holds_every_module_and_asset():
    files = wheel_files()
    source = ROOT / "src"
    modules = {str(file.relative_to(source)) for file in (source / "tether").rglob("*.py")}
    assert (modules | assets() | {"tether/py.typed"}) <= files
    assert all(name.startswith("tether/") for name in files)


def test_the_version_is_the_same_wherever_it_stands():
    assert tether.__version__ == PROJECT["project"]["version"] == version("tether-rlhf")
    assert f"## {tether.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_pinned_set_covers_and_satisfies_every_requirement():
    own = PROJECT["project"]["name"]
    extras = PROJECT["project"]["optional-dependencies"]
    unpinned = {"wandb", "trackio", "mlflow", "trackers"}  # what ``dev`` leaves out: each pulls in many packages
    assert not any(name in dev for dev in extras["dev"] for name in unpinned)
    lists = [PROJECT["project"]["dependencies"], *(extras[name] for name in extras.keys() - unpinned)]
    wanted = [requirement for entry in lists for requirement in map(Requirement, entry) if requirement.name != own]
    assert wanted
    for requirement in wanted:
        pinned = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), requirement


def test_the_pinned_set_is_plain():
    """Versions alone: no builds of one machine, no addresses."""
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", pinned) for pinned in PINS.values())
    assert "torch" in PINS
