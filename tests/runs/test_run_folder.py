"""Run folders: a version each, metrics that go on, and nothing left of what a resume repeats."""

from __future__ import annotations

import csv
import json
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sft.common.errors import InputError
from lightning_sft.runs.run_folder import (
    RunClaim,
    checkpoint_in,
    newest_run,
    next_version,
    run_of,
    saved_checkpoints,
    version_numbers,
)
from lightning_sft.training.loggers import COLUMNS, EventsLogger, MetricsFile, rewind


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "runs" / "name" / "version_3"
    made.mkdir(parents=True)
    return made


def read(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without their empty cells."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


# --- Versions ---


def test_versions_count_up(tmp_path):
    parent = tmp_path / "runs" / "name"
    assert [next_version(parent).name for _ in range(3)] == ["version_0", "version_1", "version_2"]
    assert (parent / "version_2").is_dir()


def test_a_gap_is_not_filled(tmp_path):
    """A deleted run's number is not given to another one behind it."""
    for name in ("version_1", "version_10", "version_9", "version_x", "version_", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "version_11").write_text("a file in the way")
    assert next_version(tmp_path).name == "version_12"


def test_a_name_that_only_looks_like_a_number(tmp_path):
    (tmp_path / "version_²").mkdir()
    assert next_version(tmp_path).name == "version_0"


def test_only_the_first_process_makes_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    next_version(tmp_path / "name")
    assert not (tmp_path / "name").exists()
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert next_version(tmp_path / "name").is_dir()  # control


def test_threads_never_share_a_version(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: next_version(tmp_path), range(40)))
    assert sorted(path.name for path in taken) == sorted(f"version_{n}" for n in range(40))


def test_a_version_taken_meanwhile_is_not_shared(tmp_path, monkeypatch):
    """The race itself: another run makes the folder between the look and the claim."""
    (tmp_path / "version_0").mkdir()
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))  # saw it still empty
    assert next_version(tmp_path).name == "version_1"


def test_processes_never_share_a_version(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        taken = pool.map(next_version, [tmp_path] * 40, chunksize=1)
    assert len({path.name for path in taken}) == len(taken) == 40


def test_version_numbers(tmp_path):
    for name in ("version_10", "version_9", "version_0", "version_x", "version_1b", "notes"):
        (tmp_path / name).mkdir()
    assert version_numbers(tmp_path) == [0, 9, 10]
    assert version_numbers(tmp_path / "missing") == []


def test_the_newest_run(tmp_path):
    assert newest_run(tmp_path) is None
    for name in ("version_9", "version_10", "version_x"):
        (tmp_path / name).mkdir()
    assert newest_run(tmp_path) == tmp_path / "version_10"


def test_whose_a_file_is(folder):
    (folder / "checkpoints").mkdir()
    checkpoint, weights = folder / "checkpoints" / "step-000001.ckpt", folder / "model-sft.pth"
    assert run_of(checkpoint) is None  # not there
    for path in (checkpoint, weights):
        path.touch()
        assert run_of(path) is None  # there, in a folder that is no run
    (folder / "config.yaml").touch()
    assert run_of(checkpoint) == run_of(weights) == folder
    assert run_of(folder) is None
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / checkpoint.name).touch()
    assert run_of(folder / "elsewhere" / checkpoint.name) is None  # whoever put it there


# --- A run where a checkpoint is wanted ---


def test_a_run_stands_for_its_newest_checkpoint(folder):
    (folder / "config.yaml").touch()
    with pytest.raises(InputError, match=r"^ckpt_path: the run .* has saved no checkpoint"):
        checkpoint_in(folder)
    weights = folder / "gpt2-2M-sft.pth"
    weights.touch()
    assert checkpoint_in(folder) == weights
    (folder / "checkpoints").mkdir()
    for name in ("step-999999.ckpt", "step-1000000.ckpt", "step-2000000-keep.ckpt", "step-x.ckpt"):
        (folder / "checkpoints" / name).touch()
    newest = folder / "checkpoints" / "step-1000000.ckpt"
    assert checkpoint_in(str(folder)) == newest
    assert [path.name for path in saved_checkpoints(folder)] == [
        "step-999999.ckpt",
        "step-1000000.ckpt",
    ]


def test_what_is_no_run_is_left_as_it_is(folder):
    exported = folder / "exported"
    exported.mkdir()
    (exported / "model.safetensors").touch()
    for path in (exported, exported / "model.safetensors", Path("gpt2-medium")):
        assert checkpoint_in(path) == path


