"""Requests that come and go in one batch: each gets what it would get alone, and no more work."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from typing import Any

import pytest
import torch

from lightning_sft.common.errors import InputError
from lightning_sft.decoding.batch import RunningBatch
from lightning_sft.decoding.generation import GenerationConfig, generate
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.serving import sampling
from lightning_sft.serving.engine import Engine, QueueFullError, StoppingError
from lightning_sft.serving.job import Job, TokenEvent
from support.serving import wait_for

CONTEXT = 32
PROMPTS = [[(7 * place + k) % 61 for k in range(1 + 5 * place % 12)] for place in range(24)]
SAMPLED = {"temperature": 1.5, "top_k": 20, "top_p": 0.95}


@pytest.fixture(scope="module")
def model(make_model) -> GPTModel:
    """In float64, so that no two logits are as good as equal."""
    return make_model(dtype=torch.float64).requires_grad_(False)


class Desk:
    """Takes an engine's news down. The engine's loop is turned by hand, a round at a time."""

    def __init__(self, model: GPTModel | dict[str, GPTModel], **settings: Any) -> None:
        models = model if isinstance(model, dict) else {"m": model}
        self.tokens: dict[Job, list[int]] = defaultdict(list)
        self.likelihoods: dict[Job, list[Any]] = defaultdict(list)
        self.ends: dict[Job, str] = {}
        self.engine = Engine(models, self.take, **{"eos_token_ids": {}} | settings)

    def take(self, events: list[tuple[Job, TokenEvent]]) -> None:
        for job, item in events:
            assert job not in self.ends
            if item.token is not None:
                self.tokens[job].append(item.token)
                self.likelihoods[job].append(item.logprobs)
            if item.end is not None:
                self.ends[job] = item.end

    def turn(self) -> None:
        """One round of the engine's loop, in this thread."""
        self.engine.turn()

    def finish(self) -> None:
        while self.engine.running or self.engine.waiting:
            self.turn()


def job(prompt: list[int], name: str = "m", **settings: Any) -> Job:
    own = {key: settings.pop(key) for key in ("seconds", "top_logprobs") if key in settings}
    return Job(name, prompt, GenerationConfig(**{"max_new_tokens": 64} | settings), **own)


def alone(model: GPTModel, prompt: list[int], **settings: Any) -> list[int]:
    settings = {"max_new_tokens": 64, "eos_token_id": None} | settings
    return generate(model, [prompt], **settings)[0]


@pytest.mark.parametrize("sampled", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("seed", range(4))
def test_whoever_joins_when_gets_what_he_would_get_alone(model, seed, sampled):
    rng = random.Random(seed)
    desk = Desk(model, batch_size=rng.choice([2, 7, 32]))
    jobs = [
        job(prompt, max_new_tokens=rng.randint(1, 40), seed=place, **sampled)
        for place, prompt in enumerate(PROMPTS)
    ]
    waiting = list(jobs)
    most = 0
    while waiting or desk.engine.running or desk.engine.waiting:
        for _ in range(rng.randint(0, 4)):
            if waiting:
                desk.engine.submit([waiting.pop()])
        desk.turn()
        most = max(most, desk.engine.running)
    assert most > 1
    for one in jobs:
        expected = alone(
            model,
            one.prompt,
            max_new_tokens=one.settings.max_new_tokens,
            seed=one.settings.seed,
            **sampled,
        )
        assert desk.tokens[one] == expected
        assert desk.ends[one] == "length"


def test_float32_tokens_equal_too(make_model):
    model = make_model().requires_grad_(False)
    desk = Desk(model)
    jobs = [job(prompt) for prompt in PROMPTS]
    desk.engine.submit(jobs)
    desk.finish()
    assert [desk.tokens[one] for one in jobs] == [alone(model, one.prompt) for one in jobs]


def test_settings_of_ones_own(model):
    """Rows of one batch that are sampled differently."""
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 2},
        {"temperature": 2.0, "top_k": 5, "seed": 1},
        {"temperature": 1.0, "top_p": 0.5, "seed": 1},
    ]
    desk = Desk(model)
    jobs = [job([1, 2, 3], **chosen) for chosen in settings]
    desk.engine.submit(jobs)
    desk.finish()
    answers = [desk.tokens[one] for one in jobs]
    assert answers == [alone(model, [1, 2, 3], **chosen) for chosen in settings]
    assert len({tuple(answer) for answer in answers}) == len(answers)


