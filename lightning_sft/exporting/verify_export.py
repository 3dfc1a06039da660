"""Is an export the model it was made from? Both answer the same prompts, and are compared.

`ask` takes the model's greedy answers and the logits along them; `check` loads the exported files
again, by the program they are for where it is installed, and asks it the same. A head that is
wrongly tied or a matrix that is not transposed moves the logits by far more than rounding does.

    python -m lightning_sft export --ckpt_path … --format hf --out exported --verify
"""

from __future__ import annotations

import contextlib
import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_sft.common.errors import LightningSFTError, ServiceError
from lightning_sft.data.encoding import encode_prompt
from lightning_sft.data.entries import Entry
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.tokenizer import Tokenizer
from lightning_sft.exporting.export_gguf import GGUFType, quantize, tensor_type, unquantize
from lightning_sft.exporting.exported_program import Program, readers
from lightning_sft.models.decoder import Decoder

NUM_TOKENS = 24  # of each answer
# Float32 sums differ by their order: an absolute part, and one for models of large logits.
TOLERANCE, RELATIVE_TOLERANCE = 1e-4, 1e-5

PROBES = (
    Entry("What is the capital of France?", "", ""),
    Entry("Rewrite the sentence in the past tense.", "She walks to school every day.", ""),
    Entry("Name three primary colours.", "", ""),
    Entry("Evaluate 12 * (3 + 4) - 2**3.", "", ""),
    Entry("Translate into German: “Grüße aus Zürich”, 日本語, naïve café 🙂", "", ""),
    Entry("Classify the word as a noun or a verb.", "run\n\njump", ""),
    Entry("Write a haiku   about\ttabs and  spaces.", "", ""),
    Entry("def add(a, b):\n    return a + b\n\nWhat does this do?", "", ""),
    Entry("Hi", "", ""),
    Entry("List the planets of the solar system, " * 4 + "in order.", "", ""),
)


@dataclass(frozen=True)
class Answers:
    """What a program said: of each prompt its greedy tokens, and the logits along both."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[torch.Tensor]
    eos_token_id: int  # follows where an answer is shorter than it might be


@dataclass(frozen=True)
class Agreement:
    """How far an exported model is from its original.

    Args:
        same: Prompts whose greedy tokens are equal, of `count`.
        difference: The largest between two logits.
        largest: The original's largest absolute logit.
    """

    program: str
    same: int
    count: int
    difference: float
    largest: float

    @property
    def tolerance(self) -> float:
        """How far logits may differ: rounding grows with the largest of them."""
        return TOLERANCE + RELATIVE_TOLERANCE * self.largest

    def __str__(self) -> str:
        return (
            f"greedy tokens equal on {self.same} of {self.count} prompts, largest difference of "
            f"logits {self.difference:.1e} (allowed {self.tolerance:.1e}; {self.program})"
        )


def make_prompts(style: PromptStyle, config: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the probes in the model's style, short enough to leave room for an answer."""
    room = max(1, config.context_length - NUM_TOKENS)
    prompts = [encode_prompt(entry, style, tokenizer)[-room:] for entry in PROBES]
    return [[token % config.vocab_size for token in prompt] for prompt in prompts]


def ask(program: Program, prompts: list[list[int]], context_length: int) -> Answers:
    """Greedy answers, and the logits along prompt and answer."""
    tokens = [
        program.greedy(prompt, min(NUM_TOKENS, context_length - len(prompt))) for prompt in prompts
    ]
    return Answers(prompts, tokens, _logits(program, prompts, tokens), program.eos_token_id)


def compare(program: Program, expected: Answers, context_length: int) -> Agreement:
    """Ask a program what the original answered; the logits along the original's answers.

    Greedy tokens are the program's own. Where they part from the original's at two tokens that the
    original rates alike within the tolerance, they count as equal: rounding decides there.
    """
    logits = _logits(program, expected.prompts, expected.tokens)
    pairs = zip(logits, expected.logits, strict=True)
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    largest = max(float(logits.abs().max()) for logits in expected.logits)
    found = Agreement(program.name, 0, len(expected.prompts), difference, largest)
    same = 0
    for prompt, tokens, along in zip(
        expected.prompts, expected.tokens, expected.logits, strict=True
    ):
        answer = program.greedy(prompt, min(NUM_TOKENS, context_length - len(prompt)))
        same += answer == tokens or _is_near_tie(
            answer, tokens, along[len(prompt) - 1 :], 2 * found.tolerance, expected.eos_token_id
        )
    return Agreement(program.name, same, len(expected.prompts), difference, largest)


def demand(found: Agreement) -> Agreement:
    """Refuse an export that is not its original.

    Raises:
        ServiceError: It is not. Nothing that the user wrote is wrong then (so no InputError), and
            nothing usable was made (so not "finished but incomplete"): library or disk failed.
    """
    if found.same < found.count or not found.difference <= found.tolerance:  # NaN is neither
        raise ServiceError(f"verify: the exported model is not the original: {found}")
    return found


def check(folder: Path, format: str, expected: Answers, context_length: int) -> Agreement:
    """Load an export again and compare it; the comparison with the last of its readers.

    Raises:
        ServiceError: It cannot be loaded, or is another model.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of one-second loads
            for load in readers(format):
                found = demand(
                    compare(load(folder, expected.eos_token_id), expected, context_length)
                )
    except (LightningSFTError, RuntimeError, ValueError, KeyError, OSError) as error:
        if isinstance(error, ServiceError):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ServiceError(f"verify: the export cannot be read again ({reason})") from None
    return found


def round_model(model: Decoder, gguf_type: GGUFType) -> None:
    """Give every weight the value that a GGUF of this type keeps of it, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gguf_name = "position_embd.weight" if name == "pos_emb.weight" else name
            kind = tensor_type(gguf_name, tuple(parameter.shape), gguf_type)
            parameter.copy_(unquantize(quantize(parameter, kind), kind))


def _logits(
    program: Program, prompts: list[list[int]], tokens: list[list[int]]
) -> list[torch.Tensor]:
    return [program.logits(prompt + answer) for prompt, answer in zip(prompts, tokens, strict=True)]


def _is_near_tie(
    answer: list[int], tokens: list[int], along: torch.Tensor, tolerance: float, end: int
) -> bool:
    """Whether the first token that differs was rated as high as the one in its place.

    Args:
        along: Logits (len(tokens) + 1, V): row i rates the i-th token of the answer.
        end: What follows an answer that is shorter.
    """
    for place, (theirs, ours) in enumerate(itertools.zip_longest(answer, tokens)):
        if theirs != ours:
            scores = along[place]
            theirs, ours = (end if token is None else token for token in (theirs, ours))
            if max(theirs, ours) >= len(scores):
                return False  # a vocabulary without end-of-text
            return bool((scores[ours] - scores[theirs]).abs() <= tolerance)
    return True
