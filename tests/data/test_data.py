"""Rows into batches, padded or packed, and the data module around the chapter's splits."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.common.errors import InputError
from lightning_sft.data import config as config_module
from lightning_sft.data import datamodule as data_module
from lightning_sft.data.batching import BatchMaker, collate, collate_prompts, pack
from lightning_sft.data.datamodule import InstructionDataModule
from lightning_sft.data.entries import Entry
from lightning_sft.data.prompts import get_style
from lightning_sft.data.rows import Row, TokenRows, tokenize
from lightning_sft.data.tokenizer import END_OF_TEXT, gpt2_tokenizer
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.layers import PackedLayout
from lightning_sft.training.loss import sum_cross_entropy

EOS = END_OF_TEXT
Batch = dict[str, torch.Tensor]


def lists(batch: Batch) -> tuple[list[Any], list[Any]]:
    return batch["input_ids"].tolist(), batch["targets"].tolist()


# --- Collate ---


def test_the_chapters_example():
    """The two tensors that section 7.3 prints."""
    batch = collate([[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]])
    assert lists(batch) == (
        [[0, 1, 2, 3, 4], [5, 6, 50256, 50256, 50256], [7, 8, 9, 50256, 50256]],
        [[1, 2, 3, 4, 50256], [6, 50256, -100, -100, -100], [8, 9, 50256, -100, -100]],
    )
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def chapter_collate(rows: list[list[int]], max_length: int | None) -> tuple[list[Any], list[Any]]:
    """What listing 7.5 does: pad, shift, then mask every end-of-text target but the first."""
    inputs, targets = [], []
    longest = max(map(len, rows)) + 1
    for ids in rows:
        padded = ids + [EOS] * (longest - len(ids))
        wanted = padded[1:]
        first = wanted.index(EOS)
        wanted[first + 1 :] = [-100 if token == EOS else token for token in wanted[first + 1 :]]
        inputs.append(padded[:-1][:max_length])
        targets.append(wanted[:max_length])
    return inputs, targets


PLAIN_ROWS = st.lists(
    st.lists(st.integers(0, EOS - 1), min_size=1, max_size=9), min_size=1, max_size=5
)


@given(rows=PLAIN_ROWS, max_length=st.none() | st.integers(1, 10))
def test_collate_equals_the_chapters(rows, max_length):
    assert lists(collate(rows, max_length=max_length)) == chapter_collate(rows, max_length)


def test_settings_of_collate():
    rows = [[1, 2, 3], [4]]
    batch = collate(rows, pad_token_id=0, eos_token_id=9, ignore_index=-1)
    assert lists(batch) == ([[1, 2, 3], [4, 0, 0]], [[2, 3, 9], [9, -1, -1]])


@pytest.mark.parametrize(
    ("max_length", "inputs", "targets"),
    [
        (5, [[1, 2, 3, 4]], [[2, 3, 4, EOS]]),
        (4, [[1, 2, 3, 4]], [[2, 3, 4, EOS]]),
        (3, [[1, 2, 3]], [[2, 3, 4]]),  # the last input keeps its target, end-of-text is lost
        (1, [[1]], [[2]]),
    ],
)
def test_truncation(max_length, inputs, targets):
    assert lists(collate([[1, 2, 3, 4]], max_length=max_length)) == (inputs, targets)


@pytest.mark.parametrize(
    ("prompt_length", "targets"),
    [
        (0, [11, 12, 13, 14, EOS]),
        (1, [11, 12, 13, 14, EOS]),  # the first token is nobody's target
        (2, [-100, 12, 13, 14, EOS]),
        (4, [-100, -100, -100, 14, EOS]),
        (5, [-100, -100, -100, -100, EOS]),  # an empty answer
    ],
)
def test_mask_prompt(prompt_length, targets):
    row = Row([10, 11, 12, 13, 14], prompt_length)
    assert collate([row], mask_prompt=True)["targets"].tolist() == [targets]
    unmasked = collate([row])["targets"].tolist()
    assert unmasked == [[11, 12, 13, 14, EOS]]  # control


def test_mask_prompt_exact_ids_of_a_real_entry():
    """Exercise 7.2: loss on the answer and the end-of-text token behind it, nothing else."""
    tokenizer = gpt2_tokenizer()
    entry = Entry("Name a colour.", "A cold one.", "Blue, mostly.")
    row = tokenize(entry, get_style("alpaca"), tokenizer)
    other = Row(list(range(100)), 3)
    targets = collate([row, other], mask_prompt=True)["targets"][0]
    supervised = targets[targets != -100].tolist()
    assert supervised == [*tokenizer.encode("Blue, mostly."), EOS]
    row = tokenize(entry, get_style("alpaca", header_in_prompt=False), tokenizer)
    targets = collate([row, other], mask_prompt=True)["targets"][0]
    supervised = targets[targets != -100].tolist()
    assert supervised == [*tokenizer.encode("\n\n### Response:\nBlue, mostly."), EOS]


def test_mask_prompt_with_truncation():
    row = Row([10, 11, 12, 13], 3)
    assert lists(collate([row], mask_prompt=True, max_length=3)) == (
        [[10, 11, 12]],
        [[-100, -100, 13]],
    )
    assert lists(collate([row], mask_prompt=True, max_length=2))[1] == [[-100, -100]]
    assert lists(collate([row], mask_prompt=True, max_length=1))[1] == [[-100]]


def test_an_end_of_text_id_inside_a_row_keeps_its_loss():
    rows = [[1, EOS, 2, EOS], [3]]
    inputs, targets = lists(collate(rows))
    assert inputs == [[1, EOS, 2, EOS], [3, EOS, EOS, EOS]]
    assert targets == [[EOS, 2, EOS, EOS], [EOS, -100, -100, -100]]
    assert chapter_collate(rows, None)[1][0] == [EOS, 2, -100, -100]  # control: masked by value
    row = Row([1, EOS, 2, EOS, 5], 4)
    assert collate([row], mask_prompt=True)["targets"].tolist() == [[-100, -100, -100, 5, EOS]]


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_end_of_text_typed_by_a_user_does_not_move_the_mask(mask_prompt):
    """Two entries of equal length in tokens, one with the mark in its text."""
    tokenizer, style = gpt2_tokenizer(), get_style("alpaca")
    odd = tokenize(Entry("Say <|endoftext|>.", "", "a <|endoftext|> b"), style, tokenizer)
    assert EOS not in odd.ids
    plain = Row([7] * len(odd.ids), odd.prompt_length)
    targets = [collate([row], mask_prompt=mask_prompt)["targets"][0] for row in (odd, plain)]
    assert torch.equal(targets[0] != -100, targets[1] != -100)
    assert (targets[0] == EOS).sum() == 1


@given(rows=PLAIN_ROWS)
def test_exactly_one_end_of_text_target_per_row(rows):
    targets = collate(rows)["targets"]
    assert (targets == EOS).sum(1).tolist() == [1] * len(rows)
    assert (targets != -100).sum(1).tolist() == [len(ids) for ids in rows]


def test_repeats_carry_no_loss():
    rows = [Row([1, 2], 1, 0), Row([1, 2], 1, -1)]
    for batch in (collate(rows), collate(rows, mask_prompt=True), pack(rows, share_prefix=True)):
        assert batch["targets"].tolist()[1] == [-100, -100]
        assert batch["targets"].tolist()[0][1] == EOS
    assert collate(rows)["input_ids"].tolist() == [[1, 2], [1, 2]]


@given(rows=PLAIN_ROWS, prompt=st.integers(0, 9), max_length=st.integers(1, 10), mask=st.booleans())
def test_count_targets_counts_what_collate_makes(rows, prompt, max_length, mask):
    made = [Row(ids, min(prompt, len(ids))) for ids in rows]
    counted = TokenRows.from_rows(made).count_targets(max_length, mask).clip(min=0)
    batch = collate(made, max_length=max_length, mask_prompt=mask)
    assert (batch["targets"] != -100).sum(1).tolist() == counted.tolist()


# --- Packing ---

RAGGED = {
    "common beginning": [Row([1, 2, 3, 4, 5], 3), Row([1, 2, 3, 6], 3), Row([1, 2, 7], 2)],
    "a row within another": [Row([1, 2, 3, 4], 2), Row([1, 2], 1), Row([1, 2, 3], 2)],
    "nothing in common": [Row([1, 2, 3], 1), Row([4, 5], 1), Row([6], 1)],
    "equal rows": [Row([1, 2, 3], 2)] * 3,
    "one row": [Row([1, 2, 3], 2)],
    "one token": [Row([1], 1), Row([1], 1), Row([2], 1)],
    "a repeat": [Row([1, 2, 3], 1, 0), Row([1, 2, 3], 1, -1), Row([1, 4], 1, 2)],
    "same tail": [Row([1, 8, 9, 7], 1), Row([2, 8, 9, 7], 1)],  # tails must not be shared
}


def padded_loss(model: GPTModel, batch: Batch) -> torch.Tensor:
    """The chapter's: all logits, then cross_entropy; as a sum, which packing must keep."""
    logits = model(batch["input_ids"])
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")


