"""Many requests, one cache: continuous batching of answers, in one thread that owns the models.

A request joins the running batch between two steps: its prompt is read, its keys and values are put
behind those of the rows under way, and from then on all rows take their next token together. A row
leaves as soon as it is finished or nobody wants it any more, so a short answer never waits for a
long one. Greedy tokens are those of `generate` for the prompt alone (in float32, unless two logits
differ by less than rounding does); sampled ones depend on the request's own seed, not on who else
is being answered.

    >>> engine = Engine({"mine": model}, deliver=lambda news: print(news))
    >>> engine.start()
    >>> engine.submit([Job("mine", tokenizer.encode("Hello"), GenerationConfig())])
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lightning_sft.common.errors import LightningSFTError, hide_keys
from lightning_sft.data.tokenizer import END_OF_TEXT
from lightning_sft.decoding.batch import Batch
from lightning_sft.decoding.generation import GenerationConfig, check_prompts, mix_seed, sample
from lightning_sft.models.gpt2 import GPTModel


class QueueFullError(LightningSFTError):
    """More requests are waiting than the engine takes."""


class StoppingError(LightningSFTError):
    """The engine takes nothing new, because it is about to end."""


class Likelihood(NamedTuple):
    """Log-probability of a token, and of the likeliest ones in its place."""

    logprob: float
    top: list[tuple[int, float]]


class News(NamedTuple):
    """What became of a job in one step.

    Args:
        token: The token it took; None when it took none.
        likelihood: The token's, where the job asked for it.
        end: Why it is over: `stop` (end-of-text), `length` (its most tokens, or the context is
            full), `time`, `stopping` (the engine ends) or `error`; None while it goes on.
    """

    token: int | None
    likelihood: Likelihood | None = None
    end: str | None = None


@dataclass(eq=False)
class Job:
    """One prompt to be answered.

    Args:
        model: Name of the model that answers.
        prompt: Token ids.
        settings: Its `batch_size` is not used.
        key: Beside the seed, what sampling depends on, as in `generation.decode`.
        top_logprobs: Report tokens' log-probabilities with this many alternatives.
        seconds: How long it may take, waiting included.
    """

    model: str
    prompt: Sequence[int]
    settings: GenerationConfig
    key: int = 0
    top_logprobs: int | None = None
    seconds: float = float("inf")
    cancelled: bool = False
    left: int = 0
    deadline: float = float("inf")
    rng: torch.Generator = field(default_factory=torch.Generator)

    def cancel(self) -> None:
        """Nobody wants the answer any more; may be called from any thread."""
        self.cancelled = True


@dataclass
class Lane:
    """One model, its running batch, and the jobs of the batch's rows."""

    batch: Batch
    jobs: list[Job] = field(default_factory=list)
    waiting: deque[Job] = field(default_factory=deque)


