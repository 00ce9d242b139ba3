"""The table of metric names holds what the rows of each command have, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commandline import read_rows, tether, workspace
from runs import HELD_OUT, LINES
from tether.errors import ConfigError
from tether.runtime.metric_names import (
    BY_COMMAND,
    EVALUATED,
    evaluation_names,
    require_known,
    require_metric,
    reward_names,
)

MORE = {
    "sft": "--eval-data held_texts.jsonl",
    "reward": "",
    "dpo": "",
    **dict.fromkeys(("rejection-sampling", "ppo", "grpo"), f"{HELD_OUT} --eval-every 1 --eval-reward length:3"),
}


@pytest.mark.parametrize("name", LINES)
def test_the_rows_of_a_run_have_the_names_of_the_table(name, tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    assert tether(f"{LINES[name]} {MORE[name]} --quiet --model {tiny} --out out") == 0
    found = {metric for row in read_rows(tmp_path / "out" / "metrics.jsonl") for metric in row}
    sampled = name not in EVALUATED
    own = reward_names(["fn"]) | evaluation_names(["fn"], ["length"]) if sampled else set(EVALUATED[name])
    assert found == BY_COMMAND[name] | own


def test_the_page_of_metrics_names_those_of_an_evaluation():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.split("## Evaluations during training\n", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)) == evaluation_names(["NAME"], ["NAME"])


def test_every_command_that_trains_is_in_the_table():
    assert BY_COMMAND.keys() == LINES.keys()


def test_a_name_that_cannot_be_a_metric_is_refused_with_the_nearest_one():
    own = reward_names(["fn"]) | evaluation_names(["fn"], ["judge"])
    for known in (None, "reward", "-kl", "rewards/fn/mean", "eval/win_rates/judge", "eval/rewards/fn"):
        require_known(known, "grpo", own)
    for member in ("rewards/fn/helpful/std", "eval/rewards/judge/helpful"):
        require_known(member, "grpo", own)  # its reward may have members
    with pytest.raises(ConfigError, match=r"no metric 'eval/rewards/fx'; did you mean eval/rewards/fn\?"):
        require_known("eval/rewards/fx", "grpo", own)
    with pytest.raises(ConfigError, match="no metric 'val/mean'"):
        require_known("val/mean", "grpo", own)  # which PPO has
    require_known("anything", "a command of one's own", own)
    with pytest.raises(ConfigError, match="no metric 'x'"):
        require_metric("x", {"reward"})
