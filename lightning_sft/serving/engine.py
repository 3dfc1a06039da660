"""Many requests, one cache: continuous batching of answers, in one thread that owns the models.

A request joins the running batch between two steps: its prompt is read, its keys and values are put
behind those of the rows under way, and from then on all rows take their next token together. A row
leaves as soon as it is finished or nobody wants it any more, so a short answer never waits for a
long one. Greedy tokens are those of `generate` for the prompt alone (in float32, unless two logits
differ by less than rounding does); sampled ones depend on the request's own seed, not on who else
is being answered.

What a finished row has seen is kept for a while: the next turn of a conversation begins with it,
and only what is new is read.

Whatever fails for several rows is taken again for each alone. Who fails then has ended with an
error, and the others go on with the text that they would have had anyway.

    >>> engine = Engine({"mine": model}, deliver=print, eos_token_ids={"mine": 50256})
    >>> engine.start()
    >>> engine.submit([Job("mine", tokenizer.encode("Hello"), GenerationConfig())])
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lightning_sft.common.errors import LightningSFTError
from lightning_sft.decoding.batch import RunningBatch
from lightning_sft.decoding.generation import check_prompts, seed_row
from lightning_sft.decoding.kept_rows import KeptRows
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.serving.job import Job, TokenEvent
from lightning_sft.serving.log import log_error
from lightning_sft.serving.sampling import find_logprobs, isolate, sample_each


class QueueFullError(LightningSFTError):
    """More requests are waiting than the engine takes."""


class StoppingError(LightningSFTError):
    """The engine takes nothing new, because it is about to end."""


@dataclass
class Lane:
    """One model, its running batch, the jobs of the batch's rows, and rows that are finished."""

    batch: RunningBatch
    kept: KeptRows
    eos_token_id: int | None
    jobs: list[Job] = field(default_factory=list)
    waiting: deque[Job] = field(default_factory=deque)


