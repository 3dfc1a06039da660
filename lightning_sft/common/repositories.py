"""Where the named sizes are on the Hugging Face hub.

Each belongs to a family, which `models/registry.py` lists; the names are here because commands
without torch ask for them too.
"""

from __future__ import annotations

GPT2 = {
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
LLAMA = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
    "qwen3-0.6b-instruct": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B-Base",
    "qwen3-1.7b-instruct": "Qwen/Qwen3-1.7B",
}
_TUNED_BESIDE = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
}
LLAMA |= _TUNED_BESIDE
LLAMA |= {f"{name}-instruct": f"{place}-Instruct" for name, place in _TUNED_BESIDE.items()}

REPOSITORIES = GPT2 | LLAMA
