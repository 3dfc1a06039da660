"""Llama, SmolLM2, Qwen2.5 and Qwen3 leave as GPT-2 does, and are the same model on the other side.

llama.cpp's own server is asked in `test_export_llama_cpp_family.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from lightning_sft import load_model
from lightning_sft.common.errors import InputError
from lightning_sft.data.chat_template import jinja_template
from lightning_sft.data.encoding import encode_prompt
from lightning_sft.data.entries import Entry
from lightning_sft.data.find_tokenizer import is_llama, read_tokenizer
from lightning_sft.data.gguf_vocabulary import vocabulary_of
from lightning_sft.data.hf_tokenizer import HFTokenizer
from lightning_sft.data.prompts import get_style
from lightning_sft.data.tokenizer import gpt2_tokenizer
from lightning_sft.decoding.generation import generate
from lightning_sft.exporting import export as export_module
from lightning_sft.exporting import export_hf, gguf_model, verify_export
from lightning_sft.models.found_config import found_config
from lightning_sft.models.loading import load_weights, make_model
from support.gguf_package import read_gguf
from support.runs import newest_checkpoint, run, write_config
from support.tiny_families import KINDS, NUM_TOKENS, make_tokenizer, write_family
from support.tiny_run import make_tiny

ENTRIES = [
    Entry("What is the capital of France?", "", ""),
    Entry("Rewrite the sentence in the past tense.", "She walks to school  every day.\n", ""),
    Entry("Translate: “Grüße aus Zürich”, 日本語, naïve 🙂", "e\u0301 1234567 12.5", ""),
    Entry("I'll say WE'VE\t\tseen  it.\n\n", "", ""),
]
TEXTS = [
    "Hello world",
    "  two  spaces\n\n\nand 12345 3.14 x==y",
    "it's they'll I'D 1",
    "日本語 🙂",
    "",
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """`folder_of(kind)`: where a tiny model of that kind lies."""
    made: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_family(tmp_path_factory.mktemp(kind) / "hf", kind)
        return made[kind]

    return find


def export(source: Path, out: Path, format: str, kind: str, *options: object) -> int:
    given = ["--format", format, "--out", out, "--prompt_style", KINDS[kind].style]
    return run("export", "--ckpt_path", source, *given, *options)


@pytest.fixture
def few_tokens(monkeypatch) -> None:
    monkeypatch.setattr(verify_export, "PROBES", verify_export.PROBES[:3])
    monkeypatch.setattr(verify_export, "NUM_TOKENS", 6)


# --- transformers ---


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_answers_as_we_do(kind, folder_of, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert export(folder_of(kind), out, "hf", kind, "--verify") == 0
    assert "greedy tokens equal on 10 of 10" in capsys.readouterr().out
    model = load_model(folder_of(kind), device="cpu", prompt_style=KINDS[kind].style)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert type(theirs).__name__ == KINDS[kind].class_name
    for entry in ENTRIES:
        ids = encode_prompt(entry, model.style, model.tokenizer)
        message = {"role": "user", "content": entry.instruction, "input": entry.input}
        given = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert given["input_ids"].tolist() == [ids]
        end = model.tokenizer.eos_token_id
        ours = generate(model.model, [ids], max_new_tokens=12, eos_token_id=end)[0]
        said = theirs.generate(**given, max_new_tokens=12)[0, len(ids) :].tolist()
        assert [token for token in said if token != end] == ours
        along = torch.tensor([ids + ours])
        with torch.no_grad():
            difference = (theirs(along).logits - model.model(along)).abs().max()
        assert difference < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_tokenizes_as_we_do(kind, folder_of, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert export(folder_of(kind), tmp_path / "out", "hf", kind) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = make_tokenizer(kind)
    begin = [] if ours.bos_token_id is None else [ours.bos_token_id]
    for text in TEXTS:
        assert theirs(text)["input_ids"] == begin + ours.encode(text)
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eos_token_id
    assert theirs.bos_token_id == ours.bos_token_id
    assert theirs.model_max_length == 256
    assert theirs("<think>", add_special_tokens=False)["input_ids"] == ours.encode("<think>")


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_folder_holds(kind, folder_of, tmp_path):
    """A tied head once, the rotations' scaling, the tokens that begin and end a text."""
    out = tmp_path / "out"
    assert export(folder_of(kind), out, "hf", kind) == 0
    config, tokenizer = KINDS[kind].config, make_tokenizer(kind)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not config.tie_embeddings  # noqa: SIM118
    facts = json.loads((out / "config.json").read_text())
    assert facts["tie_word_embeddings"] is config.tie_embeddings
    assert (facts["rope_scaling"] is not None) is (config.rope_freq is not None)
    assert found_config(str(out)) == config
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    assert facts.items() >= ids.items()
    assert "pad_token_id" not in facts  # transformers would not train its row any more
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings.items() >= (ids | {"pad_token_id": tokenizer.eos_token_id}).items()
    # An export is weights like any other, with its tokenizer and template.
    assert read_tokenizer(out).encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    loaded = load_model(out, device="cpu", prompt_style=KINDS[kind].style)
    assert_same(loaded.model, make_tiny(config))


