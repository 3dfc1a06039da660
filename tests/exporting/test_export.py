"""Every path out leads to the same model: the book's file, transformers' folder, llama.cpp's GGUF.

What transformers loads is asked by transformers itself; llama.cpp's own server is asked in
`test_export_llama_cpp.py`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_sft.common import files
from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.data.chat_template import jinja_template
from lightning_sft.data.entries import Entry, read_entries
from lightning_sft.data.find_tokenizer import is_llama
from lightning_sft.data.prompts import get_style
from lightning_sft.data.tokenizer import END_OF_TEXT, gpt2_tokenizer
from lightning_sft.decoding.generation import GenerationConfig, generate
from lightning_sft.exporting import export as export_module
from lightning_sft.exporting import (
    export_gguf,
    export_hf,
    exported_program,
    gguf_model,
    verify_export,
)
from lightning_sft.exporting.export import check_target, new_folder
from lightning_sft.exporting.export_gguf import (
    modelfile,
    quantize,
    unquantize,
    write_gguf,
)
from lightning_sft.exporting.export_hf import generation_config, hf_config, write_safetensors
from lightning_sft.exporting.exported_program import Program
from lightning_sft.exporting.gguf_model import iterate_gguf
from lightning_sft.exporting.model_card import model_card
from lightning_sft.exporting.verify_export import ask, check, compare, make_prompts, round_model
from lightning_sft.models.files import read_tensors
from lightning_sft.models.gguf_file import to_hf_names
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.gpt2_weights import from_hf, iterate_hf, to_hf
from lightning_sft.models.loading import load_weights
from lightning_sft.models.origin import Origin, public_name, read_origin
from lightning_sft.models.ready import load_for_answers
from lightning_sft.models.registry import ARCHITECTURES, GPT2
from lightning_sft.models.tensor_files import check_digest
from support.gguf_package import read_gguf
from support.runs import newest_checkpoint, run, write_config, write_data

SMALL = GPTConfig(vocab_size=97, context_length=48, emb_dim=32, n_heads=4, n_layers=2)
WORDS = GPTConfig(context_length=64, emb_dim=32, n_heads=4, n_layers=2)  # GPT-2's vocabulary


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The checkpoint of a real, short run whose head has learnt away from its embedding."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, model__optimizer__init_args={"lr": 2e-2}, trainer__max_epochs=1)
    assert run("fit", "--config", config) == 0
    return newest_checkpoint(folder / "runs" / "tiny" / "version_0")


@pytest.fixture(scope="module")
def hf_folder(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "exported"
    assert run("export", "--ckpt_path", trained, "--format", "hf", "--out", out) == 0
    return out


@pytest.fixture
def few_tokens(monkeypatch) -> None:
    """Three short answers; a GGUF without its 100,000 strings, which take seconds to read."""
    monkeypatch.setattr(export_gguf, "_add_tokenizer", lambda *arguments: None)
    monkeypatch.setattr(verify_export, "PROBES", verify_export.PROBES[:3])
    monkeypatch.setattr(verify_export, "NUM_TOKENS", 6)
    monkeypatch.setattr(export_gguf, "_add_tokenizer", lambda *arguments: None)


def our_program(model: GPTModel) -> Program:
    return exported_program.our_program(model, END_OF_TEXT)


def export_to(out: Path, checkpoint: Path, *options: object) -> int:
    return run("export", "--ckpt_path", checkpoint, "--out", out, *options)


def write_and_load_hf(model: GPTModel, folder: Path) -> exported_program.Program:
    """Without the check of the vocabulary, so that small ones do."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    write_safetensors(model, folder / "model.safetensors")
    return exported_program.load_transformers(folder, END_OF_TEXT)


# --- The same model on the other side ---