def packed_loss(model: GPTModel, batch: Batch) -> torch.Tensor:
    layout = PackedLayout(batch["positions"], batch["gather"], batch["scatter"])
    hidden = model.hidden_states(batch["input_ids"], layout=layout)
    supervised = batch["targets"] != -100
    return sum_cross_entropy(
        hidden,
        model.out_head.weight,
        batch["targets"][supervised],
        batch["gather"][supervised],
    )


def gradients(model: GPTModel, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize("max_length", [None, 3])
@pytest.mark.parametrize("rows", RAGGED.values(), ids=RAGGED.keys())
def test_packed_equals_padded(make_model, rows, mask_prompt, max_length, share_prefix):
    model = make_model(dtype=torch.float64)
    settings = {"eos_token_id": 60, "mask_prompt": mask_prompt, "max_length": max_length}
    padded = collate(rows, pad_token_id=0, **settings)
    packed = pack(rows, share_prefix=share_prefix, **settings)
    assert torch.equal(packed["targets"], padded["targets"])
    expected, actual = padded_loss(model, padded), packed_loss(model, packed)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    for ours, theirs in zip(gradients(model, actual), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("key", ["positions", "gather", "scatter"])
def test_a_wrong_layout_would_show(make_model, key):
    """Control for the test above: each part of the layout matters."""
    model = make_model(dtype=torch.float64)
    batch = pack(RAGGED["common beginning"], share_prefix=True, eos_token_id=60)
    expected = packed_loss(model, batch)
    batch[key] = batch[key].flip(0)
    assert abs(packed_loss(model, batch) - expected) > 1e-3


SMALL_ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5)


@given(rows=SMALL_ROWS, max_length=st.none() | st.integers(1, 7))
def test_computed_tokens_are_the_prefix_tree(rows, max_length):
    inputs = [ids[:max_length] for ids in rows]
    tree = {tuple(ids[: end + 1]) for ids in inputs for end in range(len(ids))}
    shared = pack(rows, share_prefix=True, max_length=max_length)
    free = pack(rows, max_length=max_length)
    assert shared["input_ids"].shape == (len(tree),)
    assert free["input_ids"].shape == (sum(map(len, inputs)),)
    for batch in (shared, free):
        for place, ids in enumerate(inputs):
            row = batch["gather"][place, : len(ids)]
            assert batch["input_ids"][row].tolist() == ids
            assert batch["positions"][row].tolist() == list(range(len(ids)))
        tokens = torch.arange(len(batch["input_ids"]))
        assert torch.equal(batch["gather"].flatten()[batch["scatter"]], tokens)


def test_the_books_batches_shrink(book_data_path):
    """What the two layouts save on the chapter's batches, against the real number of tokens."""
    data = InstructionDataModule(str(book_data_path))
    rows = data.rows("train")
    places = data.train_dataloader().plan(0)[0][0]
    first = [rows[place] for place in places]
    padded, free, shared = collate(first), pack(first), pack(first, share_prefix=True)
    assert padded["input_ids"].numel() == 8 * 61
    assert len(free["input_ids"]) == sum(len(row.ids) for row in first)
    common = len(gpt2_tokenizer().encode(get_style("alpaca").instruction.partition("{")[0]))
    assert len(shared["input_ids"]) <= len(free["input_ids"]) - 7 * common


# --- Batch makers ---


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({"padding_free": False, "share_prefix": False}, set()),
        ({"padding_free": True, "share_prefix": False}, {"positions", "gather", "scatter"}),
        ({"padding_free": False, "share_prefix": True}, {"positions", "gather", "scatter"}),
    ],
)
def test_batch_maker(settings, layout):
    maker = BatchMaker(max_length=3, mask_prompt=True, **settings)
    rows = [Row([1, 2, 3, 4, 5], 2, 4), Row([1, 2, 6], 2, -1)]
    batch = pickle.loads(pickle.dumps(maker))(rows)  # as a worker process gets it
    assert set(batch) == {"input_ids", "targets", "index"} | layout
    assert batch["index"].tolist() == [4, -1]
    assert batch["targets"].tolist() == [[-100, 3, 4], [-100, -100, -100]]
    if layout:
        expected = pack(rows, share_prefix=settings["share_prefix"], max_length=3)
        assert torch.equal(batch["input_ids"], expected["input_ids"])


