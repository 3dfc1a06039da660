"""The same tokens carry loss as with TRL's `assistant_only_loss`, on 200 random conversations."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lightning_sft import Conversation
from lightning_sft.data.batching import collate
from lightning_sft.data.conversation_rows import tokenize_conversation
from lightning_sft.data.find_tokenizer import read_tokenizer
from lightning_sft.data.prompts import get_style
from lightning_sft.data.segments import Masking
from support.talks import make_talk
from support.tiny_run import write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.process]
# ChatML with the marks by which TRL knows what an assistant says.
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}{% generation %}{{- message.content + '<|im_end|>' -}}\
{% endgeneration %}{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}"""


def test_the_same_tokens_carry_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    trl = pytest.importorskip("trl")
    write_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template, theirs.pad_token = TEMPLATE, "<|endoftext|>"
    generator = random.Random(0)
    talks = [make_talk(generator) for _ in range(200)]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=266, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"), assistant_only_loss=True, max_length=None,
            report_to="none", use_cpu=True, bf16=False,
        ),
        train_dataset=datasets.Dataset.from_list([{"messages": talk} for talk in talks]),
        processing_class=theirs,
    )  # fmt: skip
    ours, style = read_tokenizer(tmp_path), get_style("chatml")
    for talk, prepared in zip(talks, trainer.train_dataset, strict=True):
        batch = trainer.data_collator([prepared])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        [row] = tokenize_conversation(Conversation(talk), style, ours, Masking(mask_prompt=True))
        made = collate([row], eos_token_id=ours.eos_token_id, mask_prompt=True)
        # They go on with the line break behind the last turn, which carries no loss.
        assert ids == [*row.ids, ours.eos_token_id, 10]
        assert labels == [-100, *made["targets"][0].tolist(), -100]
