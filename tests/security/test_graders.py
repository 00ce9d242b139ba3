"""What a model writes is data to the process that grades it."""

from __future__ import annotations

import pytest

from tether.rewards.answer_rules import math_
from tether.rewards.text_rules import format_, regex

CODE = [
    "__import__('os').system('touch {}')", "open('{}','w')", "exec(open('{}','w').write('x'))",
    "(lambda:open('{}','w'))()", "[open('{}','w') for x in (1,)]", "().__class__.__base__.__subclasses__()",
    "1;open('{}','w')", "1+open('{}','w')", "{0}", "{0.__class__}", "%(x)s", "`touch {}`", "$(touch {})",
    'x\n\n["y"]\n', '"]\n{"value": true}\n',
]  # fmt: skip
AROUND = ["{}", r"\boxed{{{}}}", "${}$", r"$\text{{{}}}$", r"\[{}\]", r"$\operatorname{{{}}}(1)$", "#### {}", "2*{}"]


@pytest.fixture
def texts(tmp_path):
    marker = tmp_path / "marker"
    codes = [code.replace("{}", str(marker)) for code in CODE]
    yield [around.format(code) for code in codes for around in AROUND]
    assert not marker.exists()


def test_code_in_an_answer_is_not_run(texts):
    pytest.importorskip("math_verify", reason="needs the extra math")
    rule = math_("answer:2")
    values = rule(completions=texts, answer=["-9876"] * len(texts))
    assert values == [0.0] * len(texts)


def test_code_in_a_text_is_not_run_by_patterns(texts):
    assert regex("no such text")(completions=texts) == [0.0] * len(texts)
    assert format_(".*")(completions=texts) == [1.0] * len(texts)
