"""Training speed, ours and the peers', and the memory that it took beside `plan`'s forecast."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from gpu_check.data import chapter_file, long_file, make_data
from gpu_check.notebook import Notebook, SkipError
from gpu_check.ours import Fit, fit, make_module
from gpu_check.peers import PEERS, train_transformers
from gpu_check.stopwatch import Stopwatch, peak_gb, wait_for

MEMORY_LIMIT = 0.15  # of the forecast, which the peak may be off


def measure_chapter(notebook: Notebook) -> None:
    """The chapter's run: gpt2-medium, 935 rows, two epochs of batches of 8. Aim: 10 seconds."""
    setting, batch_size = notebook.setting, notebook.setting.pick(8, 2)
    settings: dict[str, Any] = {"batch_size": batch_size, "max_length": setting.pick(1024, 128)}
    for name, precision in (("ours bf16", "bf16-mixed"), ("ours fp32", "32-true")):
        for number in range(1, setting.pick(3 if "bf16" in name else 2, 2)):
            with notebook.attempt(name):
                module = make_module(setting, "gpt2-medium")
                path = chapter_file(setting)
                data = make_data(module, path, **settings, share_prefix=True)
                steps = 2 * (len(data.rows("train")) // batch_size)
                stopwatch = Stopwatch(setting.device, 0, steps, rounds=1)
                begun = time.perf_counter()
                found = fit(setting, module, data, stopwatch, precision=precision)
                whole = time.perf_counter() - begun
                notebook.write(
                    name,
                    **found.rounds[0] | {"round": number},
                    run_seconds=found.rounds[0]["step_seconds"] * steps,
                    with_start=whole,
                    aim_seconds=10,
                    **_memory(found),
                )
    with notebook.attempt("transformers bf16"):
        module = make_module(setting, "gpt2-medium")
        data = make_data(module, chapter_file(setting), **settings)
        steps = 2 * (len(data.rows("train")) // batch_size)
        stopwatch = Stopwatch(setting.device, 0, steps, rounds=1)
        train_transformers(setting, "gpt2-medium", data, stopwatch)
        found_round = stopwatch.results()[0]
        seconds = found_round["step_seconds"] * steps
        peak = peak_gb(setting.device)
        notebook.write("transformers bf16", **found_round, run_seconds=seconds, peak_gb=peak)


def measure_gpt2(notebook: Notebook) -> None:
    """gpt2-small, 16 rows of 1,024 tokens. Aim: 400,000 tokens a second."""
    _measure(notebook, "gpt2-small", 16, notebook.setting.pick(1024, 64), aim=400_000)


def measure_qwen3(notebook: Notebook) -> None:
    """Qwen3-0.6B, rows of 8,192 tokens. Aim: 52,000, twice what prime-rl published (26,005)."""
    _measure(notebook, "qwen3-0.6b", 2, notebook.setting.pick(8192, 64), aim=52_000)


def measure_smollm2(notebook: Notebook) -> None:
    """SmolLM2-135M, rows of 8,192 tokens."""
    _measure(notebook, "smollm2-135m", 2, notebook.setting.pick(8192, 64), aim=None)


def _measure(notebook: Notebook, name: str, rows: int, tokens: int, aim: int | None) -> None:
    """Ours as it comes and compiled, then the peers, on the same full rows."""
    setting = notebook.setting
    rows = setting.pick(rows, 2)
    path = long_file(setting, rows * 8, tokens)
    settings: dict[str, Any] = {"batch_size": rows, "max_length": tokens}

    def make_stopwatch() -> Stopwatch:
        return Stopwatch(setting.device, setting.pick(4, 1), setting.pick(10, 1))

    for kind, compile in (("ours bf16", False), ("ours bf16 compiled", True)):
        with notebook.attempt(kind):
            module = make_module(setting, name, compile=compile)
            data = make_data(module, path, **settings, padding_free=True)
            found = fit(setting, module, data, make_stopwatch(), precision="bf16-mixed")
            for figures in found.rounds:
                notebook.write(kind, **figures, aim=aim, **_memory(found))
    for kind, train in PEERS.items():
        with notebook.attempt(kind):
            data = make_data(make_module(setting, name), path, **settings)
            stopwatch = make_stopwatch()
            train(setting, name, data, stopwatch)
            for figures in stopwatch.results():
                notebook.write(kind, **figures, peak_gb=peak_gb(setting.device))


def _memory(found: Fit) -> dict[str, Any]:
    facts = {"first_step": found.first_step, "forecast_gb": found.forecast_gb}
    return facts if found.peak_gb is None else facts | {"peak_gb": found.peak_gb}


def check_memory(notebook: Notebook) -> None:
    """gpt2-medium's peak in every way of saving memory, beside `plan`'s forecast."""
    from lightning_sft.models.lora import LoRAConfig

    setting = notebook.setting
    if setting.device != "cuda":
        raise SkipError("peak memory is counted on a GPU alone")
    for name, options, precision in _ways(LoRAConfig):
        with notebook.attempt(name):
            module = make_module(setting, "gpt2-medium", **options)
            settings: dict[str, Any] = {"batch_size": 8, "max_length": 512, "padding_free": True}
            data = make_data(module, long_file(setting, 32, 512), **settings)
            found = fit(setting, module, data, Stopwatch("cuda", 1, 2, 1), precision=precision)
            assert found.peak_gb is not None
            off = abs(found.peak_gb / found.forecast_gb - 1)
            notebook.check(f"{name}: forecast of the peak", off, MEMORY_LIMIT, **_memory(found))


def _ways(lora: Any) -> Sequence[tuple[str, dict[str, Any], str]]:
    return (
        ("fp32", {}, "32-true"),
        ("bf16-mixed", {}, "bf16-mixed"),
        ("bf16-true", {}, "bf16-true"),
        ("recomputed", {"activation_checkpointing": True}, "bf16-mixed"),
        ("LoRA", {"lora": lora()}, "bf16-mixed"),
    )


def measure_decoding(notebook: Notebook) -> None:
    """Greedy answers of 1, 32 and 256 rows, beside transformers' `generate`."""
    import torch

    from gpu_check.peers import make_model
    from lightning_sft import generate

    setting = notebook.setting
    count, length = setting.pick(64, 3), setting.pick(64, 4)

    def prompts(rows: int) -> list[list[int]]:
        return torch.randint(
            0, 500, (rows, length), generator=torch.Generator().manual_seed(0)
        ).tolist()

    def clock(name: str, rows: int, answer: Any) -> None:
        answer(prompts(rows), 2)
        for number in range(1, 3):
            wait_for(setting.device)
            begun = time.perf_counter()
            answers = answer(prompts(rows), count)
            wait_for(setting.device)
            seconds = time.perf_counter() - begun
            assert len(answers) == rows
            rate = rows * count / seconds
            notebook.write(
                name, round=number, tokens_per_second=rate, peak_gb=peak_gb(setting.device)
            )

    for size in ("gpt2-small", "qwen3-0.6b"):
        with notebook.attempt(f"ours, {size}"):
            model = make_module(setting, size).network.to(setting.device, torch.bfloat16).eval()
            for rows in (1, 32, 256):

                def ours(given: Any, new: int, model: Any = model) -> Any:
                    ends: dict[str, Any] = {"eos_token_id": None, "batch_size": len(given)}
                    return generate(model, given, max_new_tokens=new, **ends)

                clock(f"ours bf16, {size}, {rows} rows", rows, ours)
            del model
        with notebook.attempt(f"transformers, {size}"):
            theirs = make_model(setting, size).to(torch.bfloat16).eval()
            for rows in (1, 32, 256):

                def answer(given: Any, new: int, model: Any = theirs) -> Any:
                    ids = torch.tensor(given, device=setting.device)
                    ends = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
                    mask = torch.ones_like(ids)
                    return model.generate(ids, attention_mask=mask, pad_token_id=0, **ends)

                clock(f"transformers bf16, {size}, {rows} rows", rows, answer)
            del theirs
