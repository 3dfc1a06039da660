"""Prompts → answers: batched decoding with a key-value cache.

Prompts are sorted by length and answered side by side. What the prompts of a batch have in common
(every Alpaca prompt opens with the same sentences) is computed once, each further step feeds one
token a row, and a row that is done leaves the batch. Greedy text does not depend on the batch, and
sampled text depends on `(seed, place of the prompt)` alone.

    >>> generate(model, [tokenizer.encode("Hello")], max_new_tokens=20)

Source: `generate` of section 5.3 and listing 7.7's use of it, "Build a Large Language Model (From
Scratch)"; top-p: Holtzman et al. 2019 (arXiv 1904.09751).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lightning_sft.common.errors import InputError
from lightning_sft.data.tokenizer import END_OF_TEXT
from lightning_sft.decoding.batch import Batch
from lightning_sft.models.gpt2 import GPTModel


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are written.

    Args:
        max_new_tokens: Most tokens of an answer; the prompt does not count.
        temperature: 0 takes the likeliest token; above, logits are divided by it and sampled.
        top_k: Sample among the k likeliest tokens only.
        top_p: Sample among the fewest tokens whose probabilities sum to p, in (0, 1].
        batch_size: Prompts answered side by side.
        seed: Of sampling.

    Raises:
        InputError: A value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    batch_size: int = 32
    seed: int = 123

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("batch_size", 1), ("top_k", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"generation.{name}: {value} is not allowed; it must be >= {low}")
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"generation.temperature: {self.temperature} must be >= 0")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"generation.top_p: {self.top_p} is outside (0, 1]")


def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 32,
    seed: int = 123,
    eos_token_id: int | None = END_OF_TEXT,
    on_answer: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt until end-of-text, `max_new_tokens` or the model's context is full.

    Args:
        prompts: Token ids, at least one each.
        eos_token_id: Ends an answer and is not part of it; None never ends early.
        on_answer: Told each prompt's place and answer as it is finished, for progress bars.

    Returns:
        The new ids of each prompt, in the order given.

    Raises:
        InputError: A prompt is empty or fills the context, or a setting is out of range.
    """
    config = GenerationConfig(max_new_tokens, temperature, top_k, top_p, batch_size, seed)
    check_prompts(prompts, model.config.context_length)
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for begin in range(0, len(by_length), batch_size):
        places = by_length[begin : begin + batch_size]
        for step in decode(
            model, [prompts[p] for p in places], config, keys=places, eos_token_id=eos_token_id
        ):
            for row, token in step:
                if token is not None:
                    answers[places[row]].append(token)
                else:
                    if on_answer is not None:
                        on_answer(places[row], answers[places[row]])
    return answers


def decode(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    keys: Sequence[int] | None = None,
    eos_token_id: int | None = END_OF_TEXT,
) -> Iterator[list[tuple[int, int | None]]]:
    """Answer one batch, a step at a time.

    Args:
        keys: What each row's sampling depends on beside the seed; its place by default.

    Yields:
        `(row, token)` of every row that took a token in this step, and `(row, None)` when a row is
        finished. End-of-text is not yielded.
    """
    check_prompts(prompts, model.config.context_length)
    keys = range(len(prompts)) if keys is None else keys
    rngs = [torch.Generator().manual_seed(mix_seed(config.seed, key)) for key in keys]
    room = [model.config.context_length - len(prompt) for prompt in prompts]
    left = [min(config.max_new_tokens, free) for free in room]  # tokens each row may still take
    active = list(range(len(prompts)))
    most = min(max(map(len, prompts)) + max(left), model.config.context_length)
    with evaluating(model):
        batch = Batch(model, most)
        batch.join(prompts)
        while active:
            tokens = sample(batch.logits, config, [rngs[row] for row in active])
            events: list[tuple[int, int | None]] = []
            going_on = []
            for slot, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
                ended = token == eos_token_id
                if not ended:
                    events.append((row, token))
                    left[row] -= 1
                if ended or left[row] == 0:
                    events.append((row, None))
                else:
                    going_on.append(slot)
            yield events
            active = [active[slot] for slot in batch.feed(tokens, going_on)]


@torch.inference_mode()
def sample(
    logits: torch.Tensor, config: GenerationConfig, rngs: Sequence[torch.Generator]
) -> torch.Tensor:
    """Next tokens (B,) from logits (B, V): the likeliest, or drawn by each row's generator."""
    if config.temperature == 0.0:
        return logits.argmax(-1)
    logits = logits.float() / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    probabilities = F.softmax(logits, dim=-1)
    if config.top_p is not None and config.top_p < 1.0:
        ordered, tokens = probabilities.sort(-1, descending=True)
        # A token stays if those before it do not yet reach p; the first always does.
        outside = ordered.cumsum(-1) - ordered >= config.top_p
        probabilities = torch.zeros_like(ordered).scatter(
            -1, tokens, ordered.masked_fill(outside, 0.0)
        )
    drawn = [
        torch.multinomial(row, 1, generator=rng)
        for row, rng in zip(probabilities.cpu(), rngs, strict=True)
    ]
    return torch.cat(drawn).to(logits.device)


def check_prompts(prompts: Sequence[Sequence[int]], context_length: int) -> None:
    """Refuse prompts that cannot be answered, before any is.

    Raises:
        InputError: Names the first one that is empty or fills the context.
    """
    for place, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {place} is empty; it must hold at least one token")
        if len(prompt) >= context_length:
            raise InputError(
                f"prompt {place} has {len(prompt)} tokens, which leaves no room for an answer in "
                f"the model's context of {context_length}"
            )


def mix_seed(seed: int, key: int) -> int:
    """One generator seed from two numbers, so that neighbours do not share random streams."""
    return (seed * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9 + 1) % 2**63


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and each part back to its own mode before."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, was_training in modes.items():
            part.training = was_training