def test_transformers_answers_as_we_do(trained, hf_folder):
    transformers = pytest.importorskip("transformers")
    model, style = load_for_answers(str(trained))
    assert (model.out_head.weight - model.tok_emb.weight).abs().max() > 0.1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_folder)
    entries = read_entries(trained.parents[4] / "data.json")[:20]
    for entry in entries:
        ids = gpt2_tokenizer().encode(style.prompt(entry))
        message = {"role": "user", "content": entry.instruction, "input": entry.input}
        given = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert given["input_ids"].tolist() == [ids]
        said = theirs.generate(**given, max_new_tokens=12)[0, len(ids) :].tolist()
        ours = generate(model, [ids], max_new_tokens=12)[0]
        assert [token for token in said if token != END_OF_TEXT] == ours
        along = torch.tensor([ids + ours])
        with torch.no_grad():
            difference = (theirs(along).logits - model(along)).abs().max()
        assert difference < 1e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_transformers_logits_of_every_kind_of_model(tmp_path, make_model, tied, qkv_bias):
    pytest.importorskip("transformers")
    config = dataclasses.replace(SMALL, tie_embeddings=tied, qkv_bias=qkv_bias)
    model = make_model(config)
    ids = list(range(40))
    theirs = write_and_load_hf(model, tmp_path / "hf").logits(ids)
    torch.testing.assert_close(theirs, our_program(model).logits(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", GPT2.sizes)
def test_every_size_at_depth_one(tmp_path, make_model, name):
    """Real width and heads; depth, vocabulary and context are cut."""
    pytest.importorskip("transformers")
    config = dataclasses.replace(ARCHITECTURES[name], n_layers=1, vocab_size=64, context_length=32)
    model = make_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)  # logits of GPT-2's magnitude
    ids = list(range(30))
    expected = our_program(model).logits(ids)
    program = write_and_load_hf(model, tmp_path / "hf")
    torch.testing.assert_close(program.logits(ids), expected, atol=1e-4, rtol=0)
    state = from_hf(
        to_hf_names(dict(iterate_gguf(model.state_dict(), config)), "gpt2", config), config
    )
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", GPT2.sizes)
def test_shapes_of_every_size_at_full_depth(name):
    """Names and shapes are those of transformers' model and come back as ours."""
    transformers = pytest.importorskip("transformers")
    config = ARCHITECTURES[name]
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in GPTModel(config).state_dict().items()}
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(config)))
    state = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    written = {key: tensor.shape for key, tensor in iterate_hf(state)}
    assert written == {key: value.shape for key, value in theirs.state_dict().items()}
    for key, tensor in iterate_gguf(state, config):
        assert key.endswith("bias") == (tensor.ndim == 1) or "norm" in key
    back = {key: torch.zeros(1).expand(shape) for key, shape in written.items()}
    assert {key: value.shape for key, value in from_hf(back, config).items()} == shapes


def test_safetensors_file_is_what_the_library_writes(tmp_path, make_model):
    model = make_model(SMALL)
    write_safetensors(model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found, expected = load_file(tmp_path / "model.safetensors"), to_hf(model.state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_books_code_loads_the_pth(trained, tmp_path, few_tokens):
    chapter = pytest.importorskip("llms_from_scratch.ch04")
    assert export_to(tmp_path / "pth", trained, "--format", "pth", "--verify") == 0
    (path,) = (tmp_path / "pth").glob("*-sft.pth")
    config = json.loads((tmp_path / "pth" / "config.json").read_text())
    theirs = chapter.GPTModel(config)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    model, _ = load_for_answers(str(trained))
    ids = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(ids), model(ids), atol=1e-5, rtol=1e-5)


def test_our_own_code_loads_each_export(trained, hf_folder, tmp_path):
    """An export is a source of weights like any other."""
    assert export_to(tmp_path / "pth", trained, "--format", "pth") == 0
    (path,) = (tmp_path / "pth").glob("*.pth")
    model, _ = load_for_answers(str(trained))
    for source in (hf_folder, path):
        with torch.device("meta"):
            other = GPTModel(model.config)
        load_weights(other, str(source))
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(left, right) for left, right in pairs)
        # Also where nobody says its architecture but the config.json beside it.
        assert load_for_answers(str(source))[0].config == model.config
        assert not is_llama(str(source))


# --- Tokenizer, chat template, settings: see also test_chat_template.py ---

TEXTS = [
    "Hello world",
    "  two  spaces\n\n\nand lines\t\ttabs ",
    "naïve café, Grüße, 日本語, 🙂👩‍👩‍👧",
    "it's they'll I'd 12345 3.14 x==y; def f():\n    return {}",
    "### Instruction:\n\n### Response:\n",
    "\u00a0\u2003odd\u0000\x7f",
]


