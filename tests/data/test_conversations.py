"""What training text is made from conversations, and from texts that hold their prompt: nothing twice, nothing lost."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from tether.data.checks import DataReport
from tether.data.records import load_demonstrations, load_pairs, load_prompts
from tether.errors import DataError
from tiny import byte_tokenizer

SYSTEM = {"role": "system", "content": "be kind"}
USER = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
OPEN = "<s>[user]hi[assistant]"
LOADERS = {
    "prompts": lambda *a, **k: load_prompts(*a, max_new_tokens=4, **k),
    "pairs": load_pairs,
    "demonstrations": load_demonstrations,
}
TOOLS = (
    "{{ bos_token }}{% for t in tools or [] %}<{{ t.name }}{% if t.about is defined %} {{ t.about }}{% endif %}>"
    "{% endfor %}{% if mood is defined %}({{ mood }}){% endif %}{% for m in messages %}[{{ m.role }}"
    "{% if m.name is defined %} {{ m.name }}{% endif %}]{{ m.content }}{% for c in m.tool_calls or [] %}!{{ c.name }}"
    "{% for k in c.arguments %} {{ k }}{% endfor %}{% endfor %}{% if m.role == 'assistant' %}{{ eos_token }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chat():
    return byte_tokenizer(template=True)


@pytest.fixture
def load(tmp_path, chat):
    """The text of prompt and completions of each row, and the findings."""

    def run(kind, *rows, template=None, plain=False, **options):
        tokenizer = byte_tokenizer() if plain else chat
        if template is not None:
            tokenizer.chat_template = template
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = DataReport()
        records = LOADERS[kind](str(path), tokenizer, context=200, report=report, **options)
        decoded = [
            tuple(tokenizer.decode(list(ids)) for name, ids in vars(record).items() if name.endswith("ids"))
            for record in records
        ]
        return decoded, {kind for source in report.sources for kind in source.findings}

    return run


BEGUN = {"role": "assistant", "content": "well"}


def test_a_prompt_that_ends_with_the_models_turn_is_continued(load):
    assert load("prompts", {"prompt": [USER, BEGUN]}) == ([(f"{OPEN}well",)], set())
    rows, _ = load("demonstrations", {"prompt": [USER, BEGUN], "completion": [YES]})
    assert rows == [(f"{OPEN}well", "yes</s>")]
    rows, _ = load("pairs", {"prompt": [USER, BEGUN], "chosen": [YES], "rejected": [NO]})
    assert rows == [(f"{OPEN}well", "yes</s>", "no</s>")]
    more = [YES, USER, NO]
    rows, _ = load("demonstrations", {"prompt": [USER, BEGUN], "completion": more})
    assert rows == [(f"{OPEN}well", "yes</s>\n[user]hi[assistant]no</s>")]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("demonstrations", {"messages": [USER, YES, USER]}, "the last turn is the user's, and only turns of the model"),
        ("demonstrations", {"messages": [USER, YES, NO]}, "the last two turns are both the model's"),
        ("demonstrations", {"prompt": [USER], "completion": [USER]}, "completion holds nothing but the prompt"),
        ("demonstrations", {"prompt": [SYSTEM], "completion": [USER]}, "completion's first turn is the user's"),
        ("demonstrations", {"prompt": [USER], "completion": [YES, USER]}, "the last turn is the user's"),
        ("pairs", {"chosen": [USER, YES, USER], "rejected": [USER, NO, USER]}, "the last turn is the user's"),
        ("pairs", {"prompt": [USER], "chosen": [USER, YES], "rejected": [NO]}, "completion's first turn is the user's"),
        ("prompts", {"prompt": [USER, {**YES, "tool_calls": [{"name": "f"}]}]}, "cannot end with a tool call"),
        ("prompts", {"prompt": [{**USER, "content": None}]}, "prompt holds a turn without content"),
        ("prompts", {"prompt": [{**USER, "content": [{"type": "text", "text": " "}]}]}, "a turn without content"),
        ("prompts", {"prompt": [{**USER, "content": [{"type": "image", "url": "x"}]}]}, "a part of type 'image'"),
        ("prompts", {"prompt": [{**USER, "content": [{"type": "text", "text": None}]}]}, "a part of type 'text'"),
        ("prompts", {"prompt": [USER], "tools": "[1"}, "tools is text and not valid JSON"),
        ("prompts", {"prompt": [USER], "tools": 3}, "tools must be a list of JSON schemas, found int"),
        ("prompts", {"prompt": [USER], "tools": ["f"]}, "tools must be a list of JSON schemas"),
        ("prompts", {"prompt": [USER], "chat_template_kwargs": [1]}, "chat_template_kwargs must be an object"),
        ("prompts", {"prompt": [USER], "chat_template_kwargs": {"tokenize": True}}, "must not hold 'tokenize'"),
    ],
)
def test_conversations_that_cannot_be_used(load, kind, row, message):
    with pytest.raises(DataError, match=message):
        load(kind, row)


LONG = "What is the capital of France?"


@pytest.mark.parametrize(
    ("kind", "once", "twice"),
    [
        (
            "pairs",
            {"prompt": LONG, "chosen": " Paris", "rejected": " Rome"},
            {"prompt": LONG, "chosen": f"{LONG} Paris", "rejected": f"{LONG} Rome"},
        ),
        (
            "pairs",
            {"prompt": [SYSTEM, USER], "chosen": [YES], "rejected": [NO]},
            {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
        ),
        (
            "demonstrations",
            {"prompt": LONG, "completion": " Paris"},
            {"prompt": LONG, "completion": f"{LONG} Paris"},
        ),
        ("demonstrations", {"prompt": [USER], "completion": [YES]}, {"prompt": [USER], "completion": [USER, YES]}),
    ],
)
def test_a_prompt_that_is_repeated_is_there_once(load, kind, once, twice):
    expected, nothing = load(kind, once)
    assert not nothing
    found, findings = load(kind, twice)
    assert found == expected
    assert findings == {"prompt repeated: removed"}


def test_a_demonstration_whose_conversation_holds_the_prompts_text(load):
    expected, _ = load("demonstrations", {"messages": [SYSTEM, USER, YES]})
    assert load("demonstrations", {"prompt": "hi", "completion": [SYSTEM, USER, YES]})[0] == expected


def test_a_short_prompt_may_be_met_by_chance(load):
    rows, findings = load("pairs", {"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi."})
    assert rows == [("<s>Hi", "Hi there!</s>", "Hi.</s>")]
    assert findings == {"begins with its short prompt: used as it is"}
    rows, findings = load("pairs", {"prompt": LONG, "chosen": f"{LONG} Paris", "rejected": " Rome"})
    assert rows == [(f"<s>{LONG}", f"{LONG} Paris</s>", " Rome</s>")]
    assert not findings


def test_nothing_but_the_prompt(load):
    with pytest.raises(DataError, match="rejected holds nothing but the prompt"):
        load("pairs", {"prompt": LONG, "chosen": f"{LONG} Paris", "rejected": f"{LONG} \n"})


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_variables_reach_the_template(load, as_text):
    tools, options = [{"name": "add", "about": None}, {"name": "sub"}], {"mood": "glad", "other": None}
    columns = {"tools": json.dumps(tools), "chat_template_kwargs": json.dumps(options)} if as_text else {
        "tools": tools, "chat_template_kwargs": options
    }  # fmt: skip
    front = "<s><add><sub>(glad)[user]hi[assistant]"
    assert load("prompts", {"prompt": [USER], **columns}, template=TOOLS)[0] == [(front,)]
    assert load("demonstrations", {"messages": [USER, YES], **columns}, template=TOOLS)[0] == [(front, "yes</s>")]
    for row in ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, {"chosen": [USER, YES], "rejected": [USER, NO]}):
        assert load("pairs", {**row, **columns}, template=TOOLS)[0] == [(front, "yes</s>", "no</s>")]
    assert load("prompts", {"prompt": "hi", "tools": 3, "chat_template_kwargs": "x"})[0] == [("<s>hi",)]  # for rewards


def test_keys_without_a_value_do_not_reach_the_template(load, tmp_path, chat):
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": None}}]}
    answer = {"role": "tool", "name": "f", "content": None}
    talk = [{"role": "user", "content": "hi", "name": None}, called, answer, YES]
    expected = [("<s>[user]hi[assistant]!f x</s>\n[tool f][assistant]", "yes</s>")]
    assert load("demonstrations", {"messages": talk}, template=TOOLS)[0] == expected
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([{"messages": talk}, {"messages": [USER, YES]}]), path)
    first, second = load_demonstrations(str(path), chat, context=200)
    assert chat.decode(list(first.prompt_ids)) == expected[0][0]
    assert chat.decode(list(second.prompt_ids)) == OPEN


def test_turns_with_nothing_to_say_and_content_in_parts(load):
    empty = {"role": "system", "content": ""}
    parts = {"role": "user", "content": [{"type": "text", "text": "h", "image": None}, {"type": "text", "text": "i"}]}
    assert load("prompts", {"prompt": [empty, parts]})[0] == [("<s>[system][user]hi[assistant]",)]
    assert load("demonstrations", {"messages": [USER, {**YES, "content": ["yes"]}]})[0] == [(OPEN, "yes</s>")]


def test_columns_of_ultrachat(load):
    row = {"prompt": "hi", "prompt_id": "0a", "messages": [USER, YES, USER, NO]}
    assert load("demonstrations", row)[0] == [(f"{OPEN}yes</s>\n[user]hi[assistant]", "no</s>")]
    assert load("demonstrations", {**row, "completion": None})[0] == load("demonstrations", row)[0]
    assert load("demonstrations", {"prompt": "a", "completion": "b", "messages": None})[0] == [("<s>a", "b</s>")]
    assert load("demonstrations", {"prompt": None, "messages": None, "text": "ab"})[0] == [("<s>", "ab</s>")]
    assert load("prompts", row)[0] == [("<s>hi",)]


@pytest.mark.parametrize("end", ["", "</s>", "</s>\n", "</s> \n\n"])
def test_rendered_text_ends_with_one_eos(load, end):
    assert load("demonstrations", {"text": f"<s>[user]hi{end}"})[0] == [("<s>", "[user]hi</s>")]
    assert load("demonstrations", {"prompt": "a", "completion": f"b{end}"})[0] == [("<s>a", "b</s>")]
    assert load("pairs", {"chosen": f"ab{end}", "rejected": "ac</s>\n"})[0] == [("<s>a", "b</s>", "c</s>")]


@pytest.mark.parametrize("text", [json.dumps([USER]), str([USER]), '[{"from": "human", "value": "hi"}]'])
def test_a_conversation_stored_as_text_is_a_finding(load, text):
    finding = {"conversation stored as text: used as text"}
    assert load("prompts", {"prompt": text})[1] == finding
    assert load("demonstrations", {"text": text})[1] == finding
    assert load("demonstrations", {"prompt": "a", "completion": text})[1] == finding
    assert load("pairs", {"chosen": text, "rejected": f"{text} "})[1] == finding
    assert not load("prompts", {"prompt": '[{"name": "Ann"}] is JSON'})[1]


def test_a_template_without_a_generation_prompt_is_opened_by_what_it_writes_before_an_answer(load):
    header = "{{ bos_token }}{% for m in messages %}### {{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    assert load("prompts", {"prompt": [USER]}, template=header)[0] == [("<s>### user: hi</s>\n### assistant:",)]
    rows, _ = load("demonstrations", {"messages": [USER, YES]}, template=header)
    assert rows == [("<s>### user: hi</s>\n### assistant:", " yes</s>")]
    llama_2 = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    assert load("prompts", {"prompt": [USER]}, template=llama_2)[0] == [("<s>[INST] hi [/INST]",)]
    assert load("demonstrations", {"messages": [USER, YES]}, template=llama_2)[0] == [
        ("<s>[INST] hi [/INST]", " yes </s>")
    ]


THINKS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)


def test_a_template_that_opens_with_thinking(load):
    """As DeepSeek R1's, which does not write the reasoning of turns that are over."""
    assert load("prompts", {"prompt": [USER]}, template=THINKS)[0] == [(f"{OPEN}<think>\n",)]
    assert load("demonstrations", {"messages": [USER, YES]}, template=THINKS) == ([(OPEN, "yes</s>")], set())
    rows, _ = load("pairs", {"prompt": [USER], "chosen": [YES], "rejected": [NO]}, template=THINKS)
    assert rows == [(OPEN, "yes</s>", "no</s>")]
    thought = {**YES, "content": "<think>hm</think>yes"}
    rows, findings = load("demonstrations", {"messages": [USER, thought]}, template=THINKS)
    assert rows == [(OPEN, "yes</s>")]
    assert findings == {"completion changed by the chat template"}
