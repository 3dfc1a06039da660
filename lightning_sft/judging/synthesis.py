"""What a model is asked to make data of, and how its reply becomes a record. Nothing is sent here.

| kind | asks for | the record |
|---|---|---|
| `instructions` | a user's message, from nothing, and its answer | instruction and output, new |
| `passive_voice` | the output in the passive voice | the entry with `output_2` |
| `rewrite` | the instruction in other words | the entry with another instruction |
| `reflect_instruction` | what is weak in an instruction, a better one and its answer | both new |
| `reflect_response` | what is weak in an output, and a better one | the entry with another output |
| `preferences` | the output slightly more polite or rude | the entry with `chosen`, `rejected` |

Sources, all in the book's repository: ch07/02 (passive voice), ch07/04 (preferences), ch07/05 (the
other two; Magpie, arXiv:2406.08464, and Reflection-Tuning, arXiv:2310.11716). `rewrite` is ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_sft.data.entries import Entry
from lightning_sft.judging.prompt import Verdict, question_of

# What stands before a user's message in each model's own template. A model that is given this and
# nothing else goes on with a message that a user might have sent. Ollama adds the token that begins
# a text by itself.
OPENINGS = {
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n",
    "chatml": "<|im_start|>user\n",
    "phi3": "<|user|>\n",
    "gemma": "<start_of_turn>user\n",
}
PASSIVE_VOICE = (
    "Without adding any response or explanation, convert the following text to passive voice: "
    "{output}"
)
REWRITE = (
    "Say the following instruction in other words, such that the same answer is still right. "
    "Reply with the new instruction and nothing else.\n\n{instruction}"
)
PREFERENCE = (
    "Given the input `{question}` and correct output `{output}`, slightly rewrite the output to be "
    "more {tone}. Keep the modification minimal. Only return the generated response and nothing "
    "else."
)
REFLECT_INSTRUCTION = """\
You are a helpful, precise but picky assistant for checking the quality of a given instruction.

[Instruction]
{instruction}

[The Start of Answer]
{output}

[The End of Answer]

[System]
We would like you to answer several questions related to the quality of a given instruction.
1. Why this instruction is not good? First analyse the instruction based on Complexity of the \
Topic, Level of Detail Required, Knowledge Required, Ambiguity of the Instruction and Logical \
Reasoning or Problem-Solving Involved. Then analyse why this answer is not good for the given \
instruction? Analyse based on the Helpfulness, Relevance, Accuracy and Level of Details. Finally \
analyse why this bad instruction lead to a bad answer.
2. Based on the reason you provided, generate a new and complete instruction which is complex and \
difficult to answer directly. Make sure the new instruction is relevant but independent to the \
original instruction, which can be answered without knowing the original instruction, put the new \
instruction in the format of [New Instruction] your instruction [End]
3. Answer the newly generated instruction as detailed as possible, in the format of [New Answer] \
your answer [End]"""
REFLECT_RESPONSE = """\
You are a helpful, precise but picky assistant for checking the quality of the answer to a given \
instruction.

[Instruction]
{instruction}
{given}
[The Start of Answer]
{output}

[The End of Answer]

[System]
We would like you to answer several questions related to the quality of the answer to the given \
instruction.
1. Why this answer is not good for the given instruction? Analyse based on the Helpfulness, \
Relevance, Accuracy and Level of Details.
2. Based on the reason you provided, generate a better answer, new and complete, as detailed as \
possible, in the format of [Better Answer] your answer [End]"""
GIVEN = "\n[The Start of Input]\n{input}\n\n[The End of Input]\n"
TEMPLATES = {
    "passive_voice": PASSIVE_VOICE,
    "rewrite": REWRITE,
    "reflect_instruction": REFLECT_INSTRUCTION,
    "reflect_response": REFLECT_RESPONSE,
    "preferences": PREFERENCE,
}
TONES = ("polite", "impolite")


def fill(kind: str, entry: Entry, tone: str = "") -> str:
    """The prompt for an entry. What is filled in is never searched for places again."""
    values = {
        "instruction": entry.instruction,
        "output": entry.output,
        "question": question_of(entry),
        "tone": tone,
        "given": GIVEN.replace("{input}", entry.input) if entry.input else "",
    }
    return re.sub(r"{(\w+)}", lambda match: values[match[1]], TEMPLATES[kind])


def is_for(kind: str, entry: Entry) -> bool:
    """Whether an entry is asked about. A new instruction would not fit the old input."""
    return not (kind == "reflect_instruction" and entry.input)


def read_text(reply: str) -> Verdict:
    """All of a reply but what it thought, as the text that was asked for."""
    text = re.sub(r"^\s*<think>.*?</think>", "", reply, count=1, flags=re.DOTALL).strip()
    return Verdict(text, None) if text else Verdict(None, "the reply is empty")


def read_reflection(kind: str, reply: str) -> Verdict:
    """A reply that must hold what was asked for between its marks."""
    parts = find_parts(kind, reply)
    missing = [name for name, text in parts.items() if not text]
    return Verdict(None, f"the reply has no [{missing[0]}]") if missing else read_text(reply)


def find_parts(kind: str, reply: str) -> dict[str, str]:
    """The marked parts of a reflection, by their names; "" for one that is missing."""
    names = (
        ("New Instruction", "New Answer") if kind == "reflect_instruction" else ("Better Answer",)
    )
    ends = r"\[End\]|\[New Answer\]|\Z" if kind == "reflect_instruction" else r"\[End\]|\Z"
    found = {}
    for name in names:
        match = re.search(rf"\[{name}\](.*?)(?:{ends})", reply, re.DOTALL)
        found[name] = match[1].strip() if match else ""
    return found


def make_record(
    kind: str, record: Mapping[str, Any], reply: str, names: Mapping[str, str], tone: str = ""
) -> dict[str, Any]:
    """The new record of an entry.

    Args:
        record: Of the entry, as the file has it; whatever else it holds is kept.
        reply: That `read_text` or `read_reflection` took.
        names: What the file calls `instruction` and `output`.
        tone: Of `preferences`: how the output was rewritten.
    """
    new = dict(record)
    if kind == "passive_voice":
        new["output_2"] = reply
    elif kind == "rewrite":
        new[names["instruction"]] = reply
    elif kind == "reflect_instruction":
        parts = find_parts(kind, reply)
        new[names["instruction"]] = parts["New Instruction"]
        new[names["output"]] = parts["New Answer"]
    elif kind == "reflect_response":
        new[names["output"]] = find_parts(kind, reply)["Better Answer"]
    else:
        old = record[names["output"]]
        new["rejected"], new["chosen"] = (old, reply) if tone == "polite" else (reply, old)
    return new