@pytest.mark.parametrize("keep", ["both", "tokenizer.json", "vocab.json"])
def test_transformers_tokenizes_as_we_do(hf_folder, tmp_path, keep):
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(hf_folder, tmp_path / "copy")
    if keep == "tokenizer.json":
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
    elif keep == "vocab.json":
        (folder / "tokenizer.json").unlink()
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), gpt2_tokenizer()
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (END_OF_TEXT,) * 3
    assert theirs("<|endoftext|>")["input_ids"] == [END_OF_TEXT]
    assert theirs.model_max_length == 128
    # What the card says of typed end-of-text.
    typed = theirs("<|endoftext|>", split_special_tokens=True)["input_ids"]
    assert typed == ours.encode("<|endoftext|>")


def test_generation_settings_are_what_transformers_uses(tmp_path):
    transformers = pytest.importorskip("transformers")
    sampling = GenerationConfig(max_new_tokens=7, temperature=0.7)
    for ours, expected in (
        (GenerationConfig(), {"do_sample": False, "max_length": 128, "max_new_tokens": None}),
        (sampling, {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}),
        (dataclasses.replace(sampling, top_k=5, top_p=0.9), {"top_k": 5, "top_p": 0.9}),
    ):
        (tmp_path / "generation_config.json").write_text(
            json.dumps(generation_config(ours, 128, gpt2_tokenizer()))
        )
        theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
        assert theirs.eos_token_id == theirs.pad_token_id == END_OF_TEXT
        assert {name: getattr(theirs, name) for name in expected} == expected


# --- GGUF ---


def test_gguf_says_all_that_llama_cpp_asks_for(trained, tmp_path):
    assert export_to(tmp_path / "out", trained, "--format", "gguf") == 0
    fields, tensors = read_gguf(tmp_path / "out" / "tiny-f32.gguf")
    model, style = load_for_answers(str(trained))
    assert fields["general.architecture"] == "gpt2"
    assert fields["gpt2.context_length"] == model.config.context_length
    assert fields["gpt2.attention.head_count"] == model.config.n_heads
    assert fields["gpt2.feed_forward_length"] == 4 * model.config.emb_dim
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(fields["tokenizer.ggml.tokens"]) == model.config.vocab_size
    assert fields["tokenizer.ggml.tokens"][END_OF_TEXT] == "<|endoftext|>"
    assert fields["tokenizer.ggml.eos_token_id"] == END_OF_TEXT
    assert len(fields["tokenizer.ggml.merges"]) == 50000
    assert fields["tokenizer.ggml.merges"][:2] == ["Ġ t", "Ġ a"]
    assert fields["tokenizer.chat_template"] == jinja_template(style)
    assert torch.equal(tensors["output.weight"], model.out_head.weight)
    assert not torch.equal(tensors["output.weight"], tensors["token_embd.weight"])


def test_spare_rows_of_the_embedding_have_names():
    """llama.cpp wants as many tokens as rows; 50304 is the multiple of 64 that many train with."""
    said = {}

    class Writer:
        def __getattr__(self, name):
            return lambda value: said.update({name: value})

    config = dataclasses.replace(WORDS, vocab_size=50304)
    style = get_style("alpaca")
    export_gguf._add_tokenizer(Writer(), gpt2_tokenizer(), config.vocab_size, style)
    tokens = said["add_token_list"]
    assert len(tokens) == len(set(tokens)) == len(said["add_token_types"]) == 50304
    assert set(said["add_token_types"][50257:]) == {export_gguf.load_gguf().TokenType.UNUSED}


def test_a_tied_gguf_has_no_head(tmp_path, make_model, few_tokens):
    config = dataclasses.replace(WORDS, tie_embeddings=True)
    model, style = make_model(config), get_style("alpaca")
    write_gguf(model, gpt2_tokenizer(), style, "a", tmp_path / "a.gguf")
    _, tensors = read_gguf(tmp_path / "a.gguf")
    assert "output.weight" not in tensors
    back = from_hf(to_hf_names(tensors, "gpt2", config), config)
    assert all(torch.equal(back[name], value) for name, value in model.named_parameters())


@pytest.mark.parametrize(("kind", "bits"), [("f16", 16), ("q8_0", 8.5)])
def test_smaller_types_round_as_said(trained, tmp_path, capsys, few_tokens, kind, bits):
    options = ["--format", "gguf", "--gguf_type", kind, "--verify"]
    assert export_to(tmp_path / "out", trained, *options) == 0
    said = capsys.readouterr().out
    assert f"rounding to {kind}" in said
    assert "verified: greedy tokens equal on 3 of 3" in said
    path = tmp_path / "out" / f"tiny-{kind}.gguf"
    model, _ = load_for_answers(str(trained))
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "pos" not in n)
    rest = sum(p.numel() for p in model.parameters()) - matrices
    fields = 10_000  # names, places, padding
    assert 0 < path.stat().st_size - (matrices * bits / 8 + rest * 4) < fields


