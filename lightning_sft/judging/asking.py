"""Asking a judge many questions: each reply kept at once, none asked twice.

Every reply becomes one line of a JSONL file before the next question is counted as done, so a
crash or a kill loses at most what was under way. A later run reads the file and asks only what is
missing. A question is the same when judge, options, seed, prompt text and role are the same; that
is its `key`. A reply that held no score counts as answered: it was paid for, and at temperature 0
it would come again. A question without a reply (server down, timeout) is asked again.

    >>> records = ask_all(config, questions, form, Path("scores.jsonl"))
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_sft.common import files
from lightning_sft.common.errors import ServiceError
from lightning_sft.judging.judge import JudgeConfig
from lightning_sft.judging.prompt import Verdict

if TYPE_CHECKING:  # loaded when something is asked: reading what is kept needs no HTTP
    from lightning_sft.judging.client import Judge, Reply

Record = dict[str, Any]


class Question(NamedTuple):
    """One prompt to send. `about` is what its record says of it: entry, role, repeat."""

    prompt: str
    seed: int
    about: Record
    raw: bool = False  # the prompt goes to the model as it is, without a template around it

    def key(self, config: JudgeConfig) -> str:
        """Name under which the reply is kept; 32 hexadecimal digits."""
        role = {name: self.about.get(name) for name in ("kind", "repeat", "order")}
        parts = [config.identity(), config.options(), self.seed, self.prompt, role]
        return _sha256(json.dumps(parts, sort_keys=True))[:32]


class ReplyFormat(NamedTuple):
    """What every reply to a set of questions should be like, and how it is read."""

    name: str
    schema: dict[str, Any] | None
    read: Callable[[str], Verdict]
    verb: str = "Judging"  # before the progress bar


def read_answered(path: Path) -> dict[str, Record]:
    """The answered records of a file by key, the newest where there are several."""
    if not path.exists():
        return {}
    records = [record for record in files.read_jsonl(path) if "key" in record]
    return {record["key"]: record for record in records if is_answered(record)}


def is_answered(record: Record) -> bool:
    """Whether a record is never to be asked for again."""
    return record.get("score") is not None or record.get("reply") is not None


def ask_all(
    config: JudgeConfig, questions: Sequence[Question], wanted: ReplyFormat, path: Path
) -> dict[str, Record]:
    """Ask what `path` does not answer yet, appending every reply to it.

    Returns:
        The record of each question by its key, also of those that could not be answered.

    Raises:
        ServiceError: The judge is not there, or stopped being usable; what came before is kept.
    """
    answered = read_answered(path)
    missing = [question for question in questions if question.key(config) not in answered]
    if not missing:
        return answered
    from lightning_sft.judging.client import Judge
    from lightning_sft.judging.probe import probe

    judge = Judge(config)
    if any("score" not in question.about for question in missing):
        probe(judge)
    with _only_writer(path):
        # Read again: a run that ended since may have answered them.
        return _ask_missing(judge, questions, wanted, path, read_answered(path))


def _ask_missing(
    judge: Judge,
    questions: Sequence[Question],
    wanted: ReplyFormat,
    path: Path,
    records: dict[str, Record],
) -> dict[str, Record]:
    from tqdm import tqdm

    writing = threading.Lock()

    def answer(question: Question) -> Record:
        record = _ask_one(judge, question, wanted)
        # Written by the thread that got the reply, so that a kill has little time to come between.
        with writing:
            files.append_line(path, json.dumps(record, ensure_ascii=False))
            records[record["key"]] = record
        return record

    known = [records.get(question.key(judge.config)) for question in questions]
    missing = [question for question, record in zip(questions, known, strict=True) if not record]
    scores = [r["score"] for r in known if r and r["kind"] == "answer" and r["score"] is not None]
    progress = tqdm(total=len(questions), initial=len(questions) - len(missing), desc=wanted.verb)
    with progress, ThreadPoolExecutor(judge.config.concurrency) as pool:
        futures = [pool.submit(answer, question) for question in missing]
        try:
            for future in as_completed(futures):
                record = future.result()
                if record["kind"] == "answer" and record["score"] is not None:
                    scores.append(record["score"])
                    progress.set_postfix_str(f"mean {sum(scores) / len(scores):.2f}")
                progress.update()
        except BaseException:
            # Replies under way are already paid for: they are waited for and kept.
            judge.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return records


def _ask_one(judge: Judge, question: Question, wanted: ReplyFormat) -> Record:
    if judge.stopped.is_set():
        raise ServiceError("stopped")  # by a failure before, which is the one that is reported
    if "score" in question.about:  # decided by rule, without asking
        verdict = Verdict(question.about["score"], question.about["reason"])
        return _record(judge.config, question, None, verdict, wanted.name)
    try:
        reply = judge.ask(question.prompt, wanted.schema, question.seed, raw=question.raw)
    except ServiceError:
        judge.stopped.set()
        raise
    failed = reply.reason or reply.text is None
    verdict = Verdict(None, reply.reason) if failed else wanted.read(reply.text or "")
    return _record(judge.config, question, reply, verdict, wanted.name)


def _record(
    config: JudgeConfig, question: Question, reply: Reply | None, verdict: Verdict, prompt_name: str
) -> Record:
    return question.about | {
        "score": verdict.score,
        "reason": verdict.reason,
        "reply": reply.text if reply else None,
        "judge": config.identity(),
        "options": config.options() | {"seed": question.seed},
        "held_to_schema": bool(reply and reply.held_to_schema),
        "prompt": prompt_name,
        "prompt_sha256": _sha256(question.prompt),
        "seconds": reply.seconds if reply else 0.0,
        "key": question.key(config),
    }


@contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Keep a second run from asking the same questions at the same time."""
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(f"{path}.lock", timeout=0):
            yield
    except filelock.Timeout:
        raise ServiceError(f"{path}: another run is writing there; wait for it") from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
