"""OpenAI's TensorFlow checkpoint, written with the tensors of a Hugging Face folder: same logits.

Needs the `openai` extra, and runs only with `-m slow`:

    pip install "lightning-sft[openai]"
    python -m pytest -m slow tests/test_weights_tensorflow.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_sft.common import downloads
from lightning_sft.common.errors import InputError
from lightning_sft.models import files as weight_files
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.gpt2_weights import to_hf
from lightning_sft.models.loading import load_weights
from support.model_hub import ModelHub

pytestmark = pytest.mark.slow
tf = pytest.importorskip("tensorflow", reason="needs the openai extra (tensorflow)")

TINY = GPTConfig(vocab_size=97, context_length=16, emb_dim=32, n_heads=4, n_layers=11)
INPUT_IDS = torch.arange(32).reshape(2, 16) * 3


def openai_name(hf_name: str) -> str:
    """`transformer.h.10.attn.c_attn.weight` → `model/h10/attn/c_attn/w`, as OpenAI wrote them."""
    name = re.sub(r"^transformer\.(h\.(?=\d))?", lambda match: "h." * bool(match[1]), hf_name)
    name = re.sub(r"^h\.(\d+)", r"h\1", name).replace(".", "/")
    if name.startswith(("wte", "wpe")):
        return f"model/{name.removesuffix('/weight')}"
    name = re.sub(r"/weight$", "/g" if "ln_" in name else "/w", name)
    return "model/" + re.sub(r"/bias$", "/b", name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The same random weights as a Hugging Face folder and as OpenAI's seven files."""
    torch.manual_seed(0)
    model = GPTModel(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    tensors = to_hf(model.state_dict())
    del tensors["lm_head.weight"]  # GPT-2 was trained with tied weights
    hf, openai = tmp_path_factory.mktemp("hf"), tmp_path_factory.mktemp("openai")
    save_file(tensors, hf / "model.safetensors")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, tensor in tensors.items():
            is_conv1d = name.startswith("transformer.h.") and tensor.ndim == 2
            value = tensor[None] if is_conv1d else tensor
            tf.compat.v1.get_variable(openai_name(name), initializer=value.numpy())
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(openai / "model.ckpt"))
    for name in ("encoder.json", "hparams.json", "vocab.bpe"):
        (openai / name).write_text("{}")
    return hf, openai


def load_logits(source: str) -> torch.Tensor:
    with torch.device("meta"):
        model = GPTModel(TINY).eval()
    load_weights(model, source)
    with torch.no_grad():
        return model(INPUT_IDS)


def test_the_checkpoint_is_like_openais(folders):
    """The fixture must not agree with the reader by a shared mistake."""
    assert {path.name for path in folders[1].iterdir()} == set(weight_files.OPENAI_FILES)
    shapes = tf.train.load_checkpoint(str(folders[1])).get_variable_to_shape_map()
    assert shapes["model/wte"] == [97, 32]
    assert shapes["model/wpe"] == [16, 32]
    assert shapes["model/h0/attn/c_attn/w"] == [1, 32, 96]
    assert shapes["model/h10/mlp/c_proj/b"] == [32]
    assert shapes["model/h10/ln_2/g"] == shapes["model/ln_f/b"] == [32]


def test_openai_and_hugging_face_give_equal_logits(folders):
    hf, openai = folders
    assert torch.equal(load_logits(str(openai)), load_logits(str(hf)))


def test_the_hub_fails_and_openai_helps(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("LIGHTNING_SFT_CACHE", str(tmp_path))
    with ModelHub(monkeypatch, tmp_path / "hub") as hub:
        address = hub.server.address
        monkeypatch.setattr(weight_files, "OPENAI", (f"{address}/a", f"{address}/b"))
        for path in folders[1].iterdir():
            hub.server.serve(f"/b/774M/{path.name}", path.read_bytes())
        assert torch.equal(load_logits("gpt2-large"), load_logits(str(folders[0])))
        hub.forget()
        load_logits("gpt2-large")
        assert hub.requests == []


@pytest.mark.parametrize("part", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, None])
def test_a_damaged_checkpoint_is_refused(folders, tmp_path, part, content):
    for path in folders[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    load_logits(str(tmp_path))  # control
    whole = (tmp_path / part).read_bytes()
    (tmp_path / part).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InputError, match="not a whole checkpoint") as error:
        load_logits(str(tmp_path))
    assert "\n" not in str(error.value)
