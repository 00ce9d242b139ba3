"""The page of a reward-model run: how good the model is, whether it reads more than the length, where it is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from commandline import tether, write_rows
from tether.errors import RunError
from tether.report.reward_model import (
    against_rule,
    edges_of,
    evaluation_of_rows,
    length_bins,
    length_panel,
    length_verdict,
    margins,
    reliability,
    reward_model_sections,
    stairs,
    worst_pairs,
)
from tether.report.view import RunView
from tether.runtime.judged_pairs import JudgedPair, read_judged, write_judged


def pair(margin, longer_by=0, *, prompt=0, text="t"):
    return JudgedPair(
        prompt_index=prompt,
        prompt=f"p {text}",
        chosen=f"c {text}",
        rejected=f"r {text}",
        chosen_score=margin,
        rejected_score=0.0,
        margin=margin,
        chosen_length=50 + longer_by,
        rejected_length=50,
    )


def pairs_of(margins_and_lengths):
    return [pair(margin, longer_by, prompt=i) for i, (margin, longer_by) in enumerate(margins_and_lengths)]


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Q{i}", "chosen": f" yes {i}", "rejected": f" no no {i}"} for i in range(40)]
    rows[3]["rejected"] = rows[3]["chosen"]
    write_rows(tmp_path / "pairs.jsonl", rows)
    hostile = "<script>alert('a&b')</script>"
    test = [{"prompt": f"{hostile} {i}", "chosen": " no no", "rejected": " yes"} for i in range(12)]
    write_rows(tmp_path / "test.jsonl", test)
    line = "reward --pairs pairs.jsonl --test-pairs test.jsonl --batch-size 8 --on-bad-rows skip --quiet --out out"
    line += " --epochs 4 --learning-rate 3e-3"
    assert tether(line, "--model", tiny) == 0
    return tmp_path / "out"


def test_the_page_of_a_run(run):
    assert tether("report", run) == 0
    page, summary = (run / "report.html").read_text(), json.loads((run / "summary.json").read_text())
    low, high = summary["accuracy_ci95"]
    for part in (
        "How good it is",
        f"{low:.1%} to {high:.1%}",
        "35 to learn, 4 to stop by, 12 to test",
        "Which weights were kept",
        f"The weights of step {summary['best_step']} of {summary['steps']} were kept",
        "The pairs it gets most wrong",
        "equal sides 1",
        "The rule that the longer side wins is right on 100.0% of these pairs",
    ):
        assert part in page, part
    assert page.count("<script") == 1
    assert page.count("&lt;script&gt;alert(&#x27;a&amp;b&#x27;)&lt;/script&gt; ") == 10


def test_a_run_without_test_pairs_says_what_its_figures_are_worth(run, tiny):
    assert tether("reward --pairs pairs.jsonl --on-bad-rows skip --test-share 0 --quiet --out out2 --model", tiny) == 0
    page = "".join(reward_model_sections(run.parent / "out2", RunView.read(run.parent / "out2")))
    assert "There are no test pairs" in page
    assert "accuracy on the stopping pairs" in page
    assert "most wrong" not in page


def test_a_run_that_is_not_finished_has_what_there_is(run):
    (run / "summary.json").unlink()
    (run / "test_pairs.parquet").unlink()
    page = "".join(reward_model_sections(run, RunView.read(run)))
    assert "How good it is" not in page
    assert "Rows of the data" in page


@pytest.mark.parametrize(
    ("file", "content"),
    [("test_pairs.parquet", "garbage"), ("summary.json", '{"accuracy": 1}'), ("data.json", '[{"source": 1}]')],
)
def test_the_file_that_is_at_fault_is_named(file, content, run):
    (run / file).write_text(content)
    with pytest.raises(RunError) as found:
        reward_model_sections(run, RunView.read(run))
    assert str(found.value).startswith(str(run / file))


def test_rows_come_back_as_they_were_written(tmp_path):
    pairs = pairs_of([(0.25, 3), (-1.5, -2)])
    write_judged(tmp_path, pairs)
    assert read_judged(tmp_path) == pairs


def test_a_length_detector_is_called_one():
    """It prefers the longer side in 38 of 40 pairs; the chosen side is longer in half of them."""
    detector = pairs_of([((1 if i < 38 else -1) * (5 if i % 2 else -5) * 0.1, 5 if i % 2 else -5) for i in range(40)])
    said = length_verdict(detector)
    assert "The model is a length detector: it prefers the longer side in 95% of the pairs" in said
    mirrored = [pair(-p.margin, p.chosen_length - p.rejected_length, prompt=p.prompt_index) for p in detector]
    assert "it prefers the shorter side in 95% of the pairs" in length_verdict(mirrored)


def test_a_model_that_reads_is_not():
    """Right on 36 of 40, whatever the length; the rule is right on 24 of 40: 30 points more."""
    reader = pairs_of([(1.0 if i % 10 else -1.0, 5 if i % 5 < 3 else -5) for i in range(40)])
    said = length_verdict(reader)
    assert "rule that the longer side wins is right on 60.0% of these pairs, the model on 90.0%" in said
    assert "difference of +30.0 ±" in said
    assert "The model is better than the rule" in said


def test_a_model_that_cannot_be_told_from_the_rule():
    said = length_verdict(pairs_of([(1.0, 5), (1.0, -5), (-1.0, 5), (1.0, 5)]))
    assert "not shown to be better than the rule" in said


def test_the_difference_to_the_rule_by_hand():
    """Two prompts: the model beats the rule by 1 on the first pair of prompt 0, ties on its second; loses 1 on prompt
    1's single pair. Mean 0; contributions 2/3 and -2/3, standard error 2/3, t(1) = 12.7062."""
    judged = [pair(1.0, -1), pair(1.0, 1), pair(-1.0, 1, prompt=1)]
    found = against_rule(judged, longer=True)
    assert found.value == pytest.approx(0.0)
    assert found.half_width == pytest.approx(12.7062 * 2 / 3, rel=1e-4)


