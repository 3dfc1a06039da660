"""The questions of `synthesize`, each with the record that its reply becomes. Nothing is sent here.

`synthesis.py` has the words; here they meet entries, seeds and files.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import Entry, local_path, read_entries
from lightning_sft.data.records import read_records
from lightning_sft.judging.asking import Question, Record
from lightning_sft.judging.judge import JudgeConfig
from lightning_sft.judging.synthesis import OPENINGS, TONES, fill, is_for, make_record

# At temperature 0 a model that is given nothing says the same each time.
FREE_TEMPERATURE = 1.0


class Wish(NamedTuple):
    """A question, and the record that its reply becomes."""

    question: Question
    make: Callable[[str], dict[str, Any]]


def free_judge(judge: JudgeConfig) -> JudgeConfig:
    """The judge as it is asked for instructions from nothing: at temperature 1 where it has none.

    Raises:
        InputError: It speaks another protocol than Ollama's.
    """
    if judge.protocol != "ollama":
        raise InputError(
            "judge.protocol: instructions from nothing need the raw mode of Ollama; the chat API "
            "of other servers puts a template around everything"
        )
    if judge.temperature > 0:
        return judge
    return dataclasses.replace(judge, temperature=FREE_TEMPERATURE)


def plan_instructions(
    count: int | None, data: str | None, limit: int | None, opening: str, judge: JudgeConfig
) -> list[Wish]:
    """The same question again and again; seeds tell them apart.

    Raises:
        InputError: There is no count, there is data, or an unknown opening.
    """
    if data is not None or count is None:
        raise InputError("instructions are made from nothing: give --count N, and no --data")
    text = OPENINGS.get(opening, opening)
    if text == opening and "<" not in text:
        raise InputError(
            f"opening: {opening!r}; allowed: {', '.join(OPENINGS)}, or a template's own text"
        )
    return [
        Wish(Question(text, judge.seed + n, {"kind": "instruction", "index": n}, True), _answered)
        for n in range(min(count, limit or count))
    ]


def plan_answers(
    wishes: Sequence[Wish], records: Mapping[str, Record], judge: JudgeConfig
) -> list[Wish]:
    """The instructions that came, each once, as questions."""
    planned: dict[str, Wish] = {}
    for wish in wishes:
        question = wish.question
        instruction = (records.get(question.key(judge)) or {}).get("score")
        if instruction is not None and instruction not in planned:
            about = {"kind": "response", "index": question.about["index"]}
            about["opening"] = question.prompt
            planned[instruction] = Wish(
                Question(instruction, question.seed, about),
                functools.partial(_answered, instruction),
            )
    return list(planned.values())


def _answered(instruction: str, reply: str = "") -> dict[str, Any]:
    return {"instruction": instruction, "input": "", "output": reply}


def plan_entries(
    kind: str,
    data: str | None,
    count: int | None,
    field_names: dict[str, str] | None,
    limit: int | None,
    judge: JudgeConfig,
) -> tuple[list[Wish], dict[int, dict[str, Any]]]:
    """What to ask about each entry, and by their places the records that stay as they are.

    Raises:
        InputError: There is no data, or it is wrong; or there is a count.
    """
    if data is None or count is not None:
        raise InputError(f"{kind} starts from entries: give --data FILE, and no --count")
    entries = read_entries(data, field_names=field_names)[:limit]
    records = read_records(local_path(data))[:limit]
    names = {name: name for name in ("instruction", "input", "output")} | (field_names or {})
    tones = random.Random(judge.seed)
    wishes, others = [], {}
    for place, (entry, record) in enumerate(zip(entries, records, strict=True)):
        tone = tones.choice(TONES) if kind == "preferences" else ""
        if is_for(kind, entry):
            wishes.append(_wish(kind, place, entry, record, names, tone, judge))
        else:
            others[place] = record
    return wishes, others


def _wish(
    kind: str,
    place: int,
    entry: Entry,
    record: dict[str, Any],
    names: Mapping[str, str],
    tone: str,
    judge: JudgeConfig,
) -> Wish:
    about = {"kind": kind, "index": place} | ({"tone": tone} if tone else {})
    return Wish(
        Question(fill(kind, entry, tone), judge.seed, about),
        lambda reply: make_record(kind, record, reply, names, tone),
    )
