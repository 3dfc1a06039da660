"""`inspect`: its counts on data made for the purpose and on the chapter's, and its clean splits."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from lightning_sft import InstructionDataModule
from lightning_sft.commands.inspect import inspect
from lightning_sft.common.config_files import SECTIONS
from lightning_sft.common.errors import InputError
from lightning_sft.data.batching import pack
from lightning_sft.data.config import DataConfig
from lightning_sft.data.counting import count_tree
from lightning_sft.data.entries import Entry, Splits, read_entries, read_entry_file
from lightning_sft.data.find_tokenizer import read_tokenizer
from lightning_sft.data.rows import Row, Span
from lightning_sft.data.token_view import view_row
from support.runs import run, write_config, write_data
from support.tiny_run import write_tokenizer


def look(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> str:
    assert run("inspect", *arguments) == code, capsys.readouterr().err
    return capsys.readouterr().out


def read_row(out: str, label: str) -> list[int]:
    """The train, test and val columns of one line of the table."""
    (line,) = (line for line in out.splitlines() if re.match(rf" *{label}  ", line))
    return [int(number.replace(",", "")) for number in line.split()[-3:]]


def make_entry(n: int, **changes: str) -> dict[str, str]:
    return {"instruction": f"Do {n}", "input": "", "output": f"Done {n}."} | changes


def write_entries(path: Path, entries: list[dict[str, str]]) -> Path:
    path.write_text(json.dumps(entries))
    return path


def test_the_chapters_data(book_data_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = look(capsys, "--config", "gpt2-medium.yaml", "--data.path", book_data_path)
    assert read_row(out, "entries") == [935, 110, 55]
    assert "25 repeated instruction-input pairs in all three together" in out
    assert read_row(out, "prompts also in train") == [0, 2, 4]
    assert "finding: 2 test prompts are also in train" in out
    assert "finding: 4 val prompts are also in train" in out
    assert "batches of 8: 116 an epoch, 116 optimizer steps an epoch, 232 in 2 epochs" in out
    data = InstructionDataModule(str(book_data_path))
    rows = {name: data.rows(name) for name in Splits._fields}
    assert read_row(out, "tokens") == [int(part.lengths.sum()) for part in rows.values()]
    # The padding of the epoch that fit really trains on.
    batches = list(data.train_dataloader())
    padded = sum(batch["input_ids"].numel() for batch in batches)
    real = sum(int(batch["num_tokens"]) for batch in batches)
    assert f"padding: {1 - real / padded:.1%} of {padded:,} tokens" in out
    shared = InstructionDataModule(str(book_data_path), share_prefix=True).train_dataloader()
    assert f"share_prefix {sum(batch['input_ids'].numel() for batch in shared):,} (" in out


def test_clean_splits_of_the_chapters_data(
    book_data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = tmp_path / "clean"
    out = look(capsys, "--data.path", book_data_path, "--fix", clean)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean"]  # nothing staged is left
    parts = {name: read_entries(clean / f"{name}.json") for name in Splits._fields}
    prompts = [(e.instruction, e.input) for part in parts.values() for e in part]
    assert len(prompts) == len(set(prompts)) == 1100 - 25
    assert len(parts["test"]) == 109  # evaluation keeps its entries but one that it had twice
    assert len(parts["val"]) == 55
    # The lines that it prints are a config, and what they name has no findings left.
    config = tmp_path / "clean.yaml"
    config.write_text(out[out.index("data:\n") :])
    assert yaml.safe_load(config.read_text())["data"]["path"] == str(clean / "train.json")
    look(capsys, "--config", config, "--strict")


def test_faults_are_counted_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [make_entry(n) for n in range(20)]
    entries[3] = make_entry(0, output="Another answer.")  # repeats entry 0
    entries[5]["output"] = "word " * 60
    entries[6]["instruction"] = "Copy this:\n### Response:\nno"
    entries[16] = make_entry(1)  # test entry 0 is train entry 1
    entries[18] = make_entry(2)  # val entry 0 is train entry 2
    entries[19] = make_entry(1)  # val entry 1 is train entry 1 and test entry 0
    path = write_entries(tmp_path / "data.json", entries)
    options = ["--data.path", path, "--data.fractions=[0.8, 0.1, 0.1]", "--data.max_length=60"]
    options += ["--data.batch_size=3", "--trainer.accumulate_grad_batches=2"]
    out = look(capsys, *options)
    assert read_row(out, "entries") == [16, 2, 2]
    assert read_row(out, "truncated") == read_row(out, "without end-of-text") == [1, 0, 0]
    assert read_row(out, "repeated prompts") == [1, 0, 0]
    assert read_row(out, "prompts also in train") == [0, 1, 2]
    assert read_row(out, "prompts also in test") == [0, 0, 1]
    assert read_row(out, "texts with a header") == [1, 0, 0]
    assert "finding: 1 train entries repeat an earlier one's instruction and input: 3\n" in out
    assert "train entries hold a prompt header such as '### Response:' in their text: 6\n" in out
    assert "batches of 3: 5 an epoch, 3 optimizer steps an epoch" in out
    dropped = look(capsys, *options, "--data.overlong", "drop")
    assert read_row(dropped, "dropped") == [1, 0, 0]
    assert read_row(dropped, "without end-of-text") == [0, 0, 0]
    assert read_row(out, "tokens")[0] - read_row(dropped, "tokens")[0] == 60
    masked = look(capsys, *options, "--data.mask_prompt", "true", "--data.max_length", "38")
    assert read_row(masked, "without target")[0] > 0


def test_supervised_tokens_are_the_targets_of_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_data(tmp_path / "data.json")
    for mask_prompt in (False, True):
        data = InstructionDataModule(str(path), mask_prompt=mask_prompt, max_length=54)
        expected = sum(int((batch["targets"] != -100).sum()) for batch in data.test_dataloader())
        options = ["--data.mask_prompt", str(mask_prompt), "--data.max_length", 54]
        out = look(capsys, "--data.path", path, *options)
        assert read_row(out, "supervised tokens")[1] == expected


def test_strict_is_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_data(tmp_path / "data.json")
    look(capsys, "--data.path", path, "--strict")
    entries = json.loads(path.read_text())
    write_entries(path, [*entries, entries[0]])
    assert run("inspect", "--data.path", path, "--strict") == 4
    err = capsys.readouterr().err
    assert err == "error: inspect: 1 findings; the first: 1 val prompts are also in train: 2\n"
    look(capsys, "--data.path", path)  # not strict: a finding is no failure
    too_few = ["--data.path", path, "--data.batch_size", "50"]
    refusal = "data.batch_size: 50 on 1 device(s) needs at least 50 training entries, there are 34"
    assert f"finding: fit refuses this: {refusal}" in look(capsys, *too_few)
    assert run("inspect", *too_few, "--strict") == 4


def test_overlays_and_options_compose_as_in_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_data(tmp_path / "data.json")
    config = write_config(tmp_path, data__path=str(path))
    layered = ["--config", config, "--config", "phi3.yaml", "--config=mask-prompt.yaml"]
    out = look(capsys, *layered, "--data.batch_size=2", "--trainer.max_epochs", "5")
    assert "prompt style phi3, header in the prompt, loss on the answer" in out
    assert "batches of 2: 17 an epoch, 17 optimizer steps an epoch, 85 in 5 epochs" in out
    # What is not the data's business may be there, on the command line too.
    look(capsys, *layered, "--model.weights", "gpt2-xl", "--trainer.precision=16-mixed")


def test_the_config_of_a_run_is_understood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {"trainer__max_steps": 1, "loss_curve__every_n_steps": 0, "samples__indices": []}
    assert run("fit", "--config", write_config(tmp_path, **quick)) == 0
    saved = tmp_path / "runs/tiny/version_0/config.yaml"
    assert set(yaml.safe_load(saved.read_text())) <= set(SECTIONS)
    capsys.readouterr()
    assert read_row(look(capsys, "--config", saved), "entries") == [34, 4, 2]


def test_the_data_section_is_the_data_modules() -> None:
    """Same names, types, defaults and help: what `inspect` accepts is what `fit` does."""
    fit, look = LightningArgumentParser(), ArgumentParser()
    fit.add_lightning_class_args(InstructionDataModule, "data")
    look.add_class_arguments(DataConfig, "data")
    options = [
        {a.dest: (str(a._typehint), a.default, a.help) for a in parser._actions if "." in a.dest}
        for parser in (fit, look)
    ]
    assert len(options[1]) == len(dataclasses.fields(DataConfig))
    linked = {"data.seed", "data.predict_batch_size"}  # filled in from other sections
    assert {k: v for k, v in options[0].items() if k not in linked} == options[1]
    assert all(text for _, _, text in options[0].values())


@pytest.mark.parametrize("own_files", [{}, {"val_path"}, {"test_path"}, {"val_path", "test_path"}])
def test_splits_are_the_data_modules(tmp_path: Path, own_files: set[str]) -> None:
    path = write_data(tmp_path / "data.json")
    others = {name: str(write_data(tmp_path / f"{name}.json", 7)) for name in own_files}
    data = InstructionDataModule(str(path), **others)
    assert DataConfig(str(path), **others).read().splits == Splits(
        *(data.split(name) for name in Splits._fields)
    )


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6))
def test_tree_counts_the_tokens_that_are_computed(rows: list[list[int]]) -> None:
    """`pack` computes the rows' inputs, which are the rows without the end-of-text it adds."""
    assert count_tree(rows) == len(pack(rows, share_prefix=True)["input_ids"])


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("group_by_length", "drop_last"), [(False, True), (True, False)])
def test_batches_are_those_of_fit(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    group_by_length: bool,
    drop_last: bool,
    devices: int,
) -> None:
    """Computed tokens of the first three batches, summed over what each rank really makes."""
    settings: dict[str, Any] = {
        "group_by_length": group_by_length,
        "drop_last": drop_last,
        "batch_size": 5,
        "max_length": 45,
    }
    path = str(write_data(tmp_path / "data.json"))
    options = [f"--data.{name}={str(value).lower()}" for name, value in settings.items()]
    options += [f"--trainer.devices={devices}", "--trainer.limit_train_batches=3"]
    out = look(capsys, "--data.path", path, *options)
    padded = 0
    for rank in range(devices):
        data = InstructionDataModule(path, **settings)
        ranks = {"rank": rank, "world_size": devices, "pin_memory": False}
        data._device_settings = lambda ranks=ranks: ranks  # type: ignore[method-assign, misc]
        batches = list(data.train_dataloader())[:3]
        padded += sum(batch["input_ids"].numel() for batch in batches)
    assert f"of {padded:,} tokens in the first epoch" in out
    assert f"batches of {5 * devices}: 3 an epoch, 3 optimizer steps an epoch, 6 in 2" in out