def test_collate_prompts():
    rows = TokenRows.from_rows([Row([1, 2, 3], 2, 7), Row([4, 5], 1, 8)])
    batch = collate_prompts(list(rows))
    assert batch == {"prompts": [[1, 2], [4]], "index": [7, 8]}
    assert {type(token) for prompt in batch["prompts"] for token in prompt} == {int}


# --- The data module ---


@pytest.fixture
def write_entries(tmp_path) -> Callable[..., str]:
    """`write_entries(count, name)` → path of a file of numbered entries."""

    def write(count: int, name: str = "data.json", **fields: Any) -> str:
        records = [
            {"instruction": f"{name} {number}", "output": "x" * (number % 5 + 1)} | fields
            for number in range(count)
        ]
        (tmp_path / name).write_text(json.dumps(records))
        return str(tmp_path / name)

    return write


def instructions(entries: Sequence[Entry]) -> list[str]:
    return [entry.instruction for entry in entries]


def test_the_chapters_batches(book_data_path):
    """Section 7.5's printed shapes (seed 123, batch size 8); the last batch of 7 is dropped."""
    data = InstructionDataModule(str(book_data_path), batch_size=8, seed=123)
    data.prepare_data()
    data.setup()
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [935, 55, 110]
    batches = list(data.train_dataloader())
    shapes = [tuple(batch["input_ids"].shape) for batch in batches]
    assert shapes[:3] == [(8, 61), (8, 76), (8, 73)]
    assert shapes[-2:] == [(8, 74), (8, 69)]
    assert len(shapes) == 935 // 8
    assert all(batch["targets"].shape == batch["input_ids"].shape for batch in batches)
    val = [len(batch["input_ids"]) for batch in data.val_dataloader()]
    assert val == [8, 8, 8, 8, 8, 8, 7]
    other = InstructionDataModule(str(book_data_path), batch_size=8, seed=124)
    assert next(iter(other.train_dataloader()))["input_ids"].shape != (8, 61)  # control