def test_rounding_is_within_half_a_step():
    tensor = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    step = tensor.view(8, 2, 32).abs().amax(-1, keepdim=True) / 127
    error = (unquantize(quantize(tensor, "Q8_0"), "Q8_0") - tensor).view(8, 2, 32).abs()
    assert (error <= 0.57 * step).all()  # half a step, and the step itself kept in half precision
    assert error.max() > 0
    half = unquantize(quantize(tensor, "F16"), "F16")
    assert torch.equal(half, tensor.half().float())


def test_rows_that_fit_no_block_of_32_stay_in_half_precision(tmp_path, make_model, few_tokens):
    config = dataclasses.replace(WORDS, emb_dim=40)
    model, style = make_model(config), get_style("alpaca")
    write_gguf(model, gpt2_tokenizer(), style, "a", tmp_path / "a.gguf", "q8_0")
    _, tensors = read_gguf(tmp_path / "a.gguf")
    assert torch.equal(tensors["output.weight"], model.out_head.weight.half().float())
    assert torch.equal(tensors["position_embd.weight"], model.pos_emb.weight)
    round_model(model, "q8_0")
    expected = ask(
        our_program(model), make_prompts(style, config, gpt2_tokenizer()), config.context_length
    )
    assert check(tmp_path, "gguf", expected, config.context_length).difference == 0.0


def test_modelfile():
    text = modelfile(
        get_style("alpaca"), gpt2_tokenizer(), WORDS, GenerationConfig(temperature=0.5), "a.gguf"
    )
    assert "FROM ./a.gguf\n" in text
    asked = get_style("alpaca").prompt(Entry("{{ .Prompt }}", "", ""))
    before, after = asked.split("{{ .Prompt }}")
    system = "{{ if .System }}{{ .System }}\n\n{{ end }}"
    assert f'TEMPLATE """{before}{system}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}\n\n"""' in text
    for line in ("num_ctx 64", "temperature 0.5", "top_k 0", 'stop "<|endoftext|>"'):
        assert f"\nPARAMETER {line}\n" in text
    odd = {"instruction": '"{instruction}"', "input": "{input}", "header": "{{A}}", "end": "<|x|>"}
    text = modelfile(get_style(odd), gpt2_tokenizer(), WORDS, GenerationConfig(), "a.gguf")
    assert '{{ "\\"" }}{{ if .System }}' in text
    assert '{{ .Prompt }}{{ "\\"{{A}}" }}{{ .Response }}' in text
    assert '\nPARAMETER stop "<|x|>"\n' in text


# --- A wrong export fails --verify, and does not appear ---


def say_tied(monkeypatch):
    right = export_hf.hf_config
    monkeypatch.setattr(
        export_hf, "hf_config", lambda config: right(config) | {"tie_word_embeddings": True}
    )


def change_tensors(monkeypatch, change):
    """Whatever is written gets its tensors from `change` of the right ones."""
    right = export_hf.iterate_hf
    for module in (export_hf, gguf_model):
        monkeypatch.setattr(module, "iterate_hf", lambda *model: change(right(*model)))


def drop_head(monkeypatch):
    def without_head(pairs):
        yield from (pair for pair in pairs if pair[0] != "lm_head.weight")

    change_tensors(monkeypatch, without_head)


def tie_wholly(monkeypatch):
    say_tied(monkeypatch)
    drop_head(monkeypatch)


def forget_transpose(monkeypatch):
    """Of a square matrix, which no shape check can see."""

    def flipped(pairs):
        for name, tensor in pairs:
            yield name, tensor.T if "attn.c_proj.weight" in name else tensor

    change_tensors(monkeypatch, flipped)


def swap_query_and_key(monkeypatch):
    def swapped(pairs):
        for name, tensor in pairs:
            if "c_attn" in name:
                query, key, value = tensor.chunk(3, -1)
                tensor = torch.cat([key, query, value], -1)
            yield name, tensor

    change_tensors(monkeypatch, swapped)


def tie_in_pth(monkeypatch):
    right = export_module.book_state_dict
    monkeypatch.setattr(
        export_module,
        "book_state_dict",
        lambda model: right(model) | {"out_head.weight": model.tok_emb.weight},
    )


