"""Rows decoded side by side over one key-value cache, which may join and leave between steps.

`generation.decode` answers one batch from beginning to end; the server's engine lets requests come
and go. Both sample the tokens themselves, from `RunningBatch.logits`.

What a prompt has in common with a row that is finished, as an earlier turn of its conversation, is
taken from `KeptRows` and not read again.

    >>> batch = RunningBatch(model)
    >>> batch.join([tokenizer.encode("Hello")])
    >>> batch.feed(batch.logits.argmax(-1))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_sft.data.batching import lay_out
from lightning_sft.decoding.kept_rows import KeptRow, KeptRows
from lightning_sft.models.cache import KVCache
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.layers import PackedLayout


class RunningBatch:
    """The rows under way: what they have seen, and what they may say next.

    The model must be in evaluation mode. `logits` (B, V) are those of every row's next token.

    Args:
        max_length: Most tokens a row will ever hold, where it is known; memory for them is taken
            at once. Else it grows with the rows, to twice what is needed.
        kept: Finished rows of this model, which prompts may continue.
    """

    def __init__(
        self, model: GPTModel, max_length: int | None = None, kept: KeptRows | None = None
    ) -> None:
        self.model = model
        self.max_length = max_length
        self.kept = kept
        self.cache: KVCache | None = None  # None holds no rows, and no memory
        self.logits = torch.empty(0)

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read prompts, what they begin with in common once, as new rows behind the old ones."""
        known = [self.kept.find(prompt) if self.kept else None for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda place: known[place] is not None)
        fresh = [prompts[place] for place in order if known[place] is None]
        newcomers = RunningBatch(self.model, self.max_length)
        if fresh:
            newcomers.cache = self._new_cache(len(fresh), max(map(len, fresh)))
            newcomers.logits = self._read(fresh, newcomers.cache)
        for place in order[len(fresh) :]:
            found = known[place]
            assert found is not None
            newcomers.absorb(self._resume(prompts[place], *found))
        if order != sorted(order):
            assert newcomers.cache is not None
            places = torch.tensor(order, device=newcomers.logits.device).argsort()
            newcomers.cache.select(places)
            newcomers.logits = newcomers.logits[places]
        self.absorb(newcomers)

    @torch.inference_mode()
    def keep(self, slot: int, ids: Sequence[int]) -> None:
        """Let later prompts continue a row that is about to leave.

        Args:
            ids: Its prompt and what it has taken; tokens it was not fed yet are left out.
        """
        if self.kept is None or self.cache is None or not self.kept.most_bytes:
            return
        seen = int(self.cache.lengths[slot])
        self.kept.add(KeptRow(list(ids[:seen]), *self.cache.copy_row(slot, seen)))

    @torch.inference_mode()
    def absorb(self, other: RunningBatch) -> None:
        """Take over another batch's rows, behind the old ones."""
        if other.cache is None:
            return
        if self.cache is None:
            self.cache, self.logits = other.cache, other.logits
            return
        # First what may fail for want of memory; until it is there, nothing of this batch changes.
        logits = torch.cat([self.logits, other.logits])
        rows = len(self.cache.lengths) + len(other.cache.lengths)
        self._make_room(self.cache, rows, max(self.cache.longest, other.cache.longest))
        self.cache.join(other.cache)
        self.logits = logits

    @torch.inference_mode()
    def feed(self, tokens: torch.Tensor, going_on: Sequence[int] | None = None) -> list[int]:
        """Give every row its next token (B,); rows whose place is not in `going_on` leave first.

        Returns:
            For each row its place before: the last rows fill the gaps of those that left.
        """
        assert self.cache is not None
        slots = list(range(len(tokens)))  # the old slot of each row
        if going_on is not None and len(going_on) < len(tokens):
            slots = _close_gaps(going_on)
            if not slots:
                self.cache, self.logits = None, torch.empty(0)  # memory is given back
                return []
            kept = torch.tensor(slots, device=tokens.device)
            tokens = tokens[kept]
            self.cache.select(kept)
        self._make_room(self.cache, len(slots), self.cache.longest + 1)
        hidden = self.model.hidden_states(tokens[:, None], cache=self.cache)  # (B, 1, D)
        self.logits = self.model.out_head(hidden[:, -1])  # (B, V)
        return slots

    def _read(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> torch.Tensor:
        """Fill an empty cache with the prompts; logits (B, V) of the next tokens."""
        device = self.model.tok_emb.weight.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        hidden, places = read_rows(self.model, prompts, cache=cache, row_lengths=lengths)
        # Only a prompt's last token says something about what comes next: the head sees no other.
        last = places[torch.arange(len(prompts), device=device), lengths - 1]
        return self.model.out_head(hidden[last])

    def _resume(self, prompt: Sequence[int], row: KeptRow, count: int) -> RunningBatch:
        """A batch of the one prompt, whose first `count` tokens another row has read."""
        alone = RunningBatch(self.model, self.max_length)
        alone.cache = self._new_cache(1, len(prompt))
        alone.cache.load_row(row.keys[:, :, :count], row.values[:, :, :count])
        rest = torch.tensor([prompt[count:]], device=alone.cache.lengths.device)  # (1, T)
        hidden = self.model.hidden_states(rest, cache=alone.cache)  # (1, T, D)
        alone.logits = self.model.out_head(hidden[:, -1])  # (1, V)
        return alone

    def _new_cache(self, rows: int, longest: int) -> KVCache:
        weight = self.model.tok_emb.weight
        device = weight.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        length = self.max_length or longest
        return KVCache(self.model.config, rows, length, weight.device, dtype)

    def _make_room(self, cache: KVCache, rows: int, longest: int) -> None:
        """Double what is too small, so that many small steps cost no more than one large one."""
        have_rows, have_length = cache.room
        if rows > have_rows or longest > have_length:
            cache.resize(
                have_rows if rows <= have_rows else max(rows, 2 * have_rows),
                have_length
                if longest <= have_length
                else min(max(longest, 2 * have_length), self.model.config.context_length),
            )


def read_rows(
    model: GPTModel, rows: Sequence[Sequence[int]], **cached: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model makes of rows of token ids, each common beginning computed once.

    Args:
        cached: `cache` and `row_lengths` for `hidden_states`.

    Returns:
        Hidden states (N, D), and where in them each row's tokens are (B, T).
    """
    device = model.tok_emb.weight.device
    # N tokens of the rows' prefix tree instead of B · T: the instruction template that opens every
    # prompt is read once for all of them.
    packed = {k: v.to(device) for k, v in lay_out(rows, share_prefix=True).items()}
    layout = PackedLayout(packed["positions"], packed["gather"], packed["scatter"])
    return model.hidden_states(packed["input_ids"], layout=layout, **cached), layout.gather


def _close_gaps(kept: Sequence[int]) -> list[int]:
    """Which old slot goes to each new one: those that can stay do, the last ones fill the gaps.

    A row that stays where it is costs no copy of its keys and values.
    """
    staying = set(kept)
    gone = [slot for slot in range(len(kept)) if slot not in staying]
    slots = list(range(len(kept)))
    for slot, filler in zip(gone, (s for s in kept if s >= len(kept)), strict=True):
        slots[slot] = filler
    return slots