def test_end_of_text_ends_and_is_not_told(model):
    whole = alone(model, [1, 2, 3])
    end = whole[4]
    desk = Desk(model, eos_token_ids={"m": end})
    one = job([1, 2, 3])
    desk.engine.submit([one])
    desk.finish()
    assert desk.tokens[one] == whole[: whole.index(end)]
    assert desk.ends[one] == "stop"


def test_one_step_serves_all_rows_and_a_short_answer_does_not_wait(model):
    desk = Desk(model)
    long, short = job([1], max_new_tokens=30), job([2], max_new_tokens=3)
    desk.engine.submit([long])
    for _ in range(10):
        desk.turn()
    desk.engine.submit([short])
    desk.finish()
    assert (len(desk.tokens[long]), len(desk.tokens[short])) == (30, 3)
    assert desk.engine.steps == 30  # 33 one after the other


def test_a_batch_of_its_size_and_the_rest_waits(model):
    desk = Desk(model, batch_size=3, queue=4)
    desk.engine.submit([job([1], max_new_tokens=5) for _ in range(7)])
    desk.turn()
    assert (desk.engine.running, desk.engine.waiting) == (3, 4)
    with pytest.raises(QueueFullError):
        desk.engine.submit([job([1])])
    desk.finish()
    assert len(desk.ends) == 7


def test_a_crowd_of_long_prompts_joins_in_parts(model):
    desk = Desk(model, prefill_tokens=45)
    desk.engine.submit([job([1] * 20) for _ in range(5)])
    joined = []
    for _ in range(3):
        desk.turn()
        joined.append(desk.engine.running)
    assert joined == [2, 4, 5]
    desk = Desk(model, prefill_tokens=1)  # a prompt above the budget is read nevertheless
    desk.engine.submit([job([1] * 20)])
    desk.turn()
    assert desk.engine.running == 1


def test_a_cancelled_job_leaves_at_the_next_step(model):
    desk = Desk(model, batch_size=2)
    gone, stays, waits = (job([place]) for place in range(3))
    desk.engine.submit([gone, stays, waits])
    for _ in range(3):
        desk.turn()
    gone.cancel()
    desk.turn()
    assert desk.engine.running == 1
    desk.turn()
    assert desk.engine.running == 2  # the place is taken
    desk.finish()
    assert len(desk.tokens[gone]) == 3
    assert gone not in desk.ends
    assert desk.tokens[stays] == alone(model, [1])
    assert desk.tokens[waits] == alone(model, [2])


