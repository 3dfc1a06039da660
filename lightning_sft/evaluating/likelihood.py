"""How likely a model finds a text, and what it writes until a given word: what benchmarks ask.

Requests are sorted, the longest context first, so that the memory needed shows at once, and those
that share a context (the choices of a question) land in one batch, where it is computed once. Only
the tokens that are rated go through the head.

    >>> loglikelihoods(model, [Request(context=[15496], continuation=[995])])
    [(-9.1, False)]

The rules for what does not fit the context are those of lm-eval's own `hf` model, so that results
compare: a context loses its beginning, never the continuation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from lightning_sft.common.errors import InputError
from lightning_sft.data.tokenizer import Tokenizer
from lightning_sft.decoding.batch import read_rows
from lightning_sft.decoding.generation import GenerationConfig, decode, evaluating
from lightning_sft.models.gpt2 import GPTModel

Progress = Callable[[int], object]  # called with how many more requests are finished


class Request(NamedTuple):
    """Token ids, at least one in each; the continuation is rated."""

    context: list[int]
    continuation: list[int]


def loglikelihoods(
    model: GPTModel,
    requests: Sequence[Request],
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether greedy decoding would write it.

    Args:
        batch_size: Requests computed side by side.

    Returns:
        In the order given; natural logarithms, summed over the continuation's tokens.

    Raises:
        InputError: A part is empty, or a continuation is longer than the model's context.
    """
    length = model.config.context_length
    for place, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise InputError(f"request {place}: context and continuation need a token each")
        if len(continuation) > length:
            raise InputError(
                f"request {place}: a continuation of {len(continuation)} tokens does not fit the "
                f"model's context of {length}"
            )
    places = sorted(range(len(requests)), key=lambda place: _order(requests[place]))
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    with evaluating(model):
        for batch in _batches(places, batch_size):
            found = _rate_batch(model, [requests[place] for place in batch])
            for place, rated in zip(batch, found, strict=True):
                scores[place] = rated
            if progress is not None:
                progress(len(batch))
    return scores


def _order(request: Request) -> tuple[int, list[int], int]:
    """Longest context first, equal ones side by side, then the longest continuation."""
    return -len(request.context), request.context, -len(request.continuation)


@torch.inference_mode()
def _rate_batch(model: GPTModel, requests: Sequence[Request]) -> list[tuple[float, bool]]:
    length = model.config.context_length
    # The last token is rated, never read; of the rest, the model sees what fits.
    rows = [(context + continuation)[-(length + 1) :][:-1] for context, continuation in requests]
    hidden, places = read_rows(model, rows)
    rated = []
    for place, (row, request) in enumerate(zip(rows, requests, strict=True)):
        tokens = torch.tensor(request.continuation, device=hidden.device)  # (C,)
        before = places[place, len(row) - len(tokens) : len(row)]
        log_probs = model.out_head(hidden[before]).float().log_softmax(-1)  # (C, V)
        total = log_probs.gather(-1, tokens[:, None]).sum()
        rated.append((float(total), bool((log_probs.argmax(-1) == tokens).all())))
    return rated


def generate_until(
    model: GPTModel,
    tokenizer: Tokenizer,
    contexts: Sequence[list[int]],
    stops: Sequence[str],
    config: GenerationConfig,
    progress: Progress | None = None,
) -> list[str]:
    """Continue every context until end-of-text, one of `stops`, or `max_new_tokens`.

    Returns:
        The texts, without the stop.

    Raises:
        InputError: An empty context, or more new tokens than the model's context holds.
    """
    room = model.config.context_length - config.max_new_tokens
    if room < 1:
        raise InputError(
            f"{config.max_new_tokens} new tokens leave no room for a prompt in the model's context "
            f"of {model.config.context_length}; the task sets max_gen_toks"
        )
    if config.is_greedy:
        config = dataclasses.replace(config, top_k=None, top_p=None)
    places = sorted(range(len(contexts)), key=lambda place: -len(contexts[place]))
    texts = [""] * len(contexts)
    for batch in _batches(places, config.batch_size):
        prompts = [contexts[place][-room:] for place in batch]
        for place, text in zip(
            batch, _write_batch(model, tokenizer, prompts, stops, config, batch), strict=True
        ):
            texts[place] = text
        if progress is not None:
            progress(len(batch))
    return texts


def _write_batch(
    model: GPTModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    stops: Sequence[str],
    config: GenerationConfig,
    keys: list[int],
) -> list[str]:
    """Answers of one batch; it ends when every row has met its end or a stop."""
    ids: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for step in decode(model, prompts, config, keys=keys, eos_token_id=tokenizer.eos_token_id):
        for row, token in step:
            if token is None:
                open_rows.discard(row)
                continue
            ids[row].append(token)
            text = tokenizer.decode(ids[row]) if stops and row in open_rows else ""
            if _cut(text, stops) != text:
                open_rows.discard(row)
        if not open_rows:
            break
    return [_cut(tokenizer.decode(row), stops) for row in ids]


def _cut(text: str, stops: Sequence[str]) -> str:
    """Up to the first of the stops."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _batches(places: list[int], size: int) -> Iterator[list[int]]:
    for begin in range(0, len(places), size):
        yield places[begin : begin + size]