@pytest.mark.parametrize(
    "settings", [{"mask_prompt": True, "overlong": "drop"}, {"overlong": "truncate"}]
)
def test_train_batches_say_how_much_they_hold(book_data_path, settings):
    data = InstructionDataModule(str(book_data_path), max_length=50, **settings)
    rows = data.rows("train")
    assert (len(rows) < 935) == (settings["overlong"] == "drop")
    place_of = {int(index): place for place, index in enumerate(rows.indices)}
    batches = list(data.train_dataloader())[:5]
    for batch in batches:
        lengths = [len(rows[place_of[int(index)]].ids) for index in batch["index"]]
        assert batch["num_tokens"] == sum(min(length, 50) for length in lengths)
        assert batch["step_targets"] == int((batch["targets"] != -100).sum())
    assert max(batch["input_ids"].shape[1] for batch in batches) == 50


@pytest.mark.parametrize("name", ["val", "test"])
def test_evaluation_loaders_give_every_entry_once_in_order(book_data_path, name):
    data = InstructionDataModule(str(book_data_path), prompt_style="phi3", batch_size=16)
    batches = list(getattr(data, f"{name}_dataloader")())
    index = torch.cat([batch["index"] for batch in batches])
    assert index.tolist() == list(range(len(data.split(name))))
    first = tokenize(data.split(name)[0], get_style("phi3"), gpt2_tokenizer())
    assert batches[0]["input_ids"][0, : len(first.ids)].tolist() == first.ids