def test_what_cannot_be_meant_is_refused(folder):
    with pytest.raises(InputError, match=r"^weights: .*nowhere.pth: no such file"):
        checkpoint_in(folder / "nowhere.pth", "weights")
    with pytest.raises(InputError, match=r"holds runs; name one, such as .*version_3$"):
        checkpoint_in(folder.parent)


# --- One writer a folder ---


def test_a_run_that_began_keeps_its_folder(tmp_path):
    with RunClaim() as claim:
        folder = claim.make(tmp_path / "runs" / "name")
        assert folder == tmp_path / "runs" / "name" / "version_0"
        claim.begun = True
    assert folder.is_dir()


def test_a_run_that_never_began_leaves_nothing(tmp_path):
    with RunClaim() as claim:
        folder = claim.make(tmp_path / "runs" / "name")
        (folder / "config.yaml").write_text("a: 1")
    assert list(tmp_path.iterdir()) == []


def test_other_runs_stay(tmp_path):
    next_version(tmp_path / "runs" / "name")
    with RunClaim() as claim:
        assert claim.make(tmp_path / "runs" / "name").name == "version_1"
    assert [path.name for path in (tmp_path / "runs" / "name").iterdir()] == ["version_0"]


def test_a_run_that_goes_on_is_never_taken_away(folder):
    with RunClaim() as claim:
        assert claim.reopen(folder) == folder
    assert folder.is_dir()


def reopen_in_another_process(folder: Path) -> str:
    try:
        with RunClaim() as claim:
            claim.reopen(folder)
    except InputError as error:
        return str(error)
    return "reopened"


def test_a_folder_has_one_writer(folder):
    with multiprocessing.get_context("fork").Pool(1) as pool, RunClaim() as claim:
        claim.reopen(folder)
        assert pool.apply(reopen_in_another_process, (folder,)) == (
            f"{folder}: another process is writing into this run"
        )
        claim.__exit__()
        assert pool.apply(reopen_in_another_process, (folder,)) == "reopened"  # control


def test_the_writer_may_be_killed(folder):
    """The kernel frees the lock of a process that is no more."""
    context = multiprocessing.get_context("fork")
    held = context.Event()

    def hold() -> None:
        claim = RunClaim()  # a claim that nobody keeps would be given back
        claim.reopen(folder)
        held.set()
        time.sleep(60)

    process = context.Process(target=hold)
    process.start()
    assert held.wait(30)
    with pytest.raises(InputError, match="another process is writing"):
        RunClaim().reopen(folder)
    process.kill()
    process.join(30)
    assert RunClaim().reopen(folder) == folder


# --- metrics.csv ---


def test_metrics_file(folder):
    metrics = MetricsFile(folder)
    metrics.log_metrics({"train_loss": torch.tensor(2.5), "epoch": 0.0}, step=0)
    metrics.log_metrics({"val_loss": 1.25, "val_perplexity": 3.5, "epoch": 0}, step=1)
    metrics.log_metrics({"lr": 1e-5})
    metrics.log_hyperparams({"a": 1})
    assert (folder / "metrics.csv").read_text().splitlines() == [
        ",".join(COLUMNS),
        "0,0,2.5,,,,,,,",
        "1,0,,,,,,,1.25,3.5",
        "0,,,1e-05,,,,,,",
    ]
    assert COLUMNS[:3] == ["step", "epoch", "train_loss"]
    assert COLUMNS[-2:] == ["val_loss", "val_perplexity"]
    assert (metrics.name, metrics.version) == ("name", "version_3")
    assert metrics.log_dir == str(folder)
    assert [path.name for path in folder.iterdir()] == ["metrics.csv"]


def test_a_figure_keeps_its_digits(folder):
    value = 0.1 + 0.2
    MetricsFile(folder).log_metrics({"train_loss": value, "tokens_seen": 123456789012.0}, step=5)
    (row,) = read(folder)
    assert float(row["train_loss"]) == value
    assert float(row["tokens_seen"]) == 123456789012.0


def test_a_reopened_file_goes_on(folder):
    for step in range(3):
        MetricsFile(folder).log_metrics({"train_loss": step}, step=step)
    assert [row["step"] for row in read(folder)] == ["0", "1", "2"]
    assert (folder / "metrics.csv").read_text().count("step,") == 1


