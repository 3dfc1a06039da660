"""Conversations as rows: literal ids and masks in every style, turn by turn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_sft import Conversation, Entry, Message
from lightning_sft.common.errors import InputError
from lightning_sft.data import token_cache
from lightning_sft.data.batching import collate, pack
from lightning_sft.data.conversation_rows import tokenize_conversation, tokenize_example
from lightning_sft.data.encoding import encode_prompt
from lightning_sft.data.find_tokenizer import read_tokenizer
from lightning_sft.data.prompts import STYLES, PromptStyle, get_style
from lightning_sft.data.rows import Row, Span, TokenRows, fit_to_length, tokenize
from lightning_sft.data.segments import Masking
from lightning_sft.data.token_cache import tokenize_entries
from lightning_sft.data.tokenizer import gpt2_tokenizer
from support.tiny_run import write_tokenizer

END, IM_START, IM_END, BEGIN, EOT, HEAD, HEAD_END, THINK, THINK_END = range(256, 265)
ANSWERS = Masking(mask_prompt=True)
SYSTEM, USER, ANSWER = Message("system", "S"), Message("user", "Q"), Message("assistant", "A")
MORE, LAST, TOOL = Message("user", "R"), Message("assistant", "B"), Message("tool", "T")
TWO_TURNS = [USER, ANSWER, MORE, LAST]


@pytest.fixture
def make(tmp_path):
    def make_tokenizer(**settings: str):
        write_tokenizer(tmp_path, **settings)
        return read_tokenizer(tmp_path)

    return make_tokenizer


def ids_of(*parts: int | str) -> list[int]:
    """Ids of the tiny tokenizer: special tokens as numbers, text as its bytes."""
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else list(part.encode())
    return ids


def supervised(row: Row, eos: int, mask_prompt: bool = True) -> list[list[int]]:
    """The targets of a row by span, as the collate makes them."""
    ids = [*row.ids, eos]
    made = collate([row], eos_token_id=eos, mask_prompt=mask_prompt)["targets"][0].tolist()
    spans = [ids[max(span.start, 1) : span.end] for span in row.loss_spans(mask_prompt)]
    assert [target for target in made if target != -100] == [t for span in spans for t in span]
    return spans


# --- literal ids: one hand-written conversation a case ---

CHATML = {
    "two turns": (
        TWO_TURNS,
        [IM_START, "user\nQ", IM_END, "\n", IM_START, "assistant\nA", IM_END, "\n",
         IM_START, "user\nR", IM_END, "\n", IM_START, "assistant\nB"],
        [["A", IM_END], ["B", IM_END]],
    ),
    "a system message": (
        [SYSTEM, USER, ANSWER],
        [IM_START, "system\nS", IM_END, "\n", IM_START, "user\nQ", IM_END, "\n",
         IM_START, "assistant\nA"],
        [["A", IM_END]],
    ),
    "a tool": (
        [USER, ANSWER, TOOL, TOOL, LAST],
        [IM_START, "user\nQ", IM_END, "\n", IM_START, "assistant\nA", IM_END, "\n",
         IM_START, "tool\nT", IM_END, "\n", IM_START, "tool\nT", IM_END, "\n",
         IM_START, "assistant\nB"],
        [["A", IM_END], ["B", IM_END]],
    ),
    "an input": (
        [SYSTEM, Message("user", "Q", input="I"), ANSWER],
        [IM_START, "system\nS", IM_END, "\n", IM_START, "user\nQ\nI", IM_END, "\n",
         IM_START, "assistant\nA"],
        [["A", IM_END]],
    ),
    "a first answer that is given": (
        [USER, Message("assistant", "A", train=False), MORE, LAST],
        [IM_START, "user\nQ", IM_END, "\n", IM_START, "assistant\nA", IM_END, "\n",
         IM_START, "user\nR", IM_END, "\n", IM_START, "assistant\nB"],
        [["B", IM_END]],
    ),
    "a last answer that is given": (
        [USER, ANSWER, MORE, Message("assistant", "B", weight=0)],
        [IM_START, "user\nQ", IM_END, "\n", IM_START, "assistant\nA", IM_END, "\n",
         IM_START, "user\nR", IM_END, "\n", IM_START, "assistant\nB"],
        [["A", IM_END]],
    ),
    "a question at the end": (
        [USER, ANSWER, MORE],
        [IM_START, "user\nQ", IM_END, "\n", IM_START, "assistant\nA"],
        [["A", IM_END]],
    ),
    "special tokens in what is said": (
        [Message("user", "<|im_end|>"), ANSWER, MORE, Message("assistant", "<|im_start|>")],
        [IM_START, "user\n<|im_end|>", IM_END, "\n", IM_START, "assistant\nA", IM_END, "\n",
         IM_START, "user\nR", IM_END, "\n", IM_START, "assistant\n<|im_start|>"],
        [["A", IM_END], ["<|im_start|>", IM_END]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATML)
def test_chatml(name, make):
    messages, ids, spans = CHATML[name]
    tokenizer = make()
    [row] = tokenize_conversation(Conversation(messages), get_style("chatml"), tokenizer, ANSWERS)
    assert row.ids == ids_of(*ids)
    assert supervised(row, IM_END) == [ids_of(*span) for span in spans]


def test_chatml_of_a_base_model_ends_the_row_with_a_token_of_its_own(make):
    tokenizer = make(eos="<|endoftext|>")
    [row] = tokenize_conversation(Conversation(TWO_TURNS), get_style("chatml"), tokenizer, ANSWERS)
    assert row.ids[-2:] == ids_of("B", IM_END)
    assert supervised(row, END) == [ids_of("A", IM_END), ids_of("B", IM_END, END)]


def test_llama3(make):
    tokenizer = make(eos="<|eot_id|>", bos="<|begin_of_text|>")
    [row] = tokenize_conversation(
        Conversation([SYSTEM, *TWO_TURNS[:2], TOOL, LAST]), get_style("llama3"), tokenizer, ANSWERS
    )

    def turn(role: str, text: str) -> list[int]:
        return ids_of(HEAD, role, HEAD_END, f"\n\n{text}", EOT)

    asked = [BEGIN, *turn("system", "S"), *turn("user", "Q"), *turn("assistant", "A")]
    answered = [*turn("ipython", "T"), *turn("assistant", "B")[:-1]]
    assert row.ids == asked + answered
    assert supervised(row, EOT) == [ids_of("A", EOT), ids_of("B", EOT)]


def test_qwen3(make):
    [row] = tokenize_conversation(Conversation(TWO_TURNS), get_style("qwen3"), make(), ANSWERS)
    header = ids_of(IM_START, "assistant\n", THINK, "\n\n", THINK_END, "\n\n")
    assert row.ids == [
        *ids_of(IM_START, "user\nQ", IM_END, "\n"), *header, *ids_of("A", IM_END, "\n"),
        *ids_of(IM_START, "user\nR", IM_END, "\n"), *header, *ids_of("B"),
    ]  # fmt: skip
    assert supervised(row, IM_END) == [ids_of("A", IM_END), ids_of("B", IM_END)]


@pytest.mark.parametrize("name", ["alpaca", "phi3"])
def test_a_style_that_closes_no_answers_gives_each_a_row(name):
    """What stands before is what `serve` and exported templates put there."""
    style, tokenizer = get_style(name), gpt2_tokenizer()
    first, second = tokenize_conversation(
        Conversation([SYSTEM, *TWO_TURNS]), style, tokenizer, ANSWERS, index=7
    )
    question, answer = style.split(Entry("S\n\nQ", "", "A"))
    more, last = style.split(Entry("R", "", "B"))
    encode = tokenizer.encode
    assert first.ids == encode(question) + encode(answer)
    assert second.ids == [*first.ids, *encode(f"\n\n{more}"), *encode(last)]
    for row, text in ((first, "A"), (second, "B")):
        assert row.index == 7
        assert supervised(row, 50256) == [[*encode(text), 50256]]
        assert row.prompt_length == len(row.ids) - 1


@pytest.mark.parametrize("name", STYLES)
def test_a_plain_question_and_answer_is_the_entry_it_says(name, make):
    """A row of one kind and of the other teach the same."""
    style, entry = get_style(name), Entry("Add.", "1 2", "3")
    for tokenizer in (make(), gpt2_tokenizer()):
        plain = tokenize(entry, style, tokenizer)
        assert tokenize_example(entry, style, tokenizer, ANSWERS) == [plain]
        [row] = tokenize_conversation(entry.conversation, style, tokenizer, ANSWERS)
        assert (row.ids, row.prompt_length) == (plain.ids, plain.prompt_length)
        assert list(row.spans) == list(plain.loss_spans(mask_prompt=True))
        [row] = tokenize_conversation(entry.conversation, style, tokenizer, Masking())
        assert list(row.spans) == list(plain.loss_spans(mask_prompt=False))


# --- which messages ---


@pytest.mark.parametrize(
    ("train_on", "texts"),
    [
        ("all", [["A", IM_END], ["B", IM_END]]),
        ("last", [["B", IM_END]]),
        (["assistant"], [["A", IM_END], ["B", IM_END]]),
        (["system"], [["<|system|>S"]]),
        (["user"], [["<|user|>Q"], ["<|user|>R"]]),
    ],
)
def test_train_on(train_on, texts, make):
    style = PromptStyle(
        "<|user|>{instruction}", "{input}", "<|a|>", end="<|im_end|>", system="<|system|>{system}"
    )
    [row] = tokenize_conversation(
        Conversation([SYSTEM, *TWO_TURNS]), style, make(), Masking(True, train_on)
    )
    expected = [ids_of(*text) for text in texts]
    if train_on == ["system"]:
        expected[0] = expected[0][1:]  # a row's first token is predicted from nothing
    assert supervised(row, IM_END) == expected


def test_a_message_says_more_than_its_role(make):
    wanted = Message("user", "Q", train=True, weight=0.5)
    [row] = tokenize_conversation(
        Conversation([wanted, Message("assistant", "A", weight=2)]),
        get_style("chatml"),
        make(),
        Masking(True, "last"),
    )
    assert [(span.weight, row.ids[span.start : span.end]) for span in row.spans] == [
        (0.5, ids_of(IM_START, "user\nQ")), (2.0, ids_of("A")),
    ]  # fmt: skip


def test_without_a_mask_all_carries_loss_but_what_says_otherwise(make):
    given = Message("assistant", "A", train=False)
    [row] = tokenize_conversation(
        Conversation([USER, given, MORE, LAST]), get_style("chatml"), make(), Masking()
    )
    answer = row.ids.index(ord("A"))
    assert row.spans == [Span(0, answer), Span(answer + 2, len(row.ids) + 1)]
    [row] = tokenize_conversation(Conversation(TWO_TURNS), get_style("chatml"), make(), Masking())
    assert row.spans == [Span(0, len(row.ids) + 1)]
    # Of a conversation in several rows each token counts once.
    rows = tokenize_conversation(
        Conversation(TWO_TURNS), get_style("alpaca"), gpt2_tokenizer(), Masking()
    )
    counts = TokenRows.from_rows(rows).count_targets(1024, mask_prompt=False)
    assert counts.sum() == len(rows[1].ids) + 1  # end-of-text twice, the first token never


@pytest.mark.parametrize("name", [*STYLES])
def test_asked_as_trained(name, make):
    """A prompt is token by token what stands before the answer in training."""
    odd = Conversation(
        [SYSTEM, Message("user", "One \n"), Message("assistant", "\nTwo\n"), MORE, LAST]
    )
    for tokenizer in (make(), gpt2_tokenizer()):
        row = tokenize_conversation(odd, get_style(name), tokenizer, ANSWERS)[-1]
        prompt = encode_prompt(odd, get_style(name), tokenizer)
        assert prompt == row.ids[: row.prompt_length]
        assert prompt == encode_prompt(odd.question, get_style(name), tokenizer)


# --- counting, cutting, refusing ---


def test_counts_are_those_of_batches():
    rows = [
        Row([1] * 9, 4, 0),
        Row([1] * 9, 6, 1, [Span(0, 3), Span(5, 10, 0.5)]),
        Row([1] * 2, 1, 2, [Span(1, 2, 2.0)]),
        Row([1] * 3, 1, 3, []),
    ]
    made = TokenRows.from_rows(rows)
    assert [row.spans for row in made] == [None, rows[1].spans, rows[2].spans, [Span(0, 0)]]
    for max_length in range(1, 12):
        for mask_prompt in (False, True):
            batch = collate(rows, max_length=max_length, mask_prompt=mask_prompt)
            targets = (batch["targets"] != -100).sum(1)
            counts = made.count_targets(max_length, mask_prompt).clip(min=0)
            assert counts.tolist() == targets.tolist()
            weights = made.sum_weights(max_length, mask_prompt).clip(min=0)
            assert weights.tolist() == batch["weights"].sum(1).tolist()
    assert made.select(np.array([False, True, False, False]))[0].spans == rows[1].spans


def test_only_batches_with_weights_have_them():
    plain = [Row([1, 2, 3], 1, 0), Row([1, 2, 3], 1, 1, [Span(2, 4)])]
    assert "weights" not in collate(plain)
    assert "weights" not in pack(plain, share_prefix=True)
    weighted = [*plain, Row([1, 2], 1, 2, [Span(1, 3, 0.25)])]
    expected = torch.tensor([[1, 1, 1], [0, 1, 1], [0.25, 0.25, 0]])
    assert torch.equal(collate(weighted)["weights"], expected)
    assert torch.equal(pack(weighted)["weights"], expected)
    repeat = weighted[2]._replace(index=-1)
    assert "weights" not in collate([*plain, repeat])


def test_a_fingerprint_tells_masks_apart():
    def fingerprint(*rows: Row) -> str:
        return TokenRows.from_rows(rows).fingerprint()

    spans = [None, [], [Span(1, 3)], [Span(1, 3, 0.5)], [Span(2, 3)], [Span(1, 2), Span(2, 3)]]
    prints = {fingerprint(Row([1, 2], 1, 0, part)) for part in spans}
    assert len(prints) == len(spans)


def test_a_conversation_without_loss_is_refused():
    rows = TokenRows.from_rows([Row([1, 2, 3], 1, 4, [])])
    with pytest.raises(InputError, match="train split: entry 4 has no target: none of its mess"):
        fit_to_length(
            rows, max_length=9, overlong="truncate", mask_prompt=True, where="train split"
        )


def test_what_a_style_or_mask_refuses():
    with pytest.raises(InputError, match="prompt_style alpaca: has no place for a tool message"):
        tokenize_conversation(
            Conversation([USER, ANSWER, TOOL, LAST]), get_style("alpaca"), gpt2_tokenizer(), ANSWERS
        )
    with pytest.raises(InputError, match="no assistant's among them"):
        tokenize_conversation(Conversation([USER]), get_style("alpaca"), gpt2_tokenizer(), ANSWERS)
    for train_on in ("first", [], ["critic"]):
        with pytest.raises(InputError, match=r"data\.train_on: .* is not allowed; all, last"):
            Masking(True, train_on)
    with pytest.raises(InputError, match=r"data\.train_on: .* set data\.mask_prompt to true"):
        Masking(False, "last")


def test_the_cache_is_kept_by_what_rows_depend_on(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_SFT_CACHE", str(tmp_path))
    monkeypatch.setattr(token_cache, "CACHE_FROM_ENTRIES", 2)
    style, tokenizer = get_style("alpaca"), gpt2_tokenizer()

    def count(examples, masking: Masking) -> int:
        made = tokenize_entries(examples, style, tokenizer, masking)
        again = tokenize_entries(examples, style, tokenizer, masking)
        assert made.fingerprint() == again.fingerprint()
        return len(list((tmp_path / "tokens").glob("*/done")))

    # What an entry's mask is, is settled later; a conversation's is in its rows.
    plain, talks = [Entry("Q", "", "A")] * 2, [Conversation(TWO_TURNS)] * 2
    assert [count(plain, masking) for masking in (Masking(), ANSWERS)] == [1, 1]
    masks = (ANSWERS, Masking(True, "last"), Masking())
    assert [count(talks, masking) for masking in masks] == [2, 3, 4]
    weighed = [Conversation([USER, Message("assistant", "A", weight=0.5)])] * 2
    assert count(weighed, ANSWERS) == 5
