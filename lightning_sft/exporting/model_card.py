"""`README.md` of an export: what the model is, where it comes from, how it is asked and loaded.

Only what checkpoint and run folder say; nothing of this machine. See `origin.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import yaml

from lightning_sft.common.hub import find_repository
from lightning_sft.data.entries import Entry
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.decoding.generation import GenerationConfig
from lightning_sft.models.gpt2 import GPTConfig
from lightning_sft.models.origin import Origin
from lightning_sft.models.registry import model_name

PACKAGES = ("lightning-sft", "torch", "lightning", "transformers", "gguf")
EXAMPLE = Entry("Rewrite the sentence in the past tense.", "She walks to school.", "")

_USE = {
    "hf": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
messages = [{"role": "user", "content": "Name three primary colours."}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1]:]))
```

An entry's input goes into the message as `"input": "…"` beside `content`. Unlike in training,
`transformers` reads a typed `<|endoftext|>` as the token that ends a text, unless the tokenizer is
called with `split_special_tokens=True`.
""",
    "gguf": """\
```bash
llama-server -m FILE --port 8080  # /v1/chat/completions, or /completion with the prompt below
ollama create NAME -f Modelfile   # see the note in that file
```

An entry's input follows the instruction in the message, in the words of the prompt below.
""",
    "pth": """\
```python
import json, torch
from llms_from_scratch.ch04 import GPTModel  # the book's own

config = json.load(open("config.json"))
model = GPTModel(config)
model.load_state_dict(torch.load("FILE", weights_only=True))
```
""",
}


def model_card(
    config: GPTConfig, style: PromptStyle, origin: Origin, format: str, file: str
) -> str:
    """The card's text.

    Args:
        file: Name of the weights' file.
    """
    parts = [
        _front_matter(origin, format),
        f"# {origin.name}\n\n{model_name(config)}, fine-tuned on instructions with lightning_sft: "
        f"{config.n_layers} layers, {config.n_heads} heads, width {config.emb_dim}, a context of "
        f"{config.context_length} tokens, output head "
        + ("tied to the embedding." if config.tie_embeddings else "of its own."),
        "## Use\n\n" + _USE[format].replace("FILE", file),
        "## The prompt it was trained with\n\n"
        f"Style `{style.name}`. An instruction with an input becomes, up to the last character:\n\n"
        f"```text\n{style.prompt(EXAMPLE)}\n```\n\n" + _answer_note(style),
        _training(origin),
        "## Versions\n\n" + _table(("package", "version"), _versions()),
        "## Limits\n\nFine-tuned on single questions and answers. It was not trained to refuse, "
        "and says false things with confidence.\n",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _front_matter(origin: Origin, format: str) -> str:
    facts: dict[str, Any] = {
        "library_name": {"hf": "transformers", "gguf": "gguf", "pth": "pytorch"}[format],
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "instruction-tuning", "lightning-sft"],
    }
    weights = origin.config.get("model", {}).get("weights")
    if (repository := find_repository(weights)) is not None:
        facts["base_model"] = repository.name
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def _answer_note(style: PromptStyle) -> str:
    note = "The answer ends with `<|endoftext|>`."
    if style.end.strip():
        note = f"The answer ends with `{style.end.strip()}`, as plain text, then `<|endoftext|>`."
    if not style.header_in_prompt:
        note += f" The model writes `{style.header.strip()}` before its answer; cut it off."
    return note


def _training(origin: Origin) -> str:
    if not origin.config:
        return ""
    data = [(name, digest or "not at hand when exported") for name, digest in origin.data.items()]
    figures = [(name, f"{value:.4f}") for name, value in origin.losses.items()]
    if origin.step is not None:
        figures = [("optimizer steps", str(origin.step)), *figures]
    if origin.epoch is not None:
        figures.insert(1, ("epochs", str(origin.epoch + 1)))
    shown = yaml.safe_dump(
        {
            **origin.settings(),
            "generation": dataclasses.asdict(GenerationConfig(**origin.generation)),
        },
        sort_keys=False,
        allow_unicode=True,
    )
    return "\n\n".join(
        [
            "## Training",
            _table(("data", "sha256"), data),
            _table(("", "figure"), figures) if figures else "",
            f"```yaml\n{shown}```",
        ]
    )


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(
        [
            f"| {head[0]} | {head[1]} |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )


def _versions() -> list[tuple[str, str]]:
    found = []
    for package in PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
