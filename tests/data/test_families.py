"""Golden ids: prompts, demonstrations, pairs and system turns in the formats of thirteen families."""

from __future__ import annotations

import pytest
from families import FAMILIES, MODEL, THINKING, USER, golden, tokenizer_of

from commandline import read_rows, tether, workspace, write_rows
from tether.data.chat import Chat
from tether.data.records import load_demonstrations, load_pairs, load_prompts
from tether.errors import ConfigError, DataError
from tether.models.loading import load_tokenizer
from tether.types import Message

ALL = FAMILIES | THINKING
ASKED: list[Message] = [{"role": "user", "content": USER}]
SAID: Message = {"role": "assistant", "content": MODEL}
MORE: Message = {"role": "user", "content": "More."}


@pytest.fixture(params=ALL)
def family(request):
    return ALL[request.param]


def prompt_ids(tokenizer, row, **options):
    (prompt,) = load_prompts([row], tokenizer, context=500, max_new_tokens=1, **options)
    return prompt.ids


def demonstration(tokenizer, row, **options):
    (found,) = load_demonstrations([row], tokenizer, context=500, **options)
    return found.prompt_ids, found.completion_ids


def test_a_prompt_is_opened_for_the_model_and_has_one_bos(family):
    tokenizer = tokenizer_of(family)
    ids = prompt_ids(tokenizer, {"prompt": ASKED})
    assert ids == golden(tokenizer, family.opened)
    if family.opened.startswith(family.bos or "-"):
        assert ids[:2].count(tokenizer.bos_token_id) == 1


def test_a_prompt_of_several_turns(family):
    tokenizer = tokenizer_of(family)
    ids = prompt_ids(tokenizer, {"prompt": [*ASKED, SAID, MORE]})
    said = MODEL if family in THINKING.values() else family.emitted
    begun = family.opened.removesuffix("<think>\n")
    assert ids == golden(tokenizer, begun + said + family.between)


@pytest.mark.parametrize("row", [{"messages": [*ASKED, SAID]}, {"prompt": ASKED, "completion": [SAID]}])
def test_a_demonstration_is_learned_as_the_model_would_have_to_emit_it(family, row):
    tokenizer = tokenizer_of(family)
    prompt, completion = demonstration(tokenizer, row)
    assert prompt == golden(tokenizer, family.opened.removesuffix("<think>\n"))
    assert completion == golden(tokenizer, family.emitted + family.eos)


def test_the_sides_of_a_pair_share_the_prompt(family):
    tokenizer = tokenizer_of(family)
    other: Message = {"role": "assistant", "content": "No!"}
    row = {"prompt": ASKED, "chosen": [SAID], "rejected": [other]}
    (pair,) = load_pairs([row], tokenizer, context=500)
    assert pair.prompt_ids == golden(tokenizer, family.opened.removesuffix("<think>\n"))
    assert pair.chosen_ids == golden(tokenizer, family.emitted + family.eos)
    assert pair.rejected_ids == golden(tokenizer, family.emitted.replace(MODEL, "No!") + family.eos)
    (whole,) = load_pairs([{"chosen": [*ASKED, SAID], "rejected": [*ASKED, other]}], tokenizer, context=500)
    assert (*whole.prompt_ids, *whole.chosen_ids) == (*pair.prompt_ids, *pair.chosen_ids)


@pytest.mark.parametrize("how", ["row", "option"])
def test_a_system_turn_is_where_the_family_puts_it_or_refused(family, how):
    tokenizer = tokenizer_of(family)
    turn: Message = {"role": "system", "content": "Be brief."}
    row = {"prompt": [turn, *ASKED] if how == "row" else ASKED}
    chat = Chat() if how == "row" else Chat(system="Be brief.")
    if family.system is None:
        with pytest.raises(DataError, match="System role not supported"):
            prompt_ids(tokenizer, row, each=chat.applied)
    else:
        assert prompt_ids(tokenizer, row, each=chat.applied) == golden(tokenizer, family.system.format(s="Be brief."))


def test_an_answer_that_was_begun_is_continued(family):
    tokenizer = tokenizer_of(family)
    begun: Message = {"role": "assistant", "content": "Yo"}
    ids = prompt_ids(tokenizer, {"prompt": [*ASKED, begun]})
    written = family.emitted.split("Yo.")[0] + "Yo"
    assert ids == golden(tokenizer, family.opened.removesuffix("<think>\n") + written)


# ------------------------------------------------------------------------------------------------------------- thinking


def test_a_variable_of_the_template_comes_from_the_row_or_else_from_the_option():
    tokenizer = tokenizer_of(THINKING["qwen 3"])
    thinking, direct = (golden(tokenizer, THINKING["qwen 3"].opened + more) for more in ("", "<think>\n\n</think>\n\n"))
    off = Chat(chat_template_kwargs='{"enable_thinking": false}')
    assert prompt_ids(tokenizer, {"prompt": ASKED}) == thinking
    assert prompt_ids(tokenizer, {"prompt": ASKED}, each=off.applied) == direct
    for own in ({"enable_thinking": True}, '{"enable_thinking": true}'):
        assert prompt_ids(tokenizer, {"prompt": ASKED, "chat_template_kwargs": own}, each=off.applied) == thinking