@pytest.mark.parametrize(("name", "size"), [(None, 110), ("val", 55), ("train", 935)])
def test_predict_loader(book_data_path, name, size):
    settings = {} if name is None else {"predict_split": name}
    data = InstructionDataModule(str(book_data_path), predict_batch_size=9, **settings)
    batches = list(data.predict_dataloader())
    assert all(len(batch["prompts"]) <= 9 for batch in batches)
    found: dict[int, list[int]] = {}
    for batch in batches:
        found |= zip(batch["index"], batch["prompts"], strict=True)
    assert sorted(found) == list(range(size))
    style, tokenizer = get_style("alpaca"), gpt2_tokenizer()
    for index, entry in enumerate(data.split(name or "test")):
        assert found[index] == tokenizer.encode(style.prompt(entry))
    lengths = [len(prompt) for batch in batches for prompt in batch["prompts"]]
    assert lengths == sorted(lengths)


def test_predict_leaves_out_what_is_answered(write_entries):
    data = InstructionDataModule(write_entries(40), fractions=(0.5, 0.25, 0.25))
    data.answered = frozenset(range(10)) - {3, 7}
    (batch,) = data.predict_dataloader()
    assert sorted(batch["index"]) == [3, 7]


def test_predict_needs_no_outputs(write_entries):
    path = write_entries(20, output="")
    data = InstructionDataModule(path)
    data.setup("predict")
    assert len(list(data.predict_dataloader())) == 1
    with pytest.raises(InputError, match="entry 0: 'output' is blank; training needs an answer"):
        InstructionDataModule(path).setup("fit")


def test_empty_outputs_are_left_out_alike_in_all_stages(write_entries, tmp_path, capsys):
    """Before the cut: else what one stage trains on another would answer."""
    path = write_entries(40)
    records = json.loads((tmp_path / "data.json").read_text())
    for place in (0, 3, 38):
        records[place]["output"] = ""
    (tmp_path / "data.json").write_text(json.dumps(records))
    with pytest.raises(InputError, match="entry 0: 'output' is blank"):
        InstructionDataModule(path).setup("fit")
    parts = {}
    for stage in ("fit", "predict", "validate"):
        data = InstructionDataModule(path, empty_output="skip")
        data.setup(stage)
        parts[stage] = data.entries
        said = f"{path}: 3 entries with an empty output are left out: 0, 3, 38\n"
        assert capsys.readouterr().out.startswith(said)
    assert parts["fit"] == parts["predict"] == parts["validate"]
    assert sum(map(len, parts["fit"])) == 37


def test_fit_opens_with_what_it_trains_on(write_entries, capsys):
    """Entries of up to 35 tokens, five sizes in turn; the three longest of five are cut."""
    data = InstructionDataModule(write_entries(40), mask_prompt=True, overlong="truncate")
    longest = int(data.rows("train").lengths.max())
    capsys.readouterr()
    data = InstructionDataModule(write_entries(40), max_length=longest - 1, mask_prompt=True)
    data.setup("fit")
    train, val = data.count("train"), data.count("val")
    assert capsys.readouterr().out == (
        "data: 34 training, 2 validation and 4 test entries\n"
        f"tokens: {train.tokens:,} of training, {train.supervised:,} of them supervised; "
        f"{val.tokens:,} of validation, {val.supervised:,} supervised\n"
        f"rows: {len(train.overlong)} of training and {len(val.overlong)} of validation are cut "
        f"to {longest - 1} tokens; 0 and 0 of them end before their answer begins\n"
    )
    assert len(train.overlong) > 0
    data.setup("validate")
    assert capsys.readouterr().out == ""