class Engine:
    """Answers jobs for one or more models; more than one take turns, a step each.

    Args:
        models: By name; they are put into evaluation mode.
        deliver: Called with what every step brought, in the engine's thread.
        eos_token_ids: What ends an answer, by model; without one, no token does.
        batch_size: Most rows of a batch.
        queue: Most jobs that may wait to join.
        prefill_tokens: Most prompt tokens read between two steps, but for one longer prompt, so
            that a crowd of newcomers does not halt the answers under way.
        kept_bytes: Most memory for finished rows, of each model.
    """

    def __init__(
        self,
        models: Mapping[str, GPTModel],
        deliver: Callable[[list[tuple[Job, TokenEvent]]], None],
        *,
        eos_token_ids: Mapping[str, int],
        batch_size: int = 32,
        queue: int = 128,
        prefill_tokens: int = 2048,
        kept_bytes: int = 500_000_000,
    ) -> None:
        self.lanes = {}
        for name, model in models.items():
            kept = KeptRows(kept_bytes)
            batch = RunningBatch(model.eval(), kept=kept)
            self.lanes[name] = Lane(batch, kept, eos_token_ids.get(name))
        self.deliver = deliver
        self.batch_size, self.queue = batch_size, queue
        self.prefill_tokens = prefill_tokens
        self.steps = 0  # taken so far, by all models
        self.draining = False
        self._changed = threading.Condition()
        self._end_at = float("inf")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to take jobs, in a thread of its own."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs for one model, all or none.

        Raises:
            InputError: A prompt is empty or leaves no room for an answer.
            QueueFullError: The queue would become longer than allowed.
            StoppingError: The engine is about to end.
        """
        for job in jobs:
            context = self.lanes[job.model].batch.model.config.context_length
            check_prompts([job.prompt], context)
            job.most = min(job.settings.max_new_tokens, context - len(job.prompt))
            job.rng = seed_row(job.settings.seed, job.key)
            job.deadline = time.monotonic() + job.seconds
        with self._changed:
            if self.draining:
                raise StoppingError("the server is stopping")
            lane = self.lanes[jobs[0].model]
            free = max(0, self.batch_size - len(lane.jobs))
            if len(lane.waiting) + len(jobs) > self.queue + free:
                raise QueueFullError(f"{len(lane.waiting)} prompts are waiting already")
            lane.waiting.extend(jobs)
            self._changed.notify()

    def drain(self, seconds: float) -> None:
        """Take nothing new, send those who wait away, and finish what runs within `seconds`.

        Safe in a signal handler: it takes no lock.
        """
        self._end_at = min(self._end_at, time.monotonic() + seconds)
        self.draining = True

    def close(self) -> None:
        """End at once and wait for the thread."""
        self.drain(0)
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    @property
    def alive(self) -> bool:
        """Whether the thread runs; a job that is given to a dead one is never answered."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Rows being answered."""
        return sum(len(lane.jobs) for lane in self.lanes.values())

    @property
    def waiting(self) -> int:
        """Jobs that have not joined yet."""
        return sum(len(lane.waiting) for lane in self.lanes.values())

    def turn(self) -> None:
        """One round: for every model, whoever may joins, and all rows take a token."""
        for lane in self.lanes.values():
            try:
                self._dismiss(lane)
                self._admit(lane)
                self._step(lane)
            except Exception as error:  # whatever it was, the next request deserves an answer
                self._fail(lane, error)

    def _run(self) -> None:
        while True:
            with self._changed:  # so that no job slips in behind the last look
                if not self.running and not self.waiting:
                    if self.draining:
                        return
                    self._changed.wait(0.2)  # a limit, as `drain` cannot notify
            self.turn()

    def _dismiss(self, lane: Lane) -> None:
        """Let go of those who wait, and are not wanted any more or have waited too long."""
        if not lane.waiting:
            return
        now, events = time.monotonic(), []
        with self._changed:
            for job in list(lane.waiting):
                reason = "stopping" if self.draining else "time" if now >= job.deadline else None
                if job.cancelled or reason:
                    lane.waiting.remove(job)
                    if not job.cancelled:
                        events.append((job, TokenEvent(None, end=reason)))
        self._report(events)

    def _admit(self, lane: Lane) -> None:
        """Let those join who have waited longest, as far as there is room."""
        joining: list[Job] = []
        before = len(lane.jobs)
        with self._changed:
            tokens = 0
            while lane.waiting and before + len(joining) < self.batch_size:
                prompt = lane.waiting[0].prompt
                lane.waiting[0].reused = lane.kept.count(prompt)
                tokens += len(prompt) - lane.waiting[0].reused
                if joining and tokens > self.prefill_tokens:
                    break
                joining.append(lane.waiting.popleft())
            lane.jobs += joining
        if not joining:
            return

        def join(places: Sequence[int]) -> list[Job]:
            jobs = [joining[place] for place in places]
            try:
                lane.batch.join([job.prompt for job in jobs])
            except Exception:
                lane.kept.clear()  # it may have been memory that was short
                raise
            return jobs

        joined, faults = isolate(range(len(joining)), join)
        lane.jobs[before:] = joined.values()
        self._report([self._fault(joining[place], faults[place]) for place in faults])

    def _step(self, lane: Lane) -> None:
        """One token for every row; rows that are finished leave."""
        if not lane.jobs:
            return
        self.steps += 1
        tokens, faults = sample_each(lane.batch.logits, lane.jobs)
        logprobs, unrated = find_logprobs(lane.batch.logits, tokens, lane.jobs)
        faults |= unrated
        events, going_on, now = [], [], time.monotonic()
        for row, job in enumerate(lane.jobs):
            if job.cancelled:
                continue
            if row in faults:
                events.append(self._fault(job, faults[row]))
                continue
            token, end = tokens[row], None
            if token == lane.eos_token_id:
                events.append((job, TokenEvent(None, end="stop")))
                continue
            job.written.append(token)
            if len(job.written) == job.most:
                end = "length"
            elif now >= self._end_at:
                end = "stopping"
            elif now >= job.deadline:
                end = "time"
            events.append((job, TokenEvent(token, logprobs.get(row), end)))
            if end is None:
                going_on.append(row)
        # Reported before the next step is computed: an answer need not wait for it. Whoever left in
        # between is noticed then.
        self._report(events)
        self._keep(lane, set(range(len(lane.jobs))) - set(going_on) - set(faults))
        jobs, lane.jobs = lane.jobs, [lane.jobs[row] for row in going_on]
        taken = [tokens.get(row, 0) for row in range(len(jobs))]  # 0 where a row leaves anyway
        device = lane.batch.logits.device
        try:
            slots = lane.batch.feed(torch.tensor(taken, device=device), going_on)
        except Exception as error:  # whatever it was, it need not concern all of them
            log_error(error, "a step failed: ")
        else:
            lane.jobs = [jobs[slot] for slot in slots]
            return
        self._rebuild(lane)  # outside of the handler, which holds the old batch's memory

    def _keep(self, lane: Lane, leaving: set[int]) -> None:
        """Keep what rows that leave have seen, for the next turns of their conversations."""
        try:
            for row in sorted(leaving):
                job = lane.jobs[row]
                lane.batch.keep(row, job.prompt + job.written)
        except Exception as error:  # their answers are complete
            log_error(error, "a finished answer could not be kept: ")
            lane.kept.clear()

    def _rebuild(self, lane: Lane) -> None:
        """Take the step that failed for each row alone, in a new batch of those who pass it.

        The old batch may be half changed. A row is its prompt and the tokens it has taken; it is
        read from these, and fed its last one as in the step that failed.
        """
        model = lane.batch.model
        lane.kept.clear()
        lane.batch = RunningBatch(model, kept=lane.kept)
        jobs, lane.jobs = lane.jobs, []
        if len(jobs) == 1:
            self._report([(jobs[0], TokenEvent(None, end="error"))])  # it was alone already
            return
        for job in jobs:
            try:
                alone = RunningBatch(model)
                alone.join([job.prompt + job.written[:-1]])
                alone.feed(torch.tensor(job.written[-1:], device=alone.logits.device))
                lane.batch.absorb(alone)
                lane.jobs.append(job)
            except Exception as error:
                self._report([self._fault(job, error)])

    def _fault(self, job: Job, error: Exception) -> tuple[Job, TokenEvent]:
        log_error(error, "an answer failed: ")
        return job, TokenEvent(None, end="error")

    def _fail(self, lane: Lane, error: Exception) -> None:
        """Give up the rows of a batch, and begin a new one."""
        log_error(error, "all answers under way failed: ")
        failed, lane.jobs = lane.jobs, []
        lane.kept.clear()
        lane.batch = RunningBatch(lane.batch.model, kept=lane.kept)
        self._report([(job, TokenEvent(None, end="error")) for job in failed])

    def _report(self, events: list[tuple[Job, TokenEvent]]) -> None:
        if events:
            self.deliver(events)
