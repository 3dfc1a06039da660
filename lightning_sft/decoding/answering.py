"""A model to ask from Python: text in, text out.

>>> model = load_model("runs/gpt2-medium/version_0")  # or a checkpoint, or weights
>>> model.answer("Rewrite the sentence in the past tense.", input="She walks to school.")
'She walked to school.'
>>> for piece in model.stream("Name three primary colours."):
...     print(piece, end="", flush=True)
>>> messages = [{"role": "user", "content": "Name a colour."}]
>>> messages.append({"role": "assistant", "content": model.answer(messages)})
>>> messages.append({"role": "user", "content": "And another."})
>>> model.answer(messages)  # reads the new question only

The prompt is laid out in the style that the model was trained with, and the answer is the text that
`predict`, `chat` and `serve` would show.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, overload

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Conversation, Entry, Example, Message
from lightning_sft.data.encoding import check_style, encode_prompt
from lightning_sft.data.history import fit_history, room_for_prompt
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.template import bind_style
from lightning_sft.data.tokenizer import Tokenizer
from lightning_sft.decoding.answer_text import AnswerText
from lightning_sft.decoding.generation import GenerationConfig, decode, generate
from lightning_sft.decoding.kept_rows import KeptRows
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.prepacked import prepack
from lightning_sft.models.ready import choose_device, load_for_answers
from lightning_sft.models.tokenizer import find_answer_tokenizer, find_tokenizer
from lightning_sft.runs.run_folder import checkpoint_in

KEPT_BYTES = 500_000_000  # for what conversations have read so far
# A conversation, or its messages: the last of them is to be answered.
Talk: TypeAlias = Conversation | Sequence[Message | Mapping[str, Any]]


class AnsweringModel:
    """A model with its prompt style and tokenizer.

    Args:
        model: In evaluation mode, on the device where it shall compute.
        style: That it was trained with.
        tokenizer: By default the one of the model's family.
    """

    def __init__(
        self, model: GPTModel, style: PromptStyle, tokenizer: Tokenizer | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer or find_tokenizer(model.config, None, None)
        self.style = bind_style(style, self.tokenizer)
        self._kept = KeptRows(KEPT_BYTES)

    @overload
    def answer(self, instruction: str, input: str = "", **generation: Any) -> str: ...
    @overload
    def answer(self, instruction: Entry | Talk, **generation: Any) -> str: ...
    @overload
    def answer(self, instruction: Sequence[str | Example], **generation: Any) -> list[str]: ...

    def answer(
        self,
        instruction: str | Entry | Talk | Sequence[str | Example],
        input: str = "",
        **generation: Any,
    ) -> str | list[str]:
        """Answer an instruction, or many side by side, which takes far less time than one by one.

        Args:
            instruction: What to do; or a conversation or its messages, the last of which is to be
                answered; or a list of instructions, of entries where some have an input, of
                conversations where some have more turns.
            input: What to do it with, for a single instruction.
            generation: Fields of `GenerationConfig`: max_new_tokens, temperature, top_k, top_p,
                batch_size, seed.

        Returns:
            The answer, or the answers in the order of the list.

        Raises:
            InputError: An unknown setting or one out of range; messages in no order; a prompt that
                fills the context.
        """
        if isinstance(instruction, str):
            return self.answer([Entry(instruction, input, "")], **generation)[0]
        if (talk := _as_talk(instruction)) is not None and not input:
            return "".join(self.stream(talk, **generation))
        if isinstance(instruction, Entry) and not input:
            return self.answer([instruction], **generation)[0]
        if input:
            raise InputError("answer: give entries, Entry(instruction, input), to a list of them")
        settings = dataclasses.asdict(_settings(generation))
        assert isinstance(instruction, Sequence)
        prompts = [self._encode(one) for one in instruction]  # type: ignore[arg-type]
        end = self.tokenizer.eos_token_id
        found = generate(self.model, prompts, **settings, eos_token_id=end)
        return [self.style.extract(self.tokenizer.decode(ids)) for ids in found]

    def stream(
        self, instruction: str | Entry | Talk, input: str = "", **generation: Any
    ) -> Iterator[str]:
        """The answer in pieces, each as soon as nothing that follows can change it.

        What a conversation has in common with one that was answered before is not read again.

        Args:
            instruction, input, generation: As for `answer`; joined, the pieces are its text.
        """
        settings = _settings(generation)
        if isinstance(instruction, str):
            return self._stream(self._encode(Entry(instruction, input, "")), settings)
        talk = _as_talk(instruction)
        if talk is not None:
            return self._stream(self._encode(talk), settings, self._kept)
        if not isinstance(instruction, Entry):
            raise InputError("stream: takes one instruction, entry or conversation")
        return self._stream(self._encode(instruction), settings)

    def cut_history(
        self, conversation: Talk, max_new_tokens: int = GenerationConfig.max_new_tokens
    ) -> tuple[Conversation, int]:
        """What of a conversation there is room for: without its oldest turns, if need be.

        A system message stays, and so does the last question.

        Args:
            max_new_tokens: That its answer may have. At most a quarter of the context is kept free.

        Returns:
            The conversation, and how many turns were left out.

        Raises:
            InputError: Messages in no order, or for which the style has no place.
        """
        talk = _as_talk(conversation)
        if talk is None:
            raise InputError("cut_history: takes a conversation or a list of messages")
        most = room_for_prompt(self.model.config.context_length, max_new_tokens)
        fitted = fit_history(talk, self.style, self.tokenizer, most)
        return fitted.conversation, fitted.cut

    def _stream(
        self, prompt: list[int], settings: GenerationConfig, kept: KeptRows | None = None
    ) -> Iterator[str]:
        text = AnswerText(self.style)
        if kept is not None:
            kept.check(self.model)  # it may have been trained on since
        end = self.tokenizer.eos_token_id
        for step in decode(self.model, [prompt], settings, eos_token_id=end, kept=kept):
            for _, token in step:
                known = None if token is None else self.tokenizer.token_bytes(token)
                if piece := text.finish() if known is None else text.add(known):
                    yield piece

    def _encode(self, entry: str | Example) -> list[int]:
        entry = Entry(entry, "", "") if isinstance(entry, str) else entry
        return encode_prompt(entry, self.style, self.tokenizer)


def load_model(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    architecture: str | dict[str, Any] | None = None,
    prompt_style: str | dict[str, str] | None = None,
    header_in_prompt: bool | None = None,
    weights: str | None = None,
) -> AnsweringModel:
    """A trained model, ready to answer.

    Args:
        path: A run folder, which stands for its newest checkpoint, or a checkpoint, or weights
            (.pth, .safetensors, folder, or a name: gpt2-medium, owner/name). Adapters are merged.
        device: auto, cpu, cuda or mps.
        architecture, prompt_style, header_in_prompt: For weights that do not say it themselves.
        weights: Where the base of a LoRA checkpoint is now, if it was moved.

    Raises:
        InputError: No such model, a damaged file, or one that does not say its architecture.
        ServiceError: A named model is neither in the cache nor to be had.
    """
    file = str(checkpoint_in(os.fspath(path)))
    model, style = load_for_answers(file, architecture, prompt_style, header_in_prompt, weights)
    tokenizer = find_answer_tokenizer(model.config, file)
    check_style(style, tokenizer)
    model.to(choose_device(device))
    prepack(model)  # for good: nothing changes the weights of a model that answers
    return AnsweringModel(model, style, tokenizer)


def _as_talk(asked: Any) -> Conversation | None:
    """The conversation that a call is about, if it is about one."""
    if isinstance(asked, Conversation):
        return asked
    is_list = isinstance(asked, Sequence) and not isinstance(asked, str)
    if is_list and asked and all(isinstance(one, Message | Mapping) for one in asked):
        return Conversation(tuple(asked))
    return None


def _settings(generation: dict[str, Any]) -> GenerationConfig:
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    for name in generation:
        if name not in known:
            raise InputError(f"generation: unknown {name!r}; allowed: {', '.join(known)}")
    return GenerationConfig(**generation)
