"""Generation for `benchmark.py`: three ways to answer the same prompts."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from benchmark_models import (
    get_config,
    make_chapter_model,
    make_data,
    make_our_model,
    make_transformers_model,
    peak_memory,
)

Answer = Callable[[list[list[int]], int], list[list[int]]]  # prompts, new tokens → the new ids


def answer_ours(run: Namespace, *, bf16: bool) -> Answer:
    """`generate`, as under `predict` and `chat`."""
    import torch

    from lightning_sft.decoding.generation import generate

    model = make_our_model(run).to(torch.bfloat16 if bf16 else torch.float32)
    ends: dict[str, Any] = {
        "batch_size": 1_000_000,
        "eos_token_id": None,
    }  # batches are cut by the caller
    return lambda prompts, count: generate(model, prompts, max_new_tokens=count, **ends)


def answer_chapter(run: Namespace) -> Answer:
    """The chapter's `generate`: one prompt, and all of it again for each token."""
    import torch
    from llms_from_scratch.ch05 import generate

    model, context = make_chapter_model(run).eval(), get_config(run).context_length

    def answer(prompts: list[list[int]], count: int) -> list[list[int]]:
        (prompt,) = prompts
        return generate(model, torch.tensor(prompts), count, context)[:, len(prompt) :].tolist()

    return answer


def answer_transformers(run: Namespace, *, bf16: bool) -> Answer:
    """`generate` with its cache, the prompts padded on the left."""
    import torch

    model = make_transformers_model(run).eval().to(torch.bfloat16 if bf16 else torch.float32)

    def answer(prompts: list[list[int]], count: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        pads = [[0] * (longest - len(prompt)) for prompt in prompts]
        ids = torch.tensor([pad + prompt for pad, prompt in zip(pads, prompts, strict=True)])
        mask = torch.tensor([pad + [1] * (longest - len(pad)) for pad in pads])
        ends = {"max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        answers = model.generate(ids, attention_mask=mask, do_sample=False, **ends)
        return answers[:, longest:].tolist()

    return answer


def measure_generation(
    prepare: Callable[..., Answer], run: Namespace, rows: int, most: int = 110, **options: Any
) -> dict[str, Any]:
    """Answers to the test prompts, or to `most` of them, evenly picked; like lengths together."""
    data = make_data(run)
    texts = [data.style.prompt(entry) for entry in data.split("test")][: run.prompts]
    prompts = sorted((data.tokenizer.encode(text) for text in texts), key=len)
    prompts = prompts[:: max(len(prompts) // most, 1)][:most]
    batches = [prompts[k : k + rows] for k in range(0, len(prompts), rows)]
    answer = prepare(run, **options)
    answer(batches[0], 2)
    begun = time.perf_counter()
    answers = [ids for batch in batches for ids in answer(batch, run.new_tokens)]
    seconds = time.perf_counter() - begun
    if [len(ids) for ids in answers] != [run.new_tokens] * len(prompts):
        raise SystemExit("an answer ended early")
    rate = len(prompts) * run.new_tokens / seconds
    return {"rate": rate, "peak_gb": peak_memory(), "prompts": len(prompts)}