def leave_masks_out(monkeypatch):
    monkeypatch.setattr(export_module, "book_state_dict", lambda model: model.state_dict())


def without_transformers(monkeypatch):
    right = exported_program.importlib.util.find_spec
    monkeypatch.setattr(
        exported_program.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "transformers" else right(name, *rest),
    )


def say_tied_without_transformers(monkeypatch):
    say_tied(monkeypatch)
    without_transformers(monkeypatch)


@pytest.mark.parametrize(
    ("format", "mistake", "says"),
    [
        ("hf", say_tied, "output head differs"),
        ("hf", tie_wholly, "is not the original"),
        ("hf", drop_head, "is not the original"),
        ("hf", forget_transpose, "is not the original"),
        ("hf", swap_query_and_key, "is not the original"),
        ("hf", say_tied_without_transformers, "output head differs"),
        ("gguf", drop_head, "is not the original"),
        ("gguf", forget_transpose, "is not the original"),
        ("gguf", swap_query_and_key, "is not the original"),
        ("pth", tie_in_pth, "is not the original"),
        ("pth", leave_masks_out, "lacks the causal masks"),
    ],
)
def test_a_wrong_export_fails_the_check(
    trained, tmp_path, monkeypatch, capsys, few_tokens, format, mistake, says
):
    if format == "hf":
        pytest.importorskip("transformers")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        mistake(patch)
        assert export_to(out, trained, "--format", format, "--verify") == 3
        said = capsys.readouterr().err
        assert says in said
        assert len(said.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []
        # Control: it is the check that finds it.
        assert export_to(out, trained, "--format", format) == 0
    assert export_to(out, trained, "--format", format, "--verify") == 0


def test_without_transformers_our_own_reading_is_the_check(
    trained, tmp_path, monkeypatch, capsys, few_tokens
):
    without_transformers(monkeypatch)
    assert export_to(tmp_path / "out", trained, "--format", "hf", "--verify") == 0
    assert "transformers is not installed" in capsys.readouterr().out


def test_a_near_tie_is_no_difference_and_a_small_shift_is_one(make_model):
    style = get_style("alpaca")
    model = make_model(SMALL)
    program = our_program(model)
    prompts = make_prompts(style, SMALL, gpt2_tokenizer())
    expected = ask(program, prompts, SMALL.context_length)
    exact = compare(program, expected, SMALL.context_length)
    assert (exact.same, exact.difference) == (len(prompts), 0.0)
    with torch.no_grad():
        model.out_head.weight[5] += 1e-3  # about 3e-3 on one of 97 logits
    moved = compare(program, expected, SMALL.context_length)
    assert moved.difference > moved.tolerance
    with pytest.raises(ServiceError, match="is not the original"):
        verify_export.demand(moved)
    broken = dataclasses.replace(exact, difference=float("nan"))
    with pytest.raises(ServiceError):
        verify_export.demand(broken)
    tokens, along = [3, 4], torch.zeros(3, 97)
    along[0, 3] = along[1, 4] = 1.0
    along[1, 9] = 1.0 - 1e-5
    assert verify_export._is_near_tie([3, 9], tokens, along, 1e-4, END_OF_TEXT)
    assert not verify_export._is_near_tie([7, 4], tokens, along, 1e-4, END_OF_TEXT)
    assert not verify_export._is_near_tie([3], tokens, along.expand(3, 97), 1e-4, END_OF_TEXT)
    assert verify_export._is_near_tie([3], tokens, along, 1.0, 9)  # 9 ends that answer


# --- The folder ---


def test_an_older_export_is_replaced_and_nothing_else(trained, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert export_to(out, trained, "--format", "pth") == 0
    assert export_to(out, trained, "--format", "gguf") == 0
    assert not list(out.glob("*.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert export_to(out, trained, "--format", "pth") == 2
    assert "holds notes.txt, which is not of an export" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert export_to(trained.parent, trained, "--format", "pth") == 2  # the checkpoint is in it
    assert export_to(out / "notes.txt", trained, "--format", "pth") == 2
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert export_to(tmp_path / "empty", trained, "--format", "pth") == 0
    (tmp_path / "here").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "here")
        assert export_to(Path(), trained, "--format", "pth") == 2
    assert "is the working directory" in capsys.readouterr().err
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "export.json").write_text("[]")
    with pytest.raises(InputError, match=r"holds export\.json"):
        check_target(tmp_path / "odd")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("mine"),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("export.json"),
    ],
    ids=["file", "folder", "link"],
)
@pytest.mark.parametrize("name", ["thesis.docx", "../thesis.docx", "config.json"])
def test_an_export_is_its_own_files_whatever_its_mark_names(tmp_path, name, make):
    out = tmp_path / "out"
    out.mkdir()
    mark = {"format": "pth", "name": "a", "files": {name: 1, "README.md": 1}}
    (out / "export.json").write_text(json.dumps(mark))
    (out / "README.md").write_text("of an export")
    check_target(out)  # control: these two are
    make(out / name)
    is_ours = name == "config.json" and (out / name).is_file() and not (out / name).is_symlink()
    if is_ours or name.startswith(".."):
        check_target(out)
    else:
        with pytest.raises(InputError, match=f"holds {re.escape(name)}, which is not of"):
            check_target(out)
    with new_folder(out) as folder:  # as if it had come while the new one was made
        (folder / "README.md").write_text("new")
    assert (out / "README.md").read_text() == "new"
    if name.startswith(".."):
        assert (tmp_path / "thesis.docx").exists() or (tmp_path / "thesis.docx").is_symlink()
    elif not is_ours:
        (kept,) = tmp_path.glob(".out.*.old")
        assert [path.name for path in kept.iterdir()] == [name]