def test_time_is_up(model, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("lightning_sft.serving.engine.time.monotonic", lambda: clock[0])
    desk = Desk(model, batch_size=1)
    runs, waits, other = job([1], seconds=10), job([2], seconds=10), job([3], seconds=60)
    desk.engine.submit([runs, waits, other])
    desk.turn()
    clock[0] += 11
    desk.turn()
    assert desk.ends == {waits: "time", runs: "time"}
    assert len(desk.tokens[runs]) == 2  # what it had is kept
    desk.finish()
    assert desk.tokens[other] == alone(model, [3])


def test_likelihoods_are_the_models_own(model):
    desk = Desk(model)
    with_top, with_none = job([1, 2], top_logprobs=3, temperature=1.5, top_k=2), job([1])
    desk.engine.submit([with_top, with_none])
    desk.finish()
    ids = [1, 2, *desk.tokens[with_top]]
    expected = model(torch.tensor([ids])).float().log_softmax(-1)[0]
    for place, likelihood in enumerate(desk.likelihoods[with_top], start=1):
        assert likelihood.logprob == pytest.approx(float(expected[place, ids[place + 1]]), abs=1e-5)
        top = expected[place].topk(3)
        assert [token for token, _ in likelihood.top] == top.indices.tolist()
        assert [value for _, value in likelihood.top] == pytest.approx(
            top.values.tolist(), abs=1e-5
        )
    assert set(desk.likelihoods[with_none]) == {None}


def test_two_models_take_turns(model, make_model):
    other = make_model(seed=1, dtype=torch.float64).requires_grad_(False)
    desk = Desk({"m": model, "other": other})
    first, second = job([1, 2]), job([1, 2], "other")
    desk.engine.submit([first])
    desk.engine.submit([second])
    desk.turn()
    assert len(desk.tokens[first]) == len(desk.tokens[second]) == 1
    desk.finish()
    assert desk.tokens[first] == alone(model, [1, 2])
    assert desk.tokens[second] == alone(other, [1, 2])
    assert desk.tokens[first] != desk.tokens[second]


def test_a_prompt_that_cannot_be_answered_is_refused(model):
    desk = Desk(model)
    for prompt in ([], [1] * CONTEXT):
        with pytest.raises(InputError):
            desk.engine.submit([job([1]), job(prompt)])
    assert desk.engine.waiting == 0


def test_a_failing_step_ends_its_answers_and_no_others(model, monkeypatch, capsys):
    desk = Desk(model)
    failed = [job([1]), job([2])]
    desk.engine.submit(failed)
    desk.turn()
    feed = RunningBatch.feed
    monkeypatch.setattr(RunningBatch, "feed", lambda *_: 1 / 0)
    desk.turn()
    monkeypatch.setattr(RunningBatch, "feed", feed)
    assert [desk.ends[one] for one in failed] == ["error", "error"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    later = job([3])
    desk.engine.submit([later])
    desk.finish()
    assert desk.tokens[later] == alone(model, [3])


def test_a_failing_newcomer_does_not_harm_those_under_way(model, monkeypatch, capsys):
    desk = Desk(model)
    under_way, newcomer = job([1]), job([2])
    desk.engine.submit([under_way])
    desk.turn()
    join = RunningBatch.join
    monkeypatch.setattr(RunningBatch, "join", lambda *_: 1 / 0)
    desk.engine.submit([newcomer])
    desk.turn()
    monkeypatch.setattr(RunningBatch, "join", join)
    desk.finish()
    assert desk.ends == {newcomer: "error", under_way: "length"}
    assert desk.tokens[under_way] == alone(model, [1])
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("half_done", [False, True], ids=["before", "after"])
def test_a_step_that_fails_for_one_row_ends_that_row(model, monkeypatch, capsys, half_done):
    """Whether it fails before anything was computed, or with the cache changed already."""
    settings: list[dict[str, Any]] = [{}, {"seed": 5} | SAMPLED, {"seed": 6} | SAMPLED]
    first, whole, last = (alone(model, [1, 2, 3], **chosen) for chosen in settings)
    poison = next(token for token in whole[3:] if token not in (*first, *whole[:3], *last))
    feed = RunningBatch.feed

    def choke(self: RunningBatch, tokens: torch.Tensor, going_on: Any = None) -> list[int]:
        slots = feed(self, tokens, going_on) if half_done else []
        if poison in tokens.tolist():
            raise RuntimeError("a row that cannot be computed")
        return slots if half_done else feed(self, tokens, going_on)

    monkeypatch.setattr(RunningBatch, "feed", choke)
    desk = Desk(model)
    jobs = [job([1, 2, 3], **chosen) for chosen in settings]
    desk.engine.submit(jobs)
    desk.finish()
    assert [desk.ends[one] for one in jobs] == ["length", "error", "length"]
    written = whole[: whole.index(poison) + 1]  # what it had is kept
    assert [desk.tokens[one] for one in jobs] == [first, written, last]
    assert "a row that cannot be computed" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(3))
def test_steps_that_fail_now_and_then_change_no_text(model, monkeypatch, seed):
    rng = random.Random(seed)
    feed = RunningBatch.feed

    def falter(self: RunningBatch, tokens: torch.Tensor, going_on: Any = None) -> list[int]:
        several = len(tokens) > 1
        if several and rng.random() < 0.2:
            raise MemoryError
        slots = feed(self, tokens, going_on)
        if several and rng.random() < 0.2:
            raise MemoryError
        return slots

    monkeypatch.setattr(RunningBatch, "feed", falter)
    desk = Desk(model, batch_size=5)
    jobs = [job(prompt, seed=place, **SAMPLED) for place, prompt in enumerate(PROMPTS[:12])]
    desk.engine.submit(jobs[:6])
    for one in jobs[6:]:
        desk.turn()
        desk.engine.submit([one])
    desk.finish()
    # Where the others had left, a step of several rows can be one of a single row, which may fail.
    assert {desk.ends[one] for one in jobs} <= {"length", "error"}
    for place, one in enumerate(jobs):
        if desk.ends[one] == "length":
            assert desk.tokens[one] == alone(model, one.prompt, seed=place, **SAMPLED)
    assert sum(desk.ends[one] == "length" for one in jobs) >= 8


def test_a_row_that_cannot_be_drawn_ends_alone(model, monkeypatch, capsys):
    """Rows of equal settings are computed together; what each has drawn is not drawn again."""
    jobs = [job(prompt, seed=place, **SAMPLED) for place, prompt in enumerate(PROMPTS[:4])]
    jobs.append(job([5], top_logprobs=7))
    draw, rate, refused = sampling.draw, sampling.TokenLogprobs, jobs[2]

    def draw_some(row: torch.Tensor, rng: torch.Generator) -> int:
        return 1 // 0 if rng is refused.rng else draw(row, rng)

    def rate_some(logprob: float, top: list[Any]) -> Any:
        return [][7] if len(top) == 7 else rate(logprob, top)

    monkeypatch.setattr(sampling, "draw", draw_some)
    monkeypatch.setattr(sampling, "TokenLogprobs", rate_some)
    desk = Desk(model)
    jobs.append(job([6], top_logprobs=2))
    desk.engine.submit(jobs)
    desk.finish()
    ends = [desk.ends[one] for one in jobs]
    assert ends == ["length", "length", "error", "length", "error", "length"]
    for place in (0, 1, 3):
        assert desk.tokens[jobs[place]] == alone(model, PROMPTS[place], seed=place, **SAMPLED)
    assert desk.tokens[jobs[5]] == alone(model, [6])
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error
    assert "IndexError" in error


def test_settings_that_cannot_be_computed_end_alone(model, monkeypatch):
    right = sampling.probabilities

    def compute(logits: torch.Tensor, settings: GenerationConfig) -> torch.Tensor:
        return logits[99] if settings.top_k == 13 else right(logits, settings)

    monkeypatch.setattr(sampling, "probabilities", compute)
    desk = Desk(model)
    jobs = [job([1, 2, 3], **SAMPLED), job([4], **SAMPLED | {"top_k": 13}), job([5])]
    desk.engine.submit(jobs)
    desk.finish()
    assert [desk.ends[one] for one in jobs] == ["length", "error", "length"]
    assert desk.tokens[jobs[0]] == alone(model, [1, 2, 3], **SAMPLED)


def test_a_prompt_that_cannot_be_read_ends_alone(model, monkeypatch):
    join = RunningBatch.join

    def choke(self: RunningBatch, prompts: list[list[int]]) -> None:
        assert [9, 9] not in prompts
        join(self, prompts)

    monkeypatch.setattr(RunningBatch, "join", choke)
    desk = Desk(model)
    jobs = [job([1]), job([9, 9]), job([2])]
    desk.engine.submit(jobs)
    desk.finish()
    assert [desk.ends[one] for one in jobs] == ["length", "error", "length"]
    assert [desk.tokens[one] for one in jobs] == [alone(model, [1]), [], alone(model, [2])]


def test_what_fails_together_is_tried_alone():
    calls = []

    def halve(rows: Any) -> list[int]:
        calls.append(list(rows))
        assert 3 not in rows
        return [row // 2 for row in rows]

    results, faults = sampling.isolate([2, 3, 4], halve)
    assert results == {2: 1, 4: 2}
    assert isinstance(faults.pop(3), AssertionError)
    assert not faults
    assert calls == [[2, 3, 4], [2], [3], [4]]
    assert sampling.isolate([2, 4], halve) == ({2: 1, 4: 2}, {})


def test_draining_finishes_what_runs_and_sends_the_rest_away(model):
    desk = Desk(model, batch_size=1)
    runs, waits = job([1]), job([2])
    desk.engine.submit([runs, waits])
    desk.turn()
    desk.engine.drain(60)
    with pytest.raises(StoppingError):
        desk.engine.submit([job([3])])
    desk.finish()
    assert desk.ends == {waits: "stopping", runs: "length"}
    assert desk.tokens[runs] == alone(model, [1])


def test_draining_has_an_end(model):
    desk = Desk(model)
    runs = job([1])
    desk.engine.submit([runs])
    desk.turn()
    desk.engine.drain(0)
    desk.turn()
    assert desk.ends == {runs: "stopping"}


def test_the_thread_takes_jobs_from_many_and_ends(model):
    desk = Desk(model)
    desk.engine.start()
    jobs = [job(prompt) for prompt in PROMPTS]
    threads = [threading.Thread(target=desk.engine.submit, args=([one],)) for one in jobs]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(desk.ends) == len(jobs))
    desk.engine.close()
    assert not desk.engine.alive
    assert [desk.tokens[one] for one in jobs] == [alone(model, one.prompt) for one in jobs]


# --- The cache that grows ---


def test_rows_join_and_leave_a_cache(model):
    """Against the whole text again for every token, at lengths that make the cache grow twice."""
    batch, rows = RunningBatch(model), []
    for step in range(20):
        if step % 5 == 0:
            prompts = [[step + 1] * (1 + step), [step + 2]]
            batch.join(prompts)
            rows += [list(prompt) for prompt in prompts]
        tokens = batch.logits.argmax(-1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        going_on = [place for place in range(len(rows)) if not (step == 7 and place % 2)]
        rows = [rows[slot] for slot in batch.feed(tokens, going_on)]
        for row, logits in zip(rows, batch.logits, strict=True):
            expected = model(torch.tensor([row]))[0, -1]
            torch.testing.assert_close(logits, expected)


def test_the_cache_takes_no_more_than_twice_what_it_holds(model):
    batch = RunningBatch(model)
    for place in range(5):
        batch.join([[place] * 3])
    assert batch.cache is not None
    assert batch.cache.room == (8, 3)
    batch.feed(batch.logits.argmax(-1))
    assert batch.cache.room == (8, 6)
    assert batch.feed(batch.logits.argmax(-1), []) == []
    assert batch.cache is None  # and nothing when it holds nothing


# --- The next turn of a conversation ---


def test_a_next_turn_reads_only_what_is_new(make_model):
    """Also after an answer that was cut short, beside others, and once what was kept is lost."""
    config = GPTConfig(vocab_size=61, context_length=400, emb_dim=24, n_heads=3, n_layers=2)
    model = make_model(config, dtype=torch.float64).requires_grad_(False)
    desk = Desk(model)
    talks = [[(7 * place + k * k) % 61 for k in range(40)] for place in range(4)]
    for turn in range(5):
        jobs = [job(talk, max_new_tokens=8 + place) for place, talk in enumerate(talks)]
        desk.engine.submit(jobs)
        for _ in range(4):
            desk.turn()
        jobs[3].cancel()
        if turn == 3:
            desk.engine.lanes["m"].kept.clear()
        desk.finish()
        for place, one in enumerate(jobs):
            most = {"max_new_tokens": len(desk.tokens[one])}
            assert desk.tokens[one] == alone(model, one.prompt, **most)
            assert len(desk.tokens[one]) == (4 if place == 3 else 8 + place)
            before = len(one.prompt) - 6
            assert one.reused == (0 if turn == 0 else before + (place == 3) - 1)
            talks[place] = [*one.prompt, *desk.tokens[one], *[turn, 1, 2, 3, 4, place]]


def test_what_could_not_be_kept_is_read_again(make_model, monkeypatch, capsys):
    config = GPTConfig(vocab_size=61, context_length=400, emb_dim=24, n_heads=3, n_layers=2)
    model = make_model(config, dtype=torch.float64).requires_grad_(False)
    desk = Desk(model)
    monkeypatch.setattr(RunningBatch, "keep", lambda *_: 1 / 0)
    first = job([1] * 50)
    desk.engine.submit([first])
    desk.finish()
    assert desk.ends[first] == "length"
    assert "could not be kept" in capsys.readouterr().err
    again = job([1] * 50)
    desk.engine.submit([again])
    desk.finish()
    assert (again.reused, desk.tokens[again]) == (0, desk.tokens[first])