def assert_same(left: Any, right: Any) -> None:
    assert left.config == right.config
    pairs = zip(left.named_parameters(), right.named_parameters(), strict=True)
    for (name, ours), (other, theirs) in pairs:
        assert name == other
        assert torch.equal(ours, theirs), name


# --- GGUF ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_comes_back_to_the_bit(kind, folder_of, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(folder_of(kind), out, "gguf", kind, "--verify") == 0
    assert "greedy tokens equal on 10 of 10" in capsys.readouterr().out
    (path,) = out.glob("*.gguf")
    loaded = load_model(path, device="cpu", prompt_style=KINDS[kind].style)
    assert_same(loaded.model, make_tiny(KINDS[kind].config))
    again, tokenizer = loaded.tokenizer, make_tokenizer(kind)
    assert isinstance(again, HFTokenizer)
    assert again.name == tokenizer.name  # the same to the letter
    assert again.chat_template == jinja_template(loaded.style, KINDS[kind].bos)
    assert (again.eos_token_id, again.bos_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_says_all_that_llama_cpp_asks_for(kind, folder_of, tmp_path):
    out = tmp_path / "out"
    assert export(folder_of(kind), out, "gguf", kind) == 0
    (path,) = out.glob("*.gguf")
    fields, tensors = read_gguf(path)
    config, tokenizer = KINDS[kind].config, make_tokenizer(kind)
    architecture = fields["general.architecture"]
    assert architecture == {"qwen2.5": "qwen2", "qwen3": "qwen3"}.get(kind, "llama")
    of_model = {
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_base,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.norm_eps),
    }
    assert {key: fields[f"{architecture}.{key}"] for key in of_model} == of_model
    special, turn_end = tokenizer.special_tokens, get_style(KINDS[kind].style).end
    of_text = {
        "model": "gpt2",
        "pre": KINDS[kind].cut,
        "eos_token_id": tokenizer.eos_token_id,
        "eot_token_id": special[turn_end],
        "bos_token_id": special[KINDS[kind].bos or KINDS[kind].eos],
        "add_bos_token": KINDS[kind].bos is not None,
    }
    assert {key: fields[f"tokenizer.ggml.{key}"] for key in of_text} == of_text
    types, tokens = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.tokens"]
    assert len(types) == len(tokens) == len(set(tokens)) == config.vocab_size
    assert [types[special[name]] for name in ("<|im_end|>", "<think>")] == [3, 4]
    assert set(types[:NUM_TOKENS]) == {1, 3, 4}
    assert set(types[NUM_TOKENS:]) == {5}  # rows that only fill up the embedding
    assert ("output.weight" in tensors) is not config.tie_embeddings
    assert ("rope_freqs.weight" in tensors) is (config.rope_freq is not None)
    if config.rope_freq is not None:  # the fast as they are, the slow by the whole factor
        factors = tensors["rope_freqs.weight"]
        assert (factors[0], factors[-1], len(factors)) == (1.0, 32.0, config.head_dim // 2)
    modelfile = (out / "Modelfile").read_text()
    assert f'PARAMETER stop "{turn_end}"' in modelfile
    assert "GPT-2" not in modelfile


@pytest.mark.parametrize("gguf_type", ["f16", "q8_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_smaller_types_round_as_said(kind, gguf_type, folder_of, tmp_path, capsys, few_tokens):
    options = ["--gguf_type", gguf_type, "--verify"]
    assert export(folder_of(kind), tmp_path / "out", "gguf", kind, *options) == 0
    said = capsys.readouterr().out
    assert f"rounding to {gguf_type}" in said
    assert "verified: greedy tokens equal on 3 of 3" in said


def test_a_tokenizer_that_llama_cpp_has_no_name_for(folder_of, tmp_path, capsys):
    source = folder_of("smollm2")
    content = json.loads((source / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    odd = tmp_path / "odd"
    odd.mkdir()
    for file in source.iterdir():
        (odd / file.name).symlink_to(file)
    (odd / "tokenizer.json").unlink()
    (odd / "tokenizer.json").write_text(json.dumps(content))
    assert export(odd, tmp_path / "out", "gguf", "smollm2") == 2
    said = capsys.readouterr().err
    assert "cuts text in a way that llama.cpp has no name for here (known: gpt-2, smollm" in said
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
    assert export(odd, tmp_path / "out", "hf", "smollm2") == 0  # control


def test_llama_3_takes_words_as_they_are(folder_of):
    """llama.cpp ignores merges for this name, so a tokenizer that heeds them is another."""
    tokenizer = make_tokenizer("llama3.2")
    content = json.loads(tokenizer.backend.to_str())
    content["model"]["ignore_merges"] = False
    from tokenizers import Tokenizer

    other = HFTokenizer(Tokenizer.from_str(json.dumps(content)), "a test", "<|eot_id|>")
    with pytest.raises(InputError, match=r"llama\.cpp has no name for"):
        vocabulary_of(other, 1000)
    assert vocabulary_of(tokenizer, 1000).cut == "llama-bpe"
    assert vocabulary_of(gpt2_tokenizer(), 50257).cut == "gpt-2"


# --- The book ---


@pytest.mark.parametrize("kind", ["llama3.2", "llama3.2-base", "smollm2", "qwen3"])
def test_the_books_code_loads_the_pth(kind, folder_of, tmp_path, few_tokens):
    name = ("qwen3", "Qwen3Model") if kind == "qwen3" else ("llama3", "Llama3Model")
    module = pytest.importorskip(f"llms_from_scratch.{name[0]}")
    out = tmp_path / "out"
    assert export(folder_of(kind), out, "pth", kind, "--verify") == 0
    (path,) = out.glob("*-sft.pth")
    card = (out / "README.md").read_text()
    assert f"from llms_from_scratch.{name[0]} import {name[1]}" in card
    config = json.loads((out / "config.json").read_text()) | {"dtype": torch.float32}
    theirs = getattr(module, name[1])(config)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    ids = torch.arange(60)[None]
    with torch.no_grad():
        expected = make_tiny(KINDS[kind].config)(ids)
        torch.testing.assert_close(theirs.eval()(ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_code_loads_the_pth(kind, folder_of, tmp_path, few_tokens):
    """Also where the book has no class; its tokenizer lies beside it."""
    out = tmp_path / "out"
    assert export(folder_of(kind), out, "pth", kind, "--verify") == 0
    (path,) = out.glob("*-sft.pth")
    loaded = load_model(path, device="cpu", prompt_style=KINDS[kind].style)
    assert_same(loaded.model, make_tiny(KINDS[kind].config))
    assert loaded.tokenizer.name == make_tokenizer(kind).name
    assert is_llama(str(path))  # by the fields in config.json, without torch


# --- Runs ---


@pytest.fixture(scope="module", params=["whole", "adapters"])
def trained(request, tmp_path_factory) -> Path:
    """The checkpoint of a run; the adapted head of the second is tied no more."""
    folder = tmp_path_factory.mktemp("trained")
    lora = {"rank": 2, "targets": ["W_query", "W_value", "ff.*", "out_head"]}
    config = write_config(
        folder,
        model__architecture="auto",
        model__weights=str(write_family(folder / "hf", "smollm2")),
        model__optimizer__init_args={"lr": 2e-2},
        model__lora=lora if request.param == "adapters" else None,
        data__prompt_style="chatml",
        data__max_length=256,
        trainer__max_epochs=1,
    )
    assert run("fit", "--config", config) == 0
    return newest_checkpoint(folder / "runs" / "tiny" / "version_0")


@pytest.mark.parametrize("format", ["hf", "gguf", "pth"])
def test_a_run_leaves_in_every_format(trained, tmp_path, few_tokens, format):
    out = tmp_path / "out"
    options = ["--format", format, "--out", out, "--verify"]
    assert run("export", "--ckpt_path", trained, *options) == 0
    expected = load_model(trained, device="cpu")
    assert expected.style.name == "chatml"
    source = out if format == "hf" else next(out.glob(f"*.{format}"))
    with torch.device("meta"):
        model = make_model(found_config(str(source)))
    load_weights(model, str(source))
    assert_same(model.eval(), expected.model)
    start = make_tiny(KINDS["smollm2"].config)
    assert not torch.equal(
        model.trf_blocks[0].att.W_query.weight, start.trf_blocks[0].att.W_query.weight
    )
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"] == ["llama", "instruction-tuning", "lightning-sft"]
    assert "The answer ends with `<|im_end|>`." in card
    assert "<|im_start|>user\nRewrite the sentence" in card
    assert str(trained.parents[4]) not in card


# --- A wrong export fails --verify, and does not appear ---


def change_tensors(monkeypatch, change):
    right = export_hf.iterate_hf
    for module in (export_hf, gguf_model):
        monkeypatch.setattr(module, "iterate_hf", lambda *model: change(right(*model)))


def swap_gate_and_up(monkeypatch):
    def swapped(pairs):
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        for name, tensor in pairs:
            part = name.split(".")[-2]
            yield name.replace(part, other.get(part, part)), tensor

    change_tensors(monkeypatch, swapped)


def drop_head(monkeypatch):
    def without_head(pairs):
        yield from (pair for pair in pairs if pair[0] != "lm_head.weight")

    change_tensors(monkeypatch, without_head)


def drop_bias(monkeypatch):
    def without(pairs):
        for name, tensor in pairs:
            yield name, torch.zeros_like(tensor) if name.endswith("q_proj.bias") else tensor

    change_tensors(monkeypatch, without)


def forget_the_order_of_rows(monkeypatch):
    monkeypatch.setattr(gguf_model, "pairs_from_halves", lambda weight, heads: weight)


def forget_the_scaling(monkeypatch):
    right = export_hf.hf_config
    monkeypatch.setattr(
        export_hf, "hf_config", lambda config: right(config) | {"rope_scaling": None}
    )


def forget_the_factors(monkeypatch):
    right = gguf_model._rope_factors
    monkeypatch.setattr(gguf_model, "_rope_factors", lambda config: torch.ones_like(right(config)))


def swap_in_the_pth(monkeypatch):
    right = export_module.book_state_dict

    def swapped(model):
        state = dict(right(model))
        first, second = (f"trf_blocks.0.ff.fc{number}.weight" for number in (1, 2))
        state[first], state[second] = state[second], state[first]
        return state

    monkeypatch.setattr(export_module, "book_state_dict", swapped)


@pytest.mark.parametrize(
    ("format", "kind", "mistake"),
    [
        ("hf", "llama3.2", swap_gate_and_up),
        ("hf", "llama3.2", forget_the_scaling),
        ("hf", "qwen3", drop_head),
        ("hf", "qwen2.5", drop_bias),
        ("gguf", "smollm2", swap_gate_and_up),
        ("gguf", "smollm2", forget_the_order_of_rows),
        ("gguf", "llama3.2", forget_the_factors),
        ("gguf", "qwen3", drop_head),
        ("pth", "qwen3", swap_in_the_pth),
    ],
)
def test_a_wrong_export_fails_the_check(
    format, kind, mistake, folder_of, tmp_path, monkeypatch, capsys, few_tokens
):
    if format == "hf":
        pytest.importorskip("transformers")
    out = tmp_path / "out"
    source = folder_of(kind)
    with monkeypatch.context() as patch:
        mistake(patch)
        assert export(source, out, format, kind, "--verify") == 3
        said = capsys.readouterr().err
        assert said.startswith("error: verify: the export")
        assert len(said.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []
        assert export(source, out, format, kind) == 0  # control: it is the check that finds it
    assert export(source, out, format, kind, "--verify") == 0
