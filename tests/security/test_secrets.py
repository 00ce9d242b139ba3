"""No token of the environment and no password in an address is written or printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from commandline import contents, tether, write_rows
from hostile import GRPO, TASK, complaint
from tether.untrusted import redacted

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
