"""The real SmolLM2-135M-Instruct beside transformers: the same weights, the same greedy tokens."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_sft.common.gguf_header import read_gguf_header
from lightning_sft.data.datamodule import InstructionDataModule
from lightning_sft.data.entries import Entry
from lightning_sft.data.hf_tokenizer import HFTokenizer
from lightning_sft.data.prompts import get_style
from lightning_sft.decoding.generation import generate
from lightning_sft.models.llama_weights import to_hf
from support.real_model import real_gguf as _real_gguf
from support.runs import read_metrics, run

pytestmark = pytest.mark.slow
real_gguf = pytest.fixture(scope="session")(_real_gguf)


def ask(entry: Entry, tokenizer: HFTokenizer) -> list[int]:
    """The prompt as SmolLM2's own template has it."""
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    system = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = [system, f"user\n{entry.instruction}\n{entry.input}".rstrip()]
    newline = tokenizer.encode("\n")
    ids = [token for t in turns for token in (start, *tokenizer.encode(t), end, *newline)]
    return [*ids, start, *tokenizer.encode("assistant\n")]


def test_greedy_tokens_equal_transformers(real_gguf: Path, book_entries: list[Entry]):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from support.tiny_gguf import load

    model = load(real_gguf)
    tokenizer = HFTokenizer.from_gguf(read_gguf_header(real_gguf).facts)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        real_gguf.parent, gguf_file=real_gguf.name, dtype=torch.float32
    ).eval()
    found = to_hf(model.state_dict())
    expected = dict(theirs.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    entries = book_entries[:20]
    chats = [ask(entry, tokenizer) for entry in entries[:10]]
    plain = [tokenizer.encode(get_style("alpaca").prompt(entry)) for entry in entries[10:]]
    prompts = chats + plain
    answers = generate(model, prompts, max_new_tokens=40, eos_token_id=tokenizer.eos_token_id)
    assert "The capital of Indonesia is Jakarta." in tokenizer.decode(answers[12])
    differences = []
    for prompt, answer in zip(prompts, answers, strict=True):
        # If each token is their first choice behind those before it, theirs would write the same.
        whole = [*prompt, *answer]
        if len(answer) < 40:
            whole.append(tokenizer.eos_token_id)
        with torch.no_grad():
            logits = theirs(torch.tensor([whole])).logits[0]
            differences.append((model(torch.tensor([whole]))[0] - logits).abs().max().item())
        chosen = logits.argmax(-1)[len(prompt) - 1 : -1]
        assert chosen.tolist() == whole[len(prompt) :], tokenizer.decode(prompt)
    assert max(differences) < 1e-3  # their eps is what float32 makes of 1e-5


def test_the_first_twenty_losses_equal_a_transformers_loop(
    real_gguf: Path, book_data_path: Path, tmp_path: Path, monkeypatch
):
    """The shipped configuration, shared prefixes and all, beside padded batches of the same ids."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    options = ["--config", "smollm2-135m.yaml", "--model.weights", real_gguf, "--run.name", "real"]
    options += ["--data.path", book_data_path, "--trainer.accelerator", "cpu"]
    options += ["--trainer.max_steps", 20, "--trainer.log_every_n_steps", 1, "--samples.indices=[]"]
    options += ["--trainer.limit_val_batches", 0, "--loss_curve.every_n_steps", 0]
    assert run("fit", *options) == 0
    ours = read_metrics(tmp_path / "runs" / "real" / "version_0", "train_loss")

    data = InstructionDataModule(
        str(book_data_path), batch_size=8, prompt_style="chatml", mask_prompt=True, max_length=1024
    )
    data.tokenizer = HFTokenizer.from_gguf(read_gguf_header(real_gguf).facts)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        real_gguf.parent, gguf_file=real_gguf.name, dtype=torch.float32
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1, fused=True)
    theirs: list[float] = []
    for batch in itertools.islice(data.train_dataloader(), 20):
        logits = model(batch["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    print("losses", ours, "theirs", theirs)
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, abs=1e-4)
