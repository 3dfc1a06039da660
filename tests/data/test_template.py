"""A model's own chat template: transformers' texts, exact masks, and strangers' programs."""

from __future__ import annotations

import pytest

from lightning_sft import Conversation, Entry, Message
from lightning_sft.common.errors import InputError
from lightning_sft.data import template_worker
from lightning_sft.data.chat_template import jinja_template
from lightning_sft.data.conversation_rows import tokenize_conversation, tokenize_example
from lightning_sft.data.encoding import encode_prompt
from lightning_sft.data.hf_tokenizer import HFTokenizer
from lightning_sft.data.prompts import PromptStyle, get_style
from lightning_sft.data.segments import Masking
from lightning_sft.data.template import bind_style, render_text
from lightning_sft.data.template_process import TemplateProcess
from lightning_sft.data.tokenizer import gpt2_tokenizer
from support.tiny_run import write_tokenizer

pytestmark = pytest.mark.process  # a template is rendered in one

IM_START, IM_END = 257, 258
ANSWERS = Masking(mask_prompt=True)
CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
# What Qwen3's does: thoughts of all but the last answer are left out.
THINKING = """\
{%- for message in messages -%}
{%- set content = message.content -%}
{%- if message.role == 'assistant' and '</think>' in content and not loop.last -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
TALK = Conversation(
    [
        Message("system", "S"),
        Message("user", " Q "),
        Message("assistant", "A<|im_end|>\n"),
        Message("user", "R", input="I"),
        Message("assistant", "B"),
    ]
)


@pytest.fixture
def bind(tmp_path):
    def make(source: str, **tokens: str) -> tuple[PromptStyle, HFTokenizer]:
        write_tokenizer(tmp_path, **tokens)
        tokenizer = HFTokenizer.from_folder(tmp_path)
        tokenizer.chat_template = source
        return bind_style(get_style("template"), tokenizer), tokenizer

    return make


def ids_of(*parts: int | str) -> list[int]:
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else list(part.encode())
    return ids


def test_exact_masks(bind):
    style, tokenizer = bind(CHATML)
    [row] = tokenize_conversation(TALK, style, tokenizer, ANSWERS)
    assert row.ids == ids_of(
        IM_START, "system\nS", IM_END, "\n", IM_START, "user\nQ", IM_END, "\n",
        IM_START, "assistant\nA<|im_end|>", IM_END, "\n", IM_START, "user\nR\n\nI", IM_END, "\n",
        IM_START, "assistant\nB",
    )  # fmt: skip
    spans = [[*row.ids, IM_END][span.start : span.end] for span in row.spans]
    assert spans == [ids_of("A<|im_end|>", IM_END), ids_of("B", IM_END)]
    prompt = encode_prompt(TALK, style, tokenizer)
    assert prompt == row.ids[: row.prompt_length]
    assert style.extract("B<|im_end|>") == "B"
    assert jinja_template(style) == CHATML


def test_it_says_what_transformers_says(bind, tmp_path):
    transformers = pytest.importorskip("transformers")
    for source in (CHATML, THINKING):
        style, tokenizer = bind(source)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        theirs.chat_template = source
        said = [
            {"role": role, "content": f"{role} {place}\nline"}
            for place, role in enumerate(["system", "user", "assistant", "user", "assistant"])
        ]
        conversation = Conversation(said)
        [row] = tokenize_conversation(conversation, style, tokenizer, ANSWERS)
        whole = theirs.apply_chat_template(said, tokenize=True, return_dict=False)
        assert [*row.ids, *ids_of(IM_END, "\n")] == whole
        asked = theirs.apply_chat_template(
            said[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert encode_prompt(conversation, style, tokenizer) == asked


def test_a_template_that_drops_thoughts_gives_each_answer_a_row(bind):
    style, tokenizer = bind(THINKING)
    thought = "<think>\nHm.\n</think>\n\n"
    talk = Conversation(
        [
            Message("user", "Q"), Message("assistant", f"{thought}A"),
            Message("user", "R"), Message("assistant", f"{thought}B"),
        ]
    )  # fmt: skip
    first, second = tokenize_conversation(talk, style, tokenizer, ANSWERS, 5)
    asked = ids_of(IM_START, "user\nQ", IM_END, "\n", IM_START, "assistant\n")
    again = ids_of(IM_END, "\n", IM_START, "user\nR", IM_END, "\n", IM_START, "assistant\n")

    def thinking(answer: str) -> list[int]:
        return ids_of(263, "\nHm.\n", 264, f"\n\n{answer}")

    assert tokenizer.decode(first.ids) == tokenizer.decode([*asked, *thinking("A")])
    assert tokenizer.decode(second.ids) == tokenizer.decode(
        [*asked, *ids_of("A"), *again, *thinking("B")]
    )
    for row, answer in ((first, "A"), (second, "B")):
        assert row.index == 5
        [span] = row.spans
        assert tokenizer.decode(row.ids[span.start :]) == f"{thought}{answer}"
        assert span.end == len(row.ids) + 1
    assert encode_prompt(talk, style, tokenizer) == second.ids[: second.prompt_length]
    [last] = tokenize_conversation(talk, style, tokenizer, Masking(True, "last"))
    assert last == second._replace(index=0)


def test_a_whole_text(bind):
    style, _ = bind(CHATML)
    said = [{"role": "user", "content": "Q"}]
    asked = "<|im_start|>user\nQ<|im_end|>\n"
    assert render_text(said, style.template, add_generation_prompt=False) == asked
    assert render_text(said, style.template) == f"{asked}<|im_start|>assistant\n"


def test_an_entry_is_laid_out_by_it_as_well(bind):
    style, tokenizer = bind(CHATML)
    [row] = tokenize_example(Entry("Q", "I", "A"), style, tokenizer, ANSWERS)
    assert row.ids == ids_of(
        IM_START, "user\nQ\n\nI", IM_END, "\n", IM_START, "assistant\nA"
    )  # fmt: skip


def test_what_a_row_begins_with_is_there_once(bind):
    source = "{{ bos_token }}" + CHATML
    style, tokenizer = bind(source, bos="<|begin_of_text|>")
    [row] = tokenize_conversation(TALK, style, tokenizer, ANSWERS)
    assert row.ids.count(259) == 1
    assert row.ids[0] == 259
    assert jinja_template(style) == source


def test_the_style_is_kept_by_checkpoints(bind):
    import dataclasses

    style, _ = bind(CHATML)
    saved = dataclasses.asdict(style)
    assert get_style({k: v for k, v in saved.items() if k != "header_in_prompt"}) == style
    assert bind_style(style, gpt2_tokenizer()) == style


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "chat template: line 1: "),
        ("{{ messages[0].x.y }}", "chat template: 'dict object' has no attribute 'x'"),
        ("{{ raise_exception('No system role!') }}", "chat template: No system role!"),
        ("{% include '/etc/passwd' %}", "chat template: no loader for this environment"),
        ("{{ ''.__class__.__mro__ }}", "chat template: access to attribute '__class__' of"),
        ("{{ messages.append(1) }}", "chat template: access to attribute 'append' of"),
        ("{{ range(10 ** 9) | list }}", "chat template: Range too big"),
        ("{{ 'x' * 10 ** 8 }}", "chat template: renders to more than 4,194,304 characters"),
        ("{{ 'x' * 10 ** 11 }}", "chat template: takes too much memory"),
        ("{{ messages[0].content | upper }}B{{ messages | length }}", "chat template: "),
        (CHATML.replace("trim", "upper"), "chat template: changes the text of a message, so that"),
        ("{{ messages[0].content if messages | length == 1 }}",
         "chat template: a question is not laid out alike with and without answer"),
    ],
)  # fmt: skip
def test_what_a_template_may_not(source, message, bind):
    # The first line of what is rendered says what its special tokens are called.
    message = message.replace("line 1", "line 2")
    with pytest.raises(InputError) as error:
        bind(source)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}",
    ],
    ids=["loops", "calls", "doubling"],
)
def test_a_template_without_end_is_stopped(source, tmp_path):
    # One second of the processor's time instead of five.
    quick = tmp_path / "template_worker.py"
    text = open(template_worker.__file__, encoding="utf-8").read()  # noqa: PTH123, SIM115
    assert "CPU_SECONDS = 5" in text
    quick.write_text(text.replace("CPU_SECONDS = 5", "CPU_SECONDS = 1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sft.data.template_process.WORKER", quick)
        process = TemplateProcess(source)
        with pytest.raises(InputError) as error:
            process.render([{"role": "user", "content": "Q"}], [(1, True)])
        process.close()
    assert str(error.value) in (
        "chat template: was stopped: it takes too much time or memory for a conversation",
        "chat template: takes too much memory",
        "chat template: maximum recursion depth exceeded",
    )


def test_a_stopped_template_can_be_asked_again():
    process = TemplateProcess("{{ messages[0].content }}")
    assert process.render([{"role": "user", "content": "é"}], [(1, True)]) == ["é"]
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    with pytest.raises(InputError, match="was stopped"):
        process.render([{"role": "user", "content": "é"}], [(1, True)])
    assert process.render([{"role": "user", "content": "é"}], [(1, True)]) == ["é"]
    process.close()


def test_files_cannot_be_opened_where_it_is_rendered():
    """Behind the sandbox: the process itself has no room for another file."""
    import subprocess
    import sys

    code = (
        f"import runpy; worker = runpy.run_path({template_worker.__file__!r}); worker['_limit']()\n"
        "try:\n    open('/etc/hostname')\nexcept OSError as error:\n    print(error.errno)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "24\n"  # too many open files


def test_what_is_refused(bind):
    with pytest.raises(InputError, match="its tokenizer brings none; give one of the named styles"):
        bind_style(get_style("template"), gpt2_tokenizer())
    with pytest.raises(InputError, match="header_in_prompt: must be true with prompt_style templ"):
        get_style("template", header_in_prompt=False)
    style, tokenizer = bind(CHATML)
    with pytest.raises(InputError, match=r"messages\[1\]: a user's message cannot carry loss with"):
        tokenize_conversation(TALK, style, tokenizer, Masking(True, ["user"]))
