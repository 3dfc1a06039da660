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
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from lightning_sft.common.errors import InputError
from lightning_sft.decoding.batch import RunningBatch
from lightning_sft.decoding.kept_rows import KeptRows
from lightning_sft.decoding.settings import GenerationConfig
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.prepacked import prepacked
from lightning_sft.models.registry import family_of

__all__ = [
    "GenerationConfig",
    "check_prompts",
    "decode",
    "draw",
    "evaluating",
    "generate",
    "probabilities",
    "sample",
    "seed_row",
]


def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 32,
    seed: int | None = 123,
    eos_token_id: int | Literal["own"] | None = "own",
    on_answer: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt until end-of-text, `max_new_tokens` or the model's context is full.

    Args:
        prompts: Token ids, at least one each.
        seed: Of sampling; None draws a new one.
        eos_token_id: Ends an answer and is not part of it: the model's own, or the one given; None
            never ends early.
        on_answer: Told each prompt's place and answer as it is finished, for progress bars.

    Returns:
        The new ids of each prompt, in the order given.

    Raises:
        InputError: A prompt is empty or fills the context, or a setting is out of range.
    """
    config = GenerationConfig(max_new_tokens, temperature, top_k, top_p, batch_size, seed)
    check_prompts(prompts, model.config.context_length)
    eos = _own_end(model) if eos_token_id == "own" else eos_token_id
    answers: list[list[int]] = [[] for _ in prompts]
    # Rows of one batch attend over as many places as the longest has: equal lengths waste least.
    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for begin in range(0, len(by_length), batch_size):
        places = by_length[begin : begin + batch_size]
        batch = [prompts[place] for place in places]
        for step in decode(model, batch, config, keys=places, eos_token_id=eos):
            for row, token in step:
                if token is not None:
                    answers[places[row]].append(token)
                elif on_answer is not None:
                    on_answer(places[row], answers[places[row]])
    return answers


def _own_end(model: GPTModel) -> int:
    tokenizer = family_of(model.config).tokenizer
    if tokenizer is None:
        raise InputError("generate: give the tokenizer's eos_token_id; this model has none alone")
    return tokenizer().eos_token_id


def decode(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    eos_token_id: int | None,
    keys: Sequence[int] | None = None,
    kept: KeptRows | None = None,
) -> Iterator[list[tuple[int, int | None]]]:
    """Answer one batch, a step at a time.

    Args:
        eos_token_id: Ends a row; None never does.
        keys: What each row's sampling depends on beside the seed; its place by default.
        kept: Rows of earlier calls with this model, which prompts may continue; finished ones are
            added. The tokens are the same without.

    Yields:
        `(row, token)` of every row that took a token in this step, and `(row, None)` when a row is
        finished. End-of-text is not yielded.
    """
    check_prompts(prompts, model.config.context_length)
    # A generator of its own for every row: what a row draws does not depend on its neighbours.
    keys = range(len(prompts)) if keys is None else keys
    rngs = [seed_row(config.seed, key) for key in keys]
    room = [model.config.context_length - len(prompt) for prompt in prompts]
    left = [min(config.max_new_tokens, free) for free in room]  # tokens each row may still take
    seen = [list(prompt) for prompt in prompts]  # and what the row has taken
    active = list(range(len(prompts)))  # the row in each slot of the batch
    most = min(max(map(len, prompts)) + max(left), model.config.context_length)
    with evaluating(model), prepacked(model):
        batch = RunningBatch(model, most, kept)
        batch.join(prompts)
        while active:
            tokens = sample(batch.logits, config, [rngs[row] for row in active])  # (B,)
            events: list[tuple[int, int | None]] = []
            going_on = []  # slots of the rows that want another token
            for slot, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
                ended = token == eos_token_id
                if not ended:
                    events.append((row, token))
                    left[row] -= 1
                    seen[row].append(token)
                if ended or left[row] == 0:
                    batch.keep(slot, seen[row])
                    events.append((row, None))
                else:
                    going_on.append(slot)
            yield events
            # Rows that ended leave before the next step is computed, and cost nothing any more.
            active = [active[slot] for slot in batch.feed(tokens, going_on)]


@torch.inference_mode()
def sample(
    logits: torch.Tensor, config: GenerationConfig, rngs: Sequence[torch.Generator]
) -> torch.Tensor:
    """Next tokens (B,) from logits (B, V): the likeliest, or drawn by each row's generator."""
    if config.is_greedy:
        return logits.argmax(-1)
    rows = probabilities(logits, config)
    drawn = [draw(row, rng) for row, rng in zip(rows, rngs, strict=True)]
    return torch.tensor(drawn, device=logits.device)


@torch.inference_mode()
def probabilities(logits: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """What to draw from, (B, V) on the CPU: logits → temperature → top-k → softmax → top-p."""
    logits = logits.float() / config.temperature  # above 1 evens the chances out, below 1 sharpens
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    chances = F.softmax(logits, dim=-1)
    if config.top_p is not None and config.top_p < 1.0:
        ordered, tokens = chances.sort(-1, descending=True)
        # A token stays if those before it do not yet reach p. The first always does, also where p
        # is so small that float32 takes it for 0.
        outside = ordered.cumsum(-1) - ordered >= config.top_p
        outside[:, 0] = False
        # Back from the order of likelihood to the order of the vocabulary.
        chances = torch.zeros_like(ordered).scatter(-1, tokens, ordered.masked_fill(outside, 0.0))
    return chances.cpu()


def draw(row: torch.Tensor, rng: torch.Generator) -> int:
    """One token from the chances (V,) of all, which need not sum to 1."""
    return int(torch.multinomial(row, 1, generator=rng))


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


def seed_row(seed: int | None, key: int) -> torch.Generator:
    """A row's own generator; a seed of None is drawn anew."""
    seed = secrets.randbits(62) if seed is None else seed
    # Odd multipliers mix the two numbers, so that neighbours do not share random streams.
    mixed = (seed * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9 + 1) % 2**63
    return torch.Generator().manual_seed(mixed)


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
