"""A model's own chat template, from a folder through `fit` to an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_sft import Conversation, load_model
from lightning_sft.data import template_worker
from lightning_sft.data.chat_template import jinja_template
from support.runs import load, newest_checkpoint, run, write_config
from support.talks import write_talks
from support.tiny_run import write_hf

pytestmark = pytest.mark.process  # a template is rendered in one
CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def test_trained_asked_and_resumed_by_its_own_template(tmp_path: Path, monkeypatch) -> None:
    model = write_hf(tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHATML)
    settings = {
        "model__architecture": "auto",
        "model__weights": str(model),
        "data__path": str(write_talks(tmp_path / "talks.json", 30)),
        "data__mask_prompt": True,
        "data__max_length": 256,
        "data__fractions": [0.8, 0.1, 0.1],
        "loss_curve__every_n_steps": 0,
        "samples__indices": [0],
        "trainer__max_epochs": 1,
    }
    states = {}
    for style in ("template", "chatml"):
        config = write_config(tmp_path, **settings, data__prompt_style=style, run__name=style)
        assert run("fit", "--config", config) == 0
        checkpoint = newest_checkpoint(tmp_path / "runs" / style / "version_0")
        states[style] = load(checkpoint)["state_dict"]
    # It lays conversations out as the named style does, so the same is learned.
    for key, value in states["chatml"].items():
        assert value.equal(states["template"][key]), key
    checkpoint = newest_checkpoint(tmp_path / "runs" / "template" / "version_0")
    config = checkpoint.parent.parent / "config.yaml"
    assert run("fit", "--config", config, "--ckpt_path", checkpoint, "--trainer.max_epochs=2") == 0
    checkpoint = newest_checkpoint(config.parent)
    assert run("predict", "--ckpt_path", checkpoint) == 0
    answering = load_model(str(checkpoint), device="cpu")
    assert jinja_template(answering.style) == CHATML
    talk = Conversation(json.loads(Path(settings["data__path"]).read_text())[0]["messages"])
    named = load_model(
        str(newest_checkpoint(tmp_path / "runs" / "chatml" / "version_0")), device="cpu"
    )
    for asked in ("Hi", talk.question):
        assert answering._encode(asked) == named._encode(asked)
    assert len(answering.answer([talk.question, "Hi"], max_new_tokens=5)) == 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "chat template: line 2: "),
        ("{% include '/etc/passwd' %}", "chat template: no loader for this environment"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "chat template: was stopped: it takes too much time or memory for a conversation",
        ),
        (CHATML.replace("message['content']", "message['content'] | upper"), "changes the text"),
    ],
    ids=["error", "file", "endless", "other text"],
)
@pytest.mark.parametrize("command", ["inspect", "fit"])
def test_a_bad_template_is_one_line(
    command: str, template: str, message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    quick = tmp_path / "template_worker.py"  # a second of the processor's time instead of five
    text = Path(template_worker.__file__).read_text("utf-8")
    quick.write_text(text.replace("CPU_SECONDS = 5", "CPU_SECONDS = 1"))
    monkeypatch.setattr("lightning_sft.data.template_process.WORKER", quick)
    model = write_hf(tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    settings = {"model__architecture": "auto", "model__weights": str(model)}
    settings |= {"data__path": str(write_talks(tmp_path / "talks.json", 30))}
    config = write_config(tmp_path, **settings, data__prompt_style="template")
    assert run(command, "--config", config) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()