def test_rows_cut_inside_the_prompt_are_refused(write_entries):
    for max_length in (10, 20):
        data = InstructionDataModule(write_entries(40), max_length=max_length)
        with pytest.raises(InputError, match=r"^train split: 34 of 34 entries are cut to max_len"):
            data.setup("fit")
    InstructionDataModule(write_entries(40), max_length=60).setup("fit")


def test_another_tokenizer_reaches_rows_and_batches(write_entries, char_tokenizer):
    char_tokenizer.eos_token_id = 0
    for layout in ({}, {"padding_free": True}):
        data = InstructionDataModule(write_entries(40), batch_size=2, **layout)
        data.tokenizer = char_tokenizer
        batch = next(iter(data.train_dataloader()))
        assert (batch["targets"] == 0).sum() == 2
        assert (batch["targets"] == EOS).sum() == 0
        ids = batch["input_ids"]
        assert set(ids[ids < ord("\n")].tolist()) <= {0}
        assert chr(int(ids.flatten()[0])) == "B"  # of "Below is an instruction"


def test_splits_from_files_of_their_own(write_entries):
    main, val, test = (write_entries(20, name) for name in ("m.json", "v.json", "t.json"))
    sizes = {}
    for paths in ({}, {"val_path": val}, {"test_path": test}, {"val_path": val, "test_path": test}):
        data = InstructionDataModule(main, **paths)
        parts = [data.split(name) for name in ("train", "test", "val")]
        sizes[tuple(paths)] = [len(part) for part in parts]
        assert (data.split("val")[0].instruction == "v.json 0") == ("val_path" in paths)
        assert (data.split("test")[0].instruction == "t.json 0") == ("test_path" in paths)
        from_main = {text for part in parts for text in instructions(part) if text[0] == "m"}
        assert len(from_main) == 20  # no entry of `path` is lost
    assert sizes == {
        (): [17, 2, 1],
        ("val_path",): [18, 2, 20],
        ("test_path",): [19, 20, 1],
        ("val_path", "test_path"): [20, 20, 20],
    }


def test_a_split_with_its_own_file_may_have_no_share(write_entries):
    """Nine entries have no tenth to spare for the test split, which here needs none."""
    data = InstructionDataModule(write_entries(9), test_path=write_entries(3, "t.json"))
    assert [len(data.split(name)) for name in ("train", "test", "val")] == [7, 3, 2]


def test_names_fractions_and_styles_reach_the_rows(write_entries):
    path = write_entries(10, question="q")
    style = {"instruction": "{instruction}", "input": "+{input}", "header": ">"}
    data = InstructionDataModule(
        path,
        field_names={"instruction": "question"},
        fractions=(0.5, 0.3, 0.2),
        prompt_style=style,
        header_in_prompt=False,
    )
    assert [len(data.rows(name)) for name in ("train", "test", "val")] == [5, 3, 2]
    row = data.rows("train")[1]
    assert gpt2_tokenizer().decode(list(row.ids)) == "q>xx"
    assert row.prompt_length == 1


def test_files_are_read_once(write_entries, monkeypatch):
    reads = []
    read = config_module.read_entry_file
    monkeypatch.setattr(
        config_module,
        "read_entry_file",
        lambda *args, **kw: reads.append(args) or read(*args, **kw),
    )
    data = InstructionDataModule(write_entries(20))
    data.setup("fit")
    data.setup("validate")
    data.train_dataloader()
    assert data.rows("train") is data.rows("train")
    assert len(reads) == 1


def test_prepare_data_fetches_and_assigns_nothing(monkeypatch):
    fetched: list[str] = []
    monkeypatch.setattr(data_module, "local_path", fetched.append)
    data = InstructionDataModule("https://a.example/d.json", val_path="v", test_path="t")
    before = dict(vars(data))
    data.prepare_data()
    assert fetched == ["https://a.example/d.json", "v", "t"]
    assert vars(data) == before