def test_only_the_first_process_writes(folder, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    MetricsFile(folder).log_metrics({"train_loss": 1.0}, step=0)
    assert list(folder.iterdir()) == []


# --- Going back ---


def log_a_run(folder: Path, steps: int) -> None:
    """Like Lightning: all rows are numbered from 0, by the step that came before them."""
    metrics = MetricsFile(folder)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as samples:
        samples.write(json.dumps({"step": 0, "answer": "é"}, ensure_ascii=False) + "\n")
        for step in range(steps):
            metrics.log_metrics({"train_loss": 10.0 - step, "epoch": step // 2}, step=step)
            if step % 2:
                metrics.log_metrics({"val_loss": 5.0 - step, "epoch": step // 2}, step=step)
                samples.write(json.dumps({"step": step + 1, "answer": "ü"}) + "\n")


def sample_steps(folder: Path) -> list[int]:
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 6])
def test_rewind_leaves_what_a_run_of_that_many_steps_wrote(tmp_path, step):
    longer, shorter = tmp_path / "longer", tmp_path / "shorter"
    for made, steps in ((longer, 6), (shorter, step)):
        made.mkdir()
        log_a_run(made, steps)
    rewind(longer, step)
    if step:
        assert (longer / "metrics.csv").read_text() == (shorter / "metrics.csv").read_text()
    else:
        assert read(longer) == []
    assert sample_steps(longer) == sample_steps(shorter)
    assert (
        json.loads((longer / "samples.jsonl").read_text("utf-8").splitlines()[0])["answer"] == "é"
    )
    assert sorted(path.name for path in longer.iterdir()) == ["metrics.csv", "samples.jsonl"]
    MetricsFile(longer).log_metrics({"train_loss": 1.0}, step=step)
    assert read(longer)[-1] == {"step": str(step), "train_loss": "1.0"}


def test_rewind_twice_is_rewind_once(folder):
    log_a_run(folder, 6)
    rewind(folder, 4)
    once = (folder / "metrics.csv").read_bytes(), (folder / "samples.jsonl").read_bytes()
    rewind(folder, 4)
    assert ((folder / "metrics.csv").read_bytes(), (folder / "samples.jsonl").read_bytes()) == once


def test_rewind_tells_whether_the_last_steps_row_is_there(folder):
    """A kill between a checkpoint and the row of its step leaves the row out."""
    log_a_run(folder, 4)
    assert rewind(folder, 4)
    assert not rewind(folder, 5)
    assert rewind(folder, 3)
    assert not rewind(folder, 4)


@pytest.mark.parametrize("kept", [1, 3, 7, 13, 33])
def test_a_line_torn_by_a_kill_is_taken_back(folder, kept):
    """A kill while the row of step 5, or its sample, was written."""
    log_a_run(folder, 4)
    whole = (folder / "metrics.csv").read_text(), sample_steps(folder)
    with (folder / "metrics.csv").open("a") as file:
        file.write("5,2,4.5,1e-05,100.0,2000.0,,,4.25,70.1054"[:kept])
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "ans')
    rewind(folder, 6)
    assert ((folder / "metrics.csv").read_text(), sample_steps(folder)) == whole


def test_a_new_folder_has_nothing_to_take_back(folder):
    rewind(folder, 3)
    assert list(folder.iterdir()) == []


# --- TensorBoard ---


def read_scalars(folder: Path) -> dict[int, float]:
    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars("train_loss")}


def test_events_are_in_the_run_folder(folder):
    logger = EventsLogger(folder)
    assert Path(logger.log_dir) == folder
    logger.log_metrics({"train_loss": 2.5}, step=7)
    logger.save()
    assert read_scalars(folder) == {7: 2.5}  # flushed, not only closed
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")
    assert not (folder / "hparams.yaml").exists()


def test_events_behind_a_resumed_step_are_hidden(folder):
    first = EventsLogger(folder)
    for step in range(6):
        first.log_metrics({"train_loss": float(step)}, step=step)
    first.finalize("success")
    assert list(read_scalars(folder)) == [0, 1, 2, 3, 4, 5]  # control
    resumed = EventsLogger(folder, step=3)
    resumed.log_metrics({"train_loss": 30.0}, step=3)
    resumed.log_metrics({"train_loss": 40.0}, step=4)
    resumed.finalize("success")
    found = read_scalars(folder)
    # Old points of step 3 stay: a validation after three steps carries that number.
    assert {step: found[step] for step in (0, 1, 2, 4)} == {0: 0.0, 1: 1.0, 2: 2.0, 4: 40.0}
    assert 5 not in found