def test_bins_of_length_hold_each_pair_once():
    judged = pairs_of([(1.0, d) for d in (-9, -4, -1, 0, 0, 2, 4, 12)])
    found = [(name, [p.chosen_length - p.rejected_length for p in inside]) for name, inside in length_bins(judged)]
    assert found == [
        ("shorter by 4 or more", [-9, -4]),
        ("shorter by less than 4", [-1]),
        ("as long", [0, 0]),
        ("longer by less than 4", [2]),
        ("longer by 4 or more", [4, 12]),
    ]
    assert [name for name, _ in length_bins(pairs_of([(1.0, 0)]))] == ["as long"]
    points = length_panel(judged).series[-1]
    assert (list(points.x), list(points.y)) == ([-6.5, -1.0, 0.0, 2.0, 8.0], [1.0] * 5)


def test_the_reliability_diagram_is_that_of_the_evaluation():
    judged = pairs_of([(0.1, 0), (0.15, 0), (-2.0, 0), (3.0, 0)])
    points = reliability(judged).series[-1]
    assert list(zip(points.x, points.y, strict=True)) == [bin[:2] for bin in evaluation_of_rows(judged).bins]


def test_the_outline_of_a_histogram():
    x, y = stairs(torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert x == [0, 0, 1, 1, 2, 2]
    assert y == [0, 2, 2, 3, 3, 0]
    assert float(edges_of(torch.tensor([1.0, 1.0]))[0]) == 0.5


def test_margins_left_of_zero_are_those_ranked_wrong():
    panel = margins(pairs_of([(-0.01, 0), (0.01, 0), (0.02, 0), (3.0, 0)]))
    outline = panel.series[0]
    assert 0.0 in outline.x
    left = sum(y for x, y in list(zip(outline.x, outline.y, strict=True))[1:-1:2] if x < 0)
    assert left == 1


def test_the_worst_pairs_come_first_and_only_wrong_ones():
    judged = [pair(-0.5, text="bad"), pair(-2.0, text="worst"), pair(0.1, text="right"), pair(-1.0, text="x" * 5000)]
    page = worst_pairs(judged)
    assert page.index("p worst") < page.index("x...x") < page.index("p bad")
    assert "right" not in page
    assert len(page) < 4000
    assert "None is ranked wrong" in worst_pairs([pair(1.0)])