def test_length_policies_reach_the_loaders(write_entries):
    path = write_entries(20)
    whole = InstructionDataModule(path)
    longest = int(whole.rows("train").lengths.max())
    drop = InstructionDataModule(path, max_length=longest - 1, overlong="drop", batch_size=2)
    assert 0 < len(drop.rows("train")) < len(whole.rows("train"))
    assert all(b["input_ids"].shape[1] < longest for b in drop.train_dataloader())
    with pytest.raises(InputError, match=r"^train split: entry \d+ has \d+ tokens, more than"):
        InstructionDataModule(path, max_length=longest - 1, overlong="error").train_dataloader()
    with pytest.raises(InputError, match=r"^val split: entry 0 has no target left"):
        InstructionDataModule(path, max_length=5, mask_prompt=True).val_dataloader()


def test_first_batches(book_data_path):
    """What the loss curve evaluates: the first batches of epoch 0, and of the file for val."""
    data = InstructionDataModule(str(book_data_path))
    expected = list(data.train_dataloader())[:5]
    actual = data.first_batches("train", 5)
    assert len(actual) == 5
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
    for ours, theirs in zip(data.first_batches("val", 99), data.val_dataloader(), strict=True):
        assert torch.equal(ours["targets"], theirs["targets"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size: 0 is not allowed; it must be >= 1"),
        ({"max_length": 0}, "data.max_length: 0 is not allowed; it must be >= 1"),
        ({"num_workers": -1}, "data.num_workers: -1 is not allowed; it must be >= 0"),
        ({"overlong": "cut"}, "data.overlong: unknown 'cut'; allowed: truncate, drop, error"),
        (
            {"prompt_style": "llama"},
            "prompt_style: unknown style 'llama'; allowed: alpaca, phi3, chatml, llama3, qwen3, "
            "template, or a mapping with instruction, input and header",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError) as error:
        InstructionDataModule("data.json", **settings)
    assert str(error.value) == message


def test_far_more_workers_than_processors(write_entries):
    data = InstructionDataModule(write_entries(40), num_workers=10**9)
    with pytest.raises(
        InputError, match=r"^data.num_workers: 1000000000 is not allowed; at most \d+"
    ):
        data.setup("fit")


def test_evaluation_says_what_is_cut(write_entries, capsys):
    data = InstructionDataModule(write_entries(40), max_length=35)
    data.rows("train")
    assert "train split: 6 of 34 entries are cut to 35 tokens\n" in capsys.readouterr().out
    data = InstructionDataModule(write_entries(40), max_length=35, overlong="drop")
    data.rows("train")
    assert "train split: 6 of 34 entries are left out\n" in capsys.readouterr().out


def test_bad_predict_batch_size():
    with pytest.raises(InputError, match=r"^data\.predict_batch_size: 0 is not allowed"):
        InstructionDataModule("data.json", predict_batch_size=0)


def test_more_than_the_entries_in_a_batch(write_entries):
    with pytest.raises(
        InputError, match=r"data\.batch_size: 18 on 1 device\(s\) needs at least 18"
    ):
        InstructionDataModule(write_entries(20), batch_size=18).train_dataloader()
    data = InstructionDataModule(write_entries(20), batch_size=18, drop_last=False)
    assert [len(batch["index"]) for batch in data.train_dataloader()] == [17]


@pytest.mark.process
@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_make_the_same_batches(write_entries, num_workers):
    data = InstructionDataModule(
        write_entries(40), batch_size=4, num_workers=num_workers, share_prefix=True
    )
    expected = InstructionDataModule(write_entries(40), batch_size=4, share_prefix=True)
    for name in ("train", "val"):
        batches = list(getattr(data, f"{name}_dataloader")())
        for ours, theirs in zip(batches, getattr(expected, f"{name}_dataloader")(), strict=True):
            assert ours.keys() == theirs.keys()
            assert torch.equal(ours["input_ids"], theirs["input_ids"])
            assert torch.equal(ours["gather"], theirs["gather"])
