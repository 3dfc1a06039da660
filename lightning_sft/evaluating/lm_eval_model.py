"""Our model as lm-eval sees one: text in, log-likelihoods or text out.

Only this file imports lm-eval (extra `eval`). Tokens, contexts that overflow and rolling windows
follow lm-eval's own `hf` model, so that a checkpoint scores here as its exported folder does there.
Tasks are texts, so a special token can only come as its name: as with transformers, the name of one
is read as that token. GPT-2's vocabulary has none here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2.sandbox
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lightning_sft.common.errors import InputError
from lightning_sft.data.chat_template import jinja_template
from lightning_sft.data.encoding import bos_token, encode_pieces
from lightning_sft.data.prompts import Template
from lightning_sft.data.template import render_text
from lightning_sft.data.tokenizer import Tokenizer
from lightning_sft.decoding.answering import AnsweringModel
from lightning_sft.decoding.generation import GenerationConfig
from lightning_sft.evaluating.likelihood import Progress, Request, generate_until, loglikelihoods

DEFAULT_NEW_TOKENS = 256  # as of lm-eval's hf model


class EvalModel(TemplateLM):
    """Answers lm-eval's three questions with a model of any family.

    Args:
        model: Its style is for tasks that are asked through the chat template.
        batch_size: Requests computed side by side.
    """

    def __init__(self, model: AnsweringModel, batch_size: int = 16) -> None:
        super().__init__()
        self.model, self.style, self.batch_size = model.model, model.style, batch_size
        self.bpe = model.tokenizer  # under `tokenizer`, lm-eval expects one of transformers

    @property
    def eot_token_id(self) -> int:
        return self.bpe.eos_token_id

    @property
    def max_length(self) -> int:
        return self.model.config.context_length

    @property
    def prefix_token_id(self) -> int:
        """Before a text that nothing else is before."""
        begin = getattr(self.bpe, "bos_token_id", None)
        return self.eot_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, the token that begins every row before it unless it is there already."""
        ids = encode_pieces([Template(string)], self.bpe)
        begin = getattr(self.bpe, "bos_token_id", None)
        if add_special_tokens is None:
            add_special_tokens = ids[:1] != [begin]
        return [begin, *ids] if add_special_tokens and begin is not None else ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        asked = [Request(context, continuation) for _, context, continuation in requests]
        with _bar(len(asked), "Rating", disable_tqdm) as progress:
            return loglikelihoods(self.model, asked, self.batch_size, progress)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts; long ones in windows that rate every token once."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append(Request(context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        with _bar(len(windows), "Rating", disable_tqdm) as progress:
            rated = loglikelihoods(self.model, windows, self.batch_size, progress)
        for owner, (total, _) in zip(owners, rated, strict=True):
            totals[owner] += total
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}  # requests of the same settings
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(place)
        texts = [""] * len(requests)
        with _bar(len(requests), "Writing", disable_tqdm) as progress:
            for places in groups.values():
                stops, config = self._settings(requests[places[0]].args[1])
                contexts = [self.tok_encode(requests[p].args[0]) for p in places]
                contexts = [ids or [self.prefix_token_id] for ids in contexts]
                written = generate_until(
                    self.model, _Readable(self.bpe), contexts, stops, config, progress
                )
                for place, text in zip(places, written, strict=True):
                    texts[place] = text
        return texts

    def _settings(self, given: dict[str, Any]) -> tuple[list[str], GenerationConfig]:
        kwargs = normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS)
        stops = handle_stop_sequences(
            kwargs.pop("until", None), eos=self.bpe.decode([self.eot_token_id])
        )
        config = GenerationConfig(
            max_new_tokens=kwargs.pop("max_gen_toks"),
            temperature=kwargs.pop("temperature", 0.0) if kwargs.pop("do_sample", False) else 0.0,
            top_k=kwargs.pop("top_k", None) or None,
            top_p=kwargs.pop("top_p", None),
            batch_size=self.batch_size,
        )
        kwargs.pop("temperature", None)
        if kwargs:
            raise InputError(f"task: the generation setting {min(kwargs)!r} is not supported here")
        return [stop for stop in stops if stop], config

    @property
    def _template(self) -> str:
        return jinja_template(self.style, bos_token(self.bpe))

    @property
    def tokenizer_name(self) -> str:
        return f"{self.bpe.name}-{self.style.name}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if self.style.template:  # a stranger's program
            return render_text(chat_history, self.style.template, add_generation_prompt)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(self._template).render(
            messages=chat_history, add_generation_prompt=add_generation_prompt
        )


class _Readable:
    """A tokenizer whose texts are without special tokens, as lm-eval's own model decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name, self.vocab_size = tokenizer.name, tokenizer.vocab_size
        self.eos_token_id = tokenizer.eos_token_id
        self.encode, self.token_bytes = tokenizer.encode, tokenizer.token_bytes
        self._decode = tokenizer.decode
        self._left_out: frozenset[int] = getattr(tokenizer, "control_ids", frozenset())

    def decode(self, ids: Sequence[int]) -> str:
        return self._decode([token for token in ids if token not in self._left_out])


def _refuse(message: str) -> None:
    raise InputError(f"task: {message}")


@contextlib.contextmanager
def _bar(total: int, what: str, hidden: bool) -> Iterator[Progress]:
    with tqdm(total=total, desc=what, unit="request", disable=hidden) as bar:
        yield bar.update
