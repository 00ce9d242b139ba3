"""What is known of rewards before a run: columns, templates and room, in every data set that they read."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from commandline import tether, workspace, write_rows
from tether.errors import DataError, RewardError
from tether.models.loading import load_policy
from tether.models.reward import new_reward_model, save_reward_model
from tether.rewards.answer_rules import exact_answer
from tether.rewards.checks import prepared
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward
from tether.rewards.learned import LearnedReward
from tether.types import Prompt
from tiny import ARCHITECTURES, byte_tokenizer

HI = ({"role": "user", "content": "hi"},)


def prompts(*columns, length=2):
    return [Prompt(ids=(0,) * length, text="p" * (length - 1), columns=found) for found in columns]


def check(reward, *, max_new_tokens=8, **data):
    ((found, weight),) = prepared(WeightedSum(((reward, 0.5),)), data, max_new_tokens=max_new_tokens).rewards
    assert weight == 0.5
    return found


def test_a_function_learns_the_columns_of_all_data_sets():
    reward = FunctionReward("mine", lambda completions, answer: answer)
    found = check(reward, train=prompts({"answer": 1}, {"task": 2}), held=prompts({"answer": 1, "id": 3}), none=[])
    assert found.columns == {"answer", "task", "id"}


@pytest.mark.parametrize(
    ("function", "column"), [(lambda completions, answer: [], "answer"), (exact_answer("solution"), "solution")]
)
def test_a_column_that_no_row_of_a_data_set_has(function, column):
    reward = FunctionReward("mine", function)
    check(reward, train=prompts({}, {column: 1}))
    with pytest.raises(RewardError) as caught:
        check(reward, train=prompts({column: 1}), held=prompts({"b": 1}, {"a": 2}))
    assert (
        str(caught.value)
        == f"held: reward 'mine' needs the column {column!r}, which no prompt has; the columns are a, b"
    )
    with pytest.raises(RewardError, match=r"^train: .*; there are no columns but the prompt$"):
        check(reward, train=prompts({}))


def positional(prompts, completions, /):
    return [0.0 for _ in completions]


@pytest.mark.parametrize("function", [positional, next])
def test_a_function_that_cannot_be_called_by_name_is_refused_before_the_run(function):
    with pytest.raises(RewardError) as caught:
        check(FunctionReward("mine", function), train=prompts({"answer": 1}))
    said = str(caught.value)
    assert said.startswith("reward 'mine' cannot be called (")
    assert said.endswith(
        "it gets prompts, completions, completion_ids, trainer_state, log_metric, log_extra, answer by name, "
        "each where it has a parameter for it"
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda completions: [],
        lambda prompts, completions, completion_ids, answer: [],
        lambda completions, unknown=None: [],
        lambda **columns: [],
        lambda completions, *more, answer, **columns: [],
    ],
)
def test_a_function_that_can_be_called_is_let_pass(function):
    check(FunctionReward("mine", function), train=prompts({"answer": 1}))


def test_a_parameter_that_is_almost_one_that_is_given():
    with pytest.raises(
        RewardError, match=r"'completion', .*; did you mean completions or completion_ids\? the columns are a"
    ):
        check(FunctionReward("mine", lambda completion: []), train=prompts({"a": 1}))
    with pytest.raises(RewardError, match=r"'anser', .*; did you mean answer\? the columns are answer"):
        check(FunctionReward("mine", lambda completions, anser: []), train=prompts({"answer": 1}))


@pytest.fixture
def judge(tiny):
    """A reward model with a context of 128."""
    model, own = new_reward_model(tiny, seed=0)
    return model, own


def test_a_context_that_a_prompt_and_its_completion_may_fill(judge):
    reward = LearnedReward.of("judge", *judge, byte_tokenizer())
    assert check(reward, train=prompts({}, length=120), max_new_tokens=8) is reward
    with pytest.raises(
        RewardError,
        match=r"^held: reward 'judge': the longest prompt and its completion take up to 129 tokens, "
        r"and the reward model reads 128; lower max_new_tokens, or leave long prompts out$",
    ):
        check(reward, train=prompts({}), held=prompts({}, {}, length=121), max_new_tokens=8)


def test_its_own_rendering_is_measured_where_it_reads_text(judge):
    model, own = judge
    own.chat_template = "{% for m in messages %}" + "x" * 100 + "{{ m.content }}{% endfor %}"
    reward = LearnedReward.of("judge", model, own, byte_tokenizer())
    data = [Prompt(ids=(0, 5), text="-", messages=HI)]
    with pytest.raises(RewardError, match=r"take up to 21. tokens, and the reward model reads 128"):
        check(reward, train=data)


def test_of_another_vocabulary_a_prompt_must_leave_room_for_one_token(judge):
    reward = LearnedReward("judge", *judge, same_vocabulary=False)
    assert check(reward, train=prompts({}, length=126), max_new_tokens=1000) is reward
    with pytest.raises(RewardError, match="take up to 129 tokens"):
        check(reward, train=prompts({}, length=127))


def test_a_conversation_that_it_cannot_render(judge):
    model, own = judge
    own.chat_template = None
    reward = LearnedReward.of("judge", model, own, byte_tokenizer(template=True))
    check(reward, train=prompts({}))
    with pytest.raises(DataError, match=r"^train: reward 'judge': the data holds conversations and"):
        check(reward, train=[Prompt(ids=(0, 5), text="-", messages=HI)])


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    write_rows(tmp_path / "bare.jsonl", [{"prompt": f"Bare {i}", "id": i} for i in range(3)])
    (tmp_path / "needs.py").write_text("def fn(completions, answer):\n    return [1.0] * len(completions)\n")
    return tmp_path


COMMANDS = ["grpo --group-size 2 --steps 1", "ppo --steps 1", "rejection-sampling --rounds 1"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("reward", ["needs.py:fn", "exact_answer"])
def test_held_out_prompts_without_the_column(here, tiny, command, reward, capsys):
    line = f"{command} --prompts p.jsonl --eval-prompts bare.jsonl --reward {reward} --max-new-tokens 4 --out run"
    assert tether(line, "--model", tiny) == 2
    assert "bare.jsonl: reward " in (said := capsys.readouterr().err)
    assert "needs the column 'answer', which no prompt has; the columns are id" in said
    assert not (here / "run").exists()


def test_so_does_eval(here, tiny, capsys):
    assert tether("eval --prompts bare.jsonl --reward exact_answer --max-new-tokens 4", "--model", tiny) == 2
    assert "bare.jsonl: reward 'exact_answer' needs the column 'answer'" in capsys.readouterr().err


def short_model(directory):
    """A policy whose context is 32 tokens."""
    config = copy.deepcopy(ARCHITECTURES["llama"])
    config.max_position_embeddings = 32
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def short_judge(here):
    """A reward model that reads 32 tokens, on disk."""
    short_model(here / "base")
    model, own = new_reward_model(str(here / "base"), seed=0)
    save_reward_model(model, own, here / "judge", [((0, 5), (1,)), ((0, 6), (1,))])
    return here / "judge"


def test_a_reward_model_that_reads_less_than_a_run_may_write(here, tiny, capsys):
    judge = short_judge(here)
    for line in (f"{COMMANDS[0]} --out run", "eval"):
        assert tether(f"{line} --prompts p.jsonl --max-new-tokens 60 --reward {judge} --model", tiny) == 2
        assert "take up to 70 tokens, and the reward model reads 32" in capsys.readouterr().err
    assert not (here / "run").exists()


def test_a_reference_that_reads_less_than_the_policy(here, tiny, capsys):
    line = "eval --prompts p.jsonl --reward length:4 --model"
    short_model(here / "short")
    assert tether(line, tiny, "--reference", here / "short", "--max-new-tokens", 60) == 2
    said = capsys.readouterr().err
    assert "short: the longest prompt and 60 new tokens take 70, and its context is 32; lower max_new_tokens" in said
    assert tether(line, tiny, "--reference", here / "short", "--max-new-tokens", 4) == 0
    wide, tokenizer = load_policy(tiny)
    wide.resize_token_embeddings(wide.config.vocab_size + 8, mean_resizing=False)
    wide.save_pretrained(here / "wide")
    tokenizer.save_pretrained(here / "wide")
    capsys.readouterr()
    assert tether(line, here / "wide", "--reference", tiny, "--max-new-tokens", 4) == 2
    assert "rows, and the model may emit ids up to" in capsys.readouterr().err
    assert tether(line, tiny, "--reference", here / "wide", "--max-new-tokens", 4) == 0


def test_a_policy_with_more_rows_than_the_reward_model(here, tiny, capsys):
    """Ids that the reward model has no row for are read as text, and none is out of its range."""
    wide, tokenizer = load_policy(tiny)
    rows = wide.config.vocab_size
    wide.resize_token_embeddings(rows + 64, mean_resizing=False)
    with torch.no_grad():
        wide.get_output_embeddings().weight[rows:] = wide.get_output_embeddings().weight[70:71] * 2
    wide.save_pretrained(here / "wide")
    tokenizer.save_pretrained(here / "wide")
    model, own = new_reward_model(tiny, seed=0)
    save_reward_model(model, own, here / "judge", [((0, 5), (1,)), ((0, 6), (1,))])
    line = f"{COMMANDS[0]} --group-size 8 --prompts p.jsonl --reward judge --max-new-tokens 12 --out run"
    assert tether(line, "--model", here / "wide") == 0, capsys.readouterr().err
    assert json.loads((here / "run" / "summary.json").read_text())["steps"] == 1