def test_reasoning_is_learned_and_that_of_earlier_turns_is_left_out_where_the_template_does_so():
    family = THINKING["qwen 3"]
    tokenizer = tokenizer_of(family)
    thought = "<think>\nhm\n</think>\n\nYo."
    turns = [*ASKED, {"role": "assistant", "content": thought}, MORE, {"role": "assistant", "content": thought}]
    prompt, completion = demonstration(tokenizer, {"messages": turns})
    assert prompt == golden(tokenizer, family.opened + "Yo." + family.between)
    assert completion == golden(tokenizer, thought + "<|im_end|>")


def test_a_template_that_drops_the_reasoning_that_is_to_be_learned_says_so():
    tokenizer = tokenizer_of(THINKING["deepseek r1"])
    thought: Message = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYo."}
    prompt, completion = demonstration(tokenizer, {"messages": [*ASKED, thought]})
    assert prompt == golden(tokenizer, "<bos><|User|>Hi?<|Assistant|>")
    assert completion == golden(tokenizer, "\n\nYo.<eos>")


# -------------------------------------------------------------------------------------------------------- the options


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    write_rows(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": f"Hi {i}?"}]} for i in range(4)])
    write_rows(tmp_path / "talks.jsonl", [{"messages": [*ASKED, SAID]}] * 4)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}({{ m.role }}) {{ m.content }}{% endfor %}(assistant) ")
    return tmp_path


def test_a_template_from_a_file_is_used_and_saved_with_the_model(here, tiny):
    assert tether(f"sft --model {tiny} --data talks.jsonl --chat-template t.jinja --quiet --out out") == 0
    assert load_tokenizer("out/model").chat_template == (here / "t.jinja").read_text()
    (prompt,) = load_prompts([{"prompt": ASKED}], load_tokenizer("out/model"), context=99, max_new_tokens=1)
    assert prompt.text == "(user) Hi?(assistant) "
    asked = "--prompts chats.jsonl --max-new-tokens 3"
    assert tether(f"generate --model {tiny} {asked} --chat-template t.jinja --out chosen.jsonl") == 0
    assert tether(f"generate --model {tiny} {asked} --out own.jsonl") == 2  # it has none of its own
    assert len(read_rows(here / "chosen.jsonl")) == 4


def test_a_template_that_changed_is_not_what_the_run_began_with(here, tiny, capfd):
    line = f"sft --model {tiny} --data talks.jsonl --chat-template t.jinja --quiet --epochs 3 --batch-size 2 --out out"
    assert tether(f"{line} --stop-after 0.001s") == 75
    (here / "t.jinja").write_text("{% for m in messages %}{{ m.content }}: {% endfor %}")
    assert tether("resume out --stop-after 10m") == 2
    assert "chat_template" in capfd.readouterr().err


def test_one_of_the_tokenizers_templates_is_chosen_by_its_name(here, tmp_path, capfd):
    from tether.data.chat import choose_template

    tokenizer = tokenizer_of(FAMILIES["phi 3"])
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "RAG {{ messages[0].content }}"}
    for _ in range(2):
        choose_template(tokenizer, "rag")
    assert prompt_ids(tokenizer, {"prompt": ASKED}) == golden(tokenizer, "RAG Hi?")
    with pytest.raises(ConfigError, match="did you mean rag"):
        choose_template(tokenizer, "ragg")


WRONG = {
    "no such file": ("--chat-template nope.jinja", "--chat-template: nope.jinja cannot be read"),
    "broken": ("--chat-template broken.jinja", "refuses the conversation"),
    "not JSON": ("--chat-template-kwargs {enable_thinking:", "--chat-template-kwargs: not valid JSON"),
    "not an object": ("--chat-template-kwargs [1]", "--chat-template-kwargs"),
    "reserved": ('--chat-template-kwargs {"tools":[]}', "must not hold 'tools'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_options_that_cannot_be_used_are_refused_in_one_line(kind, here, tiny, capfd):
    (here / "broken.jinja").write_text("{% for m in %}")
    option, says = WRONG[kind]
    assert tether(f"generate --model {tiny} --prompts chats.jsonl --out g.jsonl {option}") == 2
    complaint = capfd.readouterr().err
    assert says in complaint
    assert complaint.count("\n") == 1
    assert not (here / "g.jsonl").exists()


def test_a_system_turn_of_plain_text_is_refused(here, tiny, capfd):
    assert tether(f"generate --model {tiny} --prompts p.jsonl --system Be --max-new-tokens 1 --out g.jsonl") == 2
    assert "is plain text, which has no system turn (--system)" in capfd.readouterr().err