@pytest.mark.parametrize("format", ["pth", "hf", "gguf"])
def test_a_flipped_bit_of_an_export_is_noticed(trained, tmp_path, few_tokens, format):
    """100 of 100 places, by the digests in export.json; safetensors and GGUF have none inside."""
    assert export_to(tmp_path / "out", trained, "--format", format) == 0
    (path,) = (p for p in (tmp_path / "out").iterdir() if p.suffix[1:] in (format, "safetensors"))
    read_tensors(path)
    draw = random.Random(0)
    with path.open("rb+") as file:
        for _ in range(100):
            place, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
            for noticed in (True, False):  # flipped, and back
                file.seek(place)
                (old,) = file.read(1)
                file.seek(place)
                file.write(bytes([old ^ 1 << bit]))
                file.flush()
                if noticed:
                    with pytest.raises(InputError, match="is damaged"):
                        check_digest(path)
    read_tensors(path)
    with path.open("rb+") as file:
        file.seek(-1, 2)
        file.write(b"!!")
    with pytest.raises(InputError, match="is damaged"):
        read_tensors(path)


def test_a_lora_base_that_moved_is_named(tmp_path, capsys):
    config = write_config(tmp_path, trainer__max_steps=1, run__name="base")
    assert run("fit", "--config", config) == 0
    base = tmp_path / "runs/base/version_0/gpt2-2M-sft.pth"
    lora = {"rank": 2, "targets": ["out_head"]}
    config = write_config(
        tmp_path, trainer__max_steps=1, model__weights=str(base), model__lora=lora
    )
    assert run("fit", "--config", config) == 0
    moved = base.rename(tmp_path / "moved.pth")
    folder = tmp_path / "runs/tiny/version_0"
    assert export_to(tmp_path / "out", folder, "--format", "pth") == 2
    assert str(base) in capsys.readouterr().err
    assert export_to(tmp_path / "out", folder, "--format", "pth", "--weights", moved) == 0
    (path,) = (tmp_path / "out").glob("*.pth")
    expected = read_tensors(folder / "gpt2-2M-sft.pth")
    found = read_tensors(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "export.json"])