class Engine:
    """Answers jobs for one or more models; more than one take turns, a step each.

    Args:
        models: By name; they are put into evaluation mode.
        deliver: Told the news of every step, in the engine's thread.
        batch_size: Most rows of a batch.
        queue: Most jobs that may wait to join.
        prefill_tokens: Most prompt tokens read between two steps, but for one longer prompt, so
            that a crowd of newcomers does not halt the answers under way.
    """

    def __init__(
        self,
        models: Mapping[str, GPTModel],
        deliver: Callable[[list[tuple[Job, News]]], None],
        *,
        batch_size: int = 32,
        queue: int = 128,
        prefill_tokens: int = 2048,
        eos_token_id: int | None = END_OF_TEXT,
    ) -> None:
        self.lanes = {name: Lane(Batch(model.eval())) for name, model in models.items()}
        self.deliver = deliver
        self.batch_size, self.queue = batch_size, queue
        self.prefill_tokens, self.eos_token_id = prefill_tokens, eos_token_id
        self.steps = 0  # taken so far, by all models
        self.draining = False
        self._changed = threading.Condition()
        self._end_at = float("inf")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
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
            job.left = min(job.settings.max_new_tokens, context - len(job.prompt))
            job.rng.manual_seed(mix_seed(job.settings.seed, job.key))
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
        now, news = time.monotonic(), []
        with self._changed:
            for job in list(lane.waiting):
                reason = "stopping" if self.draining else "time" if now >= job.deadline else None
                if job.cancelled or reason:
                    lane.waiting.remove(job)
                    if not job.cancelled:
                        news.append((job, News(None, end=reason)))
        self._tell(news)

    def _admit(self, lane: Lane) -> None:
        """Let those join who have waited longest, as far as there is room."""
        joining: list[Job] = []
        with self._changed:
            tokens = 0
            while lane.waiting and len(lane.jobs) + len(joining) < self.batch_size:
                tokens += len(lane.waiting[0].prompt)
                if joining and tokens > self.prefill_tokens:
                    break
                joining.append(lane.waiting.popleft())
            lane.jobs += joining
        if not joining:
            return
        try:
            lane.batch.join([job.prompt for job in joining])
        except Exception as error:  # those under way are not to suffer
            _complain(error)
            del lane.jobs[-len(joining) :]
            self._tell([(job, News(None, end="error")) for job in joining])

    def _step(self, lane: Lane) -> None:
        """One token for every row; rows that are finished leave."""
        if not lane.jobs:
            return
        self.steps += 1
        tokens = sample_each(lane.batch.logits, lane.jobs)
        likelihoods = find_likelihoods(lane.batch.logits, tokens, lane.jobs)
        news, going_on, now = [], [], time.monotonic()
        for slot, (job, token) in enumerate(zip(lane.jobs, tokens.tolist(), strict=True)):
            if job.cancelled:
                continue
            end = None
            if token == self.eos_token_id:
                news.append((job, News(None, end="stop")))
                continue
            job.left -= 1
            if job.left == 0:
                end = "length"
            elif now >= self._end_at:
                end = "stopping"
            elif now >= job.deadline:
                end = "time"
            news.append((job, News(token, likelihoods.get(slot), end)))
            if end is None:
                going_on.append(slot)
        # Told before the next step is computed: an answer need not wait for it. Whoever left in
        # between is noticed then.
        self._tell(news)
        jobs, lane.jobs = lane.jobs, [lane.jobs[slot] for slot in going_on]
        slots = lane.batch.feed(tokens, going_on)
        lane.jobs = [jobs[slot] for slot in slots]

    def _fail(self, lane: Lane, error: Exception) -> None:
        """Give up the rows of a batch, and begin a new one."""
        _complain(error)
        failed, lane.jobs = lane.jobs, []
        lane.batch = Batch(lane.batch.model)
        self._tell([(job, News(None, end="error")) for job in failed])

    def _tell(self, news: list[tuple[Job, News]]) -> None:
        if news:
            self.deliver(news)


@torch.inference_mode()
def sample_each(logits: torch.Tensor, jobs: Sequence[Job]) -> torch.Tensor:
    """Next tokens (B,) from logits (B, V), rows of equal settings together."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for slot, job in enumerate(jobs):
        chosen = job.settings
        key = (chosen.temperature, chosen.top_k, chosen.top_p) if chosen.temperature else (0.0,)
        groups.setdefault(key, []).append(slot)
    if len(groups) == 1:
        return sample(logits, jobs[0].settings, [job.rng for job in jobs])
    tokens = torch.empty(len(jobs), dtype=torch.int64, device=logits.device)
    for slots in groups.values():
        rngs = [jobs[slot].rng for slot in slots]
        tokens[slots] = sample(logits[slots], jobs[slots[0]].settings, rngs)
    return tokens


@torch.inference_mode()
def find_likelihoods(
    logits: torch.Tensor, tokens: torch.Tensor, jobs: Sequence[Job]
) -> dict[int, Likelihood]:
    """For the rows that want them: what the model itself thought, before temperature and top-p."""
    slots = [slot for slot, job in enumerate(jobs) if job.top_logprobs is not None]
    if not slots:
        return {}
    logprobs = logits[slots].float().log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[slots][:, None])[:, 0].tolist()
    most = max(jobs[slot].top_logprobs or 0 for slot in slots)
    top = logprobs.topk(min(max(most, 1), logprobs.shape[-1]))
    values, ids = top.values.tolist(), top.indices.tolist()
    return {
        slot: Likelihood(
            chosen[place],
            list(zip(ids[place], values[place], strict=True))[: jobs[slot].top_logprobs or 0],
        )
        for place, slot in enumerate(slots)
    }


def _complain(error: Exception) -> None:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    print(f"error: {hide_keys(text)}", file=sys.stderr, flush=True)
