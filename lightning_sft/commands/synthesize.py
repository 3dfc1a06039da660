"""`synthesize`: data made by another model, through the client that `score` asks with.

    python -m lightning_sft synthesize passive_voice --data instruction-data.json --output new.json
    python -m lightning_sft synthesize preferences --data instruction-data.json --output pairs.json
    python -m lightning_sft synthesize instructions --count 100 --output new.json

`judging/synthesis.py` says what each kind asks for. First comes a line with what it will cost;
`--plan` ends there. Every reply is on disk in `NEW.json.replies.jsonl` before the next is counted,
so after a crash or a kill the same command asks only what is missing. The data file is written at
the end, whole, and each new record says which model was asked what, with which seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_sft.common import files
from lightning_sft.common.errors import IncompleteError, InputError, ServiceError
from lightning_sft.data.record_files import check_new_file, keep_from_data, write_records
from lightning_sft.judging.asking import Question, Record, ReplyFormat, ask_all, read_answered
from lightning_sft.judging.judge import JudgeConfig
from lightning_sft.judging.synthesis import read_reflection, read_text
from lightning_sft.judging.synthesis_questions import (
    Wish,
    free_judge,
    plan_answers,
    plan_entries,
    plan_instructions,
)

REPLIES_ENDING = ".replies.jsonl"
CHARACTERS = 4  # of English a token, about; for the estimate alone


@dataclasses.dataclass(frozen=True)
class Price:
    """What a million tokens cost, in any currency, for the estimate.

    Args:
        prompt: Of what is sent.
        reply: Of what comes back.
    """

    prompt: float = 0.0
    reply: float = 0.0


def synthesize(
    kind: Literal[
        "instructions",
        "passive_voice",
        "rewrite",
        "reflect_instruction",
        "reflect_response",
        "preferences",
    ],
    *,
    output: Path | None = None,
    data: str | None = None,
    field_names: dict[str, str] | None = None,
    count: int | None = None,
    limit: int | None = None,
    opening: str = "llama3",
    judge: JudgeConfig = JudgeConfig(),  # noqa: B008 - frozen
    price: Price = Price(),
    plan: bool = False,
) -> None:
    """Have another model make data.

    Args:
        kind: What it is asked for.
        output: The new file, .json or .jsonl.
        data: File or URL of the entries that it starts from; for all kinds but `instructions`.
        field_names: The data's own names where they differ, e.g. `{input: context}`.
        count: How many `instructions` to ask for.
        limit: Only the first so many entries, to try things out.
        opening: What stands before a user's message in the model's template, for `instructions`:
            llama3, chatml, phi3, gemma, or the text itself.
        judge: Who is asked, and how.
        price: Of a million tokens, for the estimate.
        plan: Say what it will cost, and end there.

    Raises:
        InputError: The settings or the data are not usable, or the output is somebody else's.
        ServiceError: The model is not there or stopped working; what it said is kept.
        IncompleteError: Done, but some replies are missing or unusable.
    """
    path, replies = _check_output(output, data)
    for name, value in (("count", count), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name}: {value}; it is at least 1")
    wanted = ReplyFormat(kind, None, read_text, verb="Asking")
    others: dict[int, dict[str, Any]] = {}
    if kind == "instructions":
        judge = free_judge(judge)
        wishes = plan_instructions(count, data, limit, opening, judge)
    else:
        wishes, others = plan_entries(kind, data, count, field_names, limit, judge)
        if kind in ("reflect_instruction", "reflect_response"):
            wanted = wanted._replace(read=lambda reply: read_reflection(kind, reply))
    expected = len(wishes)
    print(_describe_plan(kind, wishes, replies, judge, price))
    if plan:
        return
    records = _ask(judge, [wish.question for wish in wishes], wanted, replies)
    if kind == "instructions":
        wishes = plan_answers(wishes, records, judge)
        records |= _ask(judge, [wish.question for wish in wishes], wanted, replies)
    made = _collect(kind, wishes, records, judge)
    whole = [(others | made)[place] for place in sorted(others | made)]
    if not whole:
        raise IncompleteError(f"no reply could be used; {replies} says why")
    write_records(path, whole)
    print(f"wrote {path}: {len(made):,} new records; the replies are in {replies}")
    if len(made) < expected:
        raise IncompleteError(
            f"{expected - len(made):,} of {expected:,} records are missing, unchanged or came "
            f"twice; {replies} says why"
        )


# --- before anything is asked ---


def _check_output(output: Path | None, data: str | None) -> tuple[Path, Path]:
    """The new file and that of the replies; where there are replies the file may be there too."""
    if output is None:
        raise InputError("output: is missing; name the new file with --output NEW.json")
    sources = [] if data is None else [data]
    path = files.expand_user(output, "output")
    replies = path.with_name(path.name + REPLIES_ENDING)
    keep_from_data(path, "output", sources)
    if not replies.exists():
        check_new_file(path, "output", sources)
    return path, replies


def _describe_plan(
    kind: str, wishes: Sequence[Wish], replies: Path, judge: JudgeConfig, price: Price
) -> str:
    """What will be asked, of whom, and what it may cost."""
    known = read_answered(replies)
    # Entries with the same text are one question.
    asked_for = {wish.question.key(judge): wish.question for wish in wishes}
    missing = [question for key, question in asked_for.items() if key not in known]
    asked = len(missing) * (2 if kind == "instructions" else 1)  # each is then answered, too
    sent = sum(len(question.prompt) for question in missing) // CHARACTERS
    line = (
        f"{asked:,} questions for {judge.model} at {judge.url}, {len(asked_for) - len(missing):,} "
    )
    line += f"of {len(asked_for):,} kept already; about {sent:,} tokens to read"
    if judge.max_tokens is None:
        return f"{line} and no limit to what it writes (judge.max_tokens)"
    written = asked * judge.max_tokens
    line += f" and at most {written:,} to write"
    if price.prompt or price.reply:
        line += f": at most {(sent * price.prompt + written * price.reply) / 1e6:,.2f}"
    return line


# --- what comes of it ---


def _ask(
    judge: JudgeConfig, questions: Sequence[Question], wanted: ReplyFormat, replies: Path
) -> dict[str, Record]:
    once = {question.key(judge): question for question in questions}
    try:
        return ask_all(judge, list(once.values()), wanted, replies)
    except ServiceError as error:
        kept = f"; {replies} keeps what came, the same command goes on from there"
        raise ServiceError(f"{error}{kept if replies.exists() else ''}") from None


def _collect(
    kind: str, wishes: Sequence[Wish], records: Mapping[str, Record], judge: JudgeConfig
) -> dict[int, dict[str, Any]]:
    """The new records by their places; each says where it comes from."""
    made = {}
    for question, make in wishes:
        text = (records.get(question.key(judge)) or {}).get("score")
        if text is None:
            continue
        origin: dict[str, Any] = {"kind": kind, "model": judge.model, "prompt": question.prompt}
        origin |= {"seed": question.seed, "temperature": judge.temperature}
        if "opening" in question.about:  # what the instruction itself came from
            origin["opening"] = question.about["opening"]
        if tone := question.about.get("tone"):
            origin |= {"rewritten": "chosen" if tone == "polite" else "rejected", "tone": tone}
        record = make(text)
        if kind == "preferences" and record["chosen"] == record["rejected"]:
            continue  # nothing to prefer
        made[question.about["index"]] = record | {"synthesis": origin}
    return made