def test_a_training_file_too_small_to_cut_with_a_test_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight entries have no tenth to spare for the test split, which here needs none."""
    few = write_data(tmp_path / "few.json", 8)
    test = write_data(tmp_path / "test.json", 5)
    options = ["--data.path", few, "--data.test_path", test, "--data.batch_size=2"]
    assert read_row(look(capsys, *options), "entries") == [6, 5, 2]
    data = InstructionDataModule(str(few), test_path=str(test))
    assert [len(data.split(name)) for name in Splits._fields] == [6, 5, 2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trainer.devices=auto"], "batches of 4: 8 an epoch, 8 optimizer steps an epoch, 16 in"),
        (["--trainer.devices=-1"], "batches of 4: 8 an epoch"),
        (["--trainer.devices=0,1"], "batches of 8: 4 an epoch, 4 optimizer steps"),
        (["--trainer.devices=[0,1]"], "batches of 8: 4 an epoch, 4 optimizer steps"),
        (["--trainer.max_epochs=null", "--trainer.max_steps=5"], "steps an epoch, 5 in all"),
        (["--trainer.max_epochs=-1"], "8 an epoch, 8 optimizer steps an epoch\n"),
        (["--trainer.max_steps=5"], "steps an epoch, 5 in 2 epochs at most"),
        (["--trainer.limit_train_batches=0.5"], "4 an epoch, 4 optimizer steps an epoch, 8 in"),
        (["--trainer.accumulate_grad_batches=3"], "8 an epoch, 3 optimizer steps an epoch, 6 in"),
        (["--seed_everything=true"], "8 an epoch"),
        (["--data.predict_split=train", "--data.num_workers=2"], "8 an epoch"),
    ],
)
def test_what_fit_accepts_is_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    path = write_data(tmp_path / "data.json")
    assert expected in look(capsys, "--data.path", path, "--data.batch_size=4", *options)


def test_exercise_7_3_leaves_empty_answers_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stanford's file has 28 of them among 52,002; here 2 of 40."""
    entries = [make_entry(n) for n in range(40)]
    entries[7]["output"] = entries[39]["output"] = ""
    path = write_entries(tmp_path / "data.json", entries)
    configs = ["--config", "gpt2-medium.yaml", "--config", "alpaca-52k.yaml", "--data.path", path]
    out = look(capsys, *configs)
    assert read_row(out, "entries") == [32, 3, 3]
    assert f"{path}: 2 entries with an empty output are left out: 7, 39\n" in out
    assert run("inspect", *configs, "--data.empty_output=error") == 2
    assert "entry 7: 'output' is blank" in capsys.readouterr().err