def test_a_full_disk_leaves_the_older_export(hf_folder, trained, tmp_path, monkeypatch, name):
    out = shutil.copytree(hf_folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(temporary: Path, path: Path) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        right(temporary, path)

    right = export_module.files.replace_durably
    with monkeypatch.context() as patch:
        patch.setattr(export_module.files, "replace_durably", fail)
        assert export_to(out, trained, "--format", "hf") == 3
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stop_leaves_nothing(tmp_path):
    def write_half() -> None:
        with new_folder(tmp_path / "a" / "out") as folder:
            (folder / "file").write_text("half")
            sys.exit(143)

    with pytest.raises(SystemExit):
        write_half()
    assert list((tmp_path / "a").iterdir()) == []
    with new_folder(tmp_path / "a" / "out") as folder:  # control
        (folder / "file").write_text("whole")
    assert (tmp_path / "a" / "out" / "file").read_text() == "whole"


# --- What is refused ---


def test_what_cannot_be_exported_is_one_line(trained, tmp_path, make_model, capsys, monkeypatch):
    torch.save(make_model(SMALL).state_dict(), tmp_path / "small.pth")
    architecture = json.dumps(dataclasses.asdict(SMALL))
    small = [tmp_path / "small.pth", "--architecture", architecture, "--format"]
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(trained.read_bytes()[:-1] + b"?")
    shutil.copy(f"{trained}.json", f"{damaged}.json")
    cases = [
        ([*small, "hf"], "vocab_size 97 is less than the 50257"),
        ([*small, "gguf"], "vocab_size 97 is less than the 50257"),
        ([tmp_path / "small.pth", "--format", "pth"], "does not say its architecture"),
        ([trained, "--format", "hf", "--gguf_type", "f16"], "--gguf_type f16 is for --format gguf"),
        ([damaged, "--format", "pth"], "is damaged"),
        ([tmp_path / "none.ckpt", "--format", "pth"], "no such file"),
        ([trained, "--format", "onnx"], "onnx"),
    ]
    before = set(tmp_path.iterdir())
    for options, says in cases:
        assert export_to(tmp_path / "out", *options) == 2
        said = capsys.readouterr().err
        assert says in said
        assert len(said.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert export_to(tmp_path / "out", trained, "--format", "gguf") == 2
    assert files.install_command("gguf") in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before
    monkeypatch.undo()
    assert export_to(tmp_path / "out", *small, "pth", "--verify") == 0  # control


# --- The card ---


def test_card_says_where_the_model_comes_from(trained, hf_folder):
    card = (hf_folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    sidecar = json.loads(Path(f"{trained}.json").read_text())
    assert f"| val_loss | {sidecar['val_loss']:.4f} |" in text
    assert f"| optimizer steps | {sidecar['step']} |" in text
    assert "| epochs | 1 |" in text
    data = trained.parents[4] / "data.json"
    assert f"| data.json | {export_module.files.sha256_of(data)} |" in text
    assert (
        get_style("alpaca").prompt(
            Entry("Rewrite the sentence in the past tense.", "She walks to school.", "")
        )
        in text
    )
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(settings)["model"]["architecture"]["n_layers"] == 2
    assert str(trained.parents[4]) not in card
    assert "<|endoftext|>" in text


@pytest.mark.parametrize("weights", ["gpt2-small", "openai-community/gpt2@main"])
def test_the_card_names_what_was_tuned(weights):
    origin = Origin("tuned", config={"model": {"weights": weights}})
    card = model_card(
        GPTConfig(), gpt2_tokenizer(), get_style("alpaca"), origin, "pth", "tuned.pth"
    )
    facts = yaml.safe_load(card.split("---")[1])
    assert facts["base_model"] == "openai-community/gpt2"
    assert origin.settings() == {"model": {"weights": weights}}
    assert read_origin("Qwen/Qwen2.5-0.5B").name == "Qwen2.5-0.5B"


def test_nothing_private_goes_into_the_card(tmp_path):
    assert public_name("/home/someone/secret/weights.pth") == "weights.pth"
    url = "https://user:pass@example.org/a/data.json?token=123#x"
    assert public_name(url) == "https://example.org/a/data.json"
    assert "sk-" not in public_name("sk-abcdefghijklmnopqrstuv.json")
    write_data(tmp_path / "data.json")
    config = {
        "seed_everything": 1,
        "model": {"architecture": "gpt2-small", "weights": str(tmp_path / "mine.pth")},
        "data": {"path": str(tmp_path / "data.json"), "test_path": url, "batch_size": 4},
        "trainer": {"max_epochs": 2, "max_steps": -1, "logger": None},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_origin(str(tmp_path / "gpt2-small")).config == {}  # beside a config, but no file
    (tmp_path / "gpt2-small124M-sft.pth").touch()
    origin = read_origin(str(tmp_path / "gpt2-small124M-sft.pth"))
    said = repr((origin.settings(), origin.data))
    assert str(tmp_path) not in said
    assert "token" not in said
    assert origin.settings()["model"]["weights"] == "mine.pth"
    assert origin.settings()["trainer"] == {"max_epochs": 2}
    assert origin.data["https://example.org/a/data.json"] is None