def test_seed_zero_is_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, seed_everything=0, data__group_by_length=True)
    zero = look(capsys, "--config", config)
    assert look(capsys, "--config", config, "--seed_everything=0") == zero
    assert look(capsys, "--config", config, "--seed_everything=123") != zero


def test_an_entry_is_shown_with_what_is_supervised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [make_entry(n) for n in range(40)]
    entries[1] = make_entry(1, input="x", output="One.\x1b[31m")
    path = write_entries(tmp_path / "data.json", entries)
    out = look(capsys, "--data.path", path, "--entries", "0,1", "--data.mask_prompt", "true")
    assert "### Response:\n[[Done 0.<|endoftext|>]]\n" in out
    assert "[[45677 657 13 50256]]" in out
    assert "train entry 0: 32 prompt and 3 answer tokens, 4 supervised\n" in out
    assert "\x1b" not in out  # an entry cannot steer the terminal
    assert "One.\\x1b[31m" in out
    unmasked = look(capsys, "--data.path", path, "--show", "1")
    # A row's first token follows nothing, so nothing predicts it.
    assert "\nBelow[[ is an instruction that describes a task." in unmasked
    cut = look(capsys, "--data.path", path, "--show=1", "--split=test", "--data.max_length=30")
    assert re.search(r"test entry 0: .* 30 supervised, \d+ cut off\n", cut)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    coloured = look(capsys, "--data.path", path, "--entries", "0", "--data.mask_prompt", "true")
    assert "\x1b[32mDone 0.<|endoftext|>\x1b[0m" in coloured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--entries", "0,x"], "is not a list such as 0,5"),
        (["--entries", "99"], "train has entries 0 to 33, not 99"),
        (["--data.batchsize", "3"], "did you mean 'data.batch_size'?"),
        (["--data.max_length", "0"], "it must be >= 1"),
        (["--strickt"], "did you mean 'strict'?"),
        (["--split", "dev"], "split"),
        (["--trainer.accumulate_grad_batches", "0"], "must be >= 1"),
        (["--config", "gpt3-small.yaml"], "did you mean 'gpt2-small.yaml'?"),
    ],
)
def test_bad_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    path = write_data(tmp_path / "data.json")
    assert run("inspect", "--data.path", path, *options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_fix_writes_over_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_data(tmp_path / "data.json")
    content = path.read_text()
    assert run("inspect", "--data.path", path, "--fix", tmp_path) == 2
    assert "is already there" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["data.json"]
    assert path.read_text() == content
    same = write_entries(tmp_path / "same.json", [make_entry(1)] * 40)
    assert run("inspect", "--data.path", same, "--fix", tmp_path / "clean") == 2
    assert "would stay empty" in capsys.readouterr().err
    assert not (tmp_path / "clean").exists()


def test_fix_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_sft.common import files

    original = files.write_json

    def write_json(path: Path, value: Any) -> None:
        if path.name == "val.json":
            raise OSError(28, "No space left on device")
        original(path, value)

    monkeypatch.setattr(files, "write_json", write_json)
    path = write_data(tmp_path / "data.json")
    assert run("inspect", "--data.path", path, "--fix", tmp_path / "clean") == 3
    assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["data.json"]


def test_no_torch_and_a_quick_help(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    code = (
        "import sys, time; from lightning_sft.__main__ import main\n"
        "try: main(['inspect', '--help'])\n"
        "except SystemExit: pass\n"
        "seconds = time.process_time()\n"
        f"assert main(['inspect', '--config', {str(config)!r}]) == 0\n"
        "print('torch' in sys.modules, 'lightning' in sys.modules, seconds)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert "--data.mask_prompt" in done.stdout
    torch, lightning, seconds = done.stdout.splitlines()[-1].split()
    assert (torch, lightning) == ("False", "False")
    assert float(seconds) < 1.0  # of processor time


def test_entry_fields_are_all_that_is_compared() -> None:
    """A new field of Entry would have to be written by --fix and shown by --entries."""
    assert [field.name for field in dataclasses.fields(Entry)] == ["instruction", "input", "output"]


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2 <b>", "weight": 0.5},
]


def write_talks(path: Path, talk: list[dict[str, Any]] = TALK, count: int = 20) -> Path:
    path.write_text(json.dumps([{"messages": talk}] * count))
    return path


def test_a_conversation_is_shown_turn_by_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_talks(tmp_path / "talks.json")
    given = ("--data.path", path, "--data.mask_prompt", "true", "--entries", "1")
    out = look(capsys, *given, "--data.prompt_style", "chatml")
    assert "<|im_start|>assistant\n[[1<|im_end|>]]\n<|im_start|>user\nTwo?" in out
    assert "assistant\n[[2 <b><|im_end|><|endoftext|>]]×0.5\n" in out
    assert out.count("train entry 1") == 1
    # A style that closes no answers: a row for each.
    out = look(capsys, *given)
    assert out.count("train entry 1: ") == 2
    assert "### Response:\n[[1<|endoftext|>]]\n" in out
    assert "### Response:\n[[2 <b><|endoftext|>]]×0.5\n" in out
    cut = look(capsys, *given, "--data.prompt_style", "chatml", "--data.max_length", "60")
    assert re.search(r"~~.*2 <b><\|im_end\|><\|endoftext\|>~~\n", cut, re.DOTALL)


def test_a_page_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = write_talks(tmp_path / "talks.json"), tmp_path / "page.html"
    given = ("--data.path", path, "--data.mask_prompt=true", "--data.prompt_style=chatml")
    out = look(capsys, *given, "--html", page, "--show", "2")
    assert out == f"2 rows of train written to {page}\n"
    text = page.read_text()
    assert text.count("<h2>train entry") == 2
    assert '<span class="supervised" title="16">1</span>' in text
    assert '<span class="supervised" title="1279, weight 0.5"> &lt;</span>' in text
    assert '<span class="context" title="' in text
    assert "<b>" not in text


def test_a_page_marks_what_is_special_and_cut(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model")
    tokenizer = read_tokenizer(tmp_path / "model")
    row = Row([257, 65, 66, 67], 1, 0, [Span(2, 5)])
    runs = view_row(row, DataConfig(max_length=2), tokenizer)
    assert [(run.ids, run.kind, run.is_special) for run in runs] == [
        ([257], "context", True),
        ([65], "context", False),
        ([66], "supervised", False),
        ([67], "cut", False),
        ([258], "cut", True),
    ]


@pytest.mark.parametrize(
    ("talk", "settings", "message"),
    [
        (
            [TALK[1], TALK[2] | {"train": False}],
            [],
            "train split: nothing carries loss with prompt_style alpaca and data.train_on 'all'",
        ),
        (
            [TALK[1], TALK[2] | {"train": True}],
            ["--data.train_on", "[user]", "--data.header_in_prompt", "false"],
            "train split: everything carries loss with prompt_style alpaca and data.train_on "
            "['user'], although data.mask_prompt is true",
        ),
    ],
    ids=["empty", "full"],
)
def test_masks_that_are_all_empty_or_all_full_are_refused(
    talk: list[dict[str, Any]], settings: list[str], message: str, tmp_path: Path
) -> None:
    path = write_talks(tmp_path / "talks.json", talk)
    given = ["--data.path", str(path), "--data.mask_prompt=true", *settings]
    with pytest.raises(InputError) as error:
        inspect(given)
    assert str(error.value).startswith(message)


def test_clean_conversations_are_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talks.json"
    talks = [[*TALK[:3], TALK[3] | {"content": f"{n}?"}, TALK[4]] for n in [*range(30), 3, 4]]
    plain = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    path.write_text(json.dumps([{"messages": talk} for talk in [plain, *talks]]))
    look(capsys, "--data.path", path, "--fix", tmp_path / "clean")
    names = {name: tmp_path / "clean" / f"{name}.json" for name in Splits._fields}
    found = [read_entry_file(file, format="auto").entries for file in names.values()]
    kept = [entry for part in found for entry in part]
    assert len(kept) == 31
    wanted = read_entry_file(path, format="auto").entries
    assert all(entry in wanted for entry in kept)
    assert Entry("Q", "", "A") in kept


def test_a_file_is_named_for_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_talks(tmp_path / "talks.json")
    out = look(capsys, "--data.path", path, "--data.max_tokens", "700", "--data.padding_free=true")
    line = f"{path}: JSON, 20 records in the format messages (recognised by its fields)\n"
    assert line in out
    assert "\nbatches of at most 700 tokens: " in out
    mixture = json.dumps([{"path": str(path), "weight": 2}])
    out = look(capsys, "--data.mixture", mixture)
    assert read_row(out, "entries") == [17, 2, 1]
    assert read_row(out, "rows") == [34, 4, 2]
    assert f"mixture: 68 rows an epoch of the 34 in {path}, about 100% of the tokens" in out


BAD = {
    "role.json": ('[{"messages": [{"role": "critic", "content": "x"}]}]', "unknown role 'critic'"),
    "turns.json": (
        json.dumps([{"messages": [*TALK[1:3], TALK[2]]}]),
        "two assistant turns running",
    ),
    "empty.json": ('[{"messages": []}]', "messages: is empty"),
    "ragged.csv": ("instruction,output\na,b\na\n", "line 3: 1 fields where the header has 2"),
    "corrupt.parquet": ("PAR1 and nothing else", "cannot be read as parquet"),
    "packed.jsonl.gz": ("\x1f\x8b and nothing else", "cannot be unpacked"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["inspect", "fit"])
def test_bad_files_are_one_line(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = BAD[name]
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    config = ["--config", write_config(tmp_path, data__path=name)] if command == "fit" else []
    assert run(command, *config, "--data.path", name) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["inspect", "fit"])
def test_a_mixture_with_a_missing_file_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = [{"path": str(write_talks(tmp_path / "a.json"))}, {"path": "missing.json"}]
    config = ["--config", write_config(tmp_path)] if command == "fit" else []
    assert run(command, *config, "--data.mixture", json.dumps(mixture)) == 2
    assert capsys.readouterr().err == (
        "error: missing.json: no such file; give a JSON or JSONL file, or a URL\n"
    )
