"""`prepare`: near-duplicates, near-leaks and outliers of a data set, and a new file without them.

    python -m lightning_sft prepare --data.path instruction-data.json
    python -m lightning_sft prepare --config gpt2-medium.yaml --policy regroup --output new.json
    python -m lightning_sft prepare runs/gpt2-medium/version_0

Takes `fit`'s configs and options of data, so that what is examined is what is trained on. Writes
`data-quality.html` and `data-quality.json` here, or into the run folder that it is given, where
`report` finds them. The data itself is never changed: a policy writes a file that was not there
before, with every record as it was. This module does not import torch.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.arguments import PROGRAM, drop_options, read_layers
from lightning_sft.common.config_files import merge, read_config
from lightning_sft.common.errors import InputError
from lightning_sft.common.parser_messages import explain, option_names
from lightning_sft.data.config import DataConfig, describe_skipped, listed
from lightning_sft.data.entries import Splits
from lightning_sft.data.new_splits import Written, check_one_file, write_splits
from lightning_sft.data.quality import (
    POLICIES,
    Quality,
    apply_policies,
    examine,
    parse_policies,
    summarize_quality,
)
from lightning_sft.data.record_files import check_new_file, keep_from_data
from lightning_sft.reporting.quality_page import render_quality
from lightning_sft.runs.data_quality_file import (
    DATA_QUALITY_NAME,
    FORMAT,
    entry_key,
    read_data_quality,
)

SUMMARY = "find near-duplicates and leaks in the data, and write a file without them"
PAGE_NAME = Path(DATA_QUALITY_NAME).with_suffix(".html").name


def prepare(arguments: list[str]) -> int:
    """Examine a data set, and write a new one where a policy says how.

    Args:
        arguments: The command line behind `prepare`.

    Raises:
        InputError: The command line, a config or the data is wrong, a file would be written over,
            or scikit-learn is missing.
        ServiceError: The disk refused.
    """
    config, options = _parse(arguments)
    policies = parse_policies(options.policy)
    output = _new_file(options.output, policies, config)
    page = _page_file(options, config)
    # What `fit` refuses for its blank answers is still worth looking at.
    data = config.read(require_output=False)
    for line in [*data.notes, *describe_skipped(data.skipped)]:
        print(line)
    quality = examine(data.splits, options.threshold)
    print("\n".join(describe(quality, config.files())))
    written = None
    if output is not None:
        split_of = apply_policies(quality, policies)
        written = write_splits(output, config, data, split_of)
        print(_describe_written(written, quality))
    summary = _summary(config, quality, policies, written)
    files.write_json(page.with_suffix(".json"), summary)
    with files.atomic_write(page) as file:
        file.write(render_quality(quality, summary))
    print(f"Page: {page}")
    return 0


def _parse(arguments: list[str]) -> tuple[DataConfig, Any]:
    """The data section, and the options of this command."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=f"{PROGRAM} prepare", exit_on_error=False, description=SUMMARY, default_env=False
    )
    parser.add_argument(
        "run_folder", nargs="?", default=None, help="a run whose data is examined, for its report"
    )
    parser.add_argument("-c", "--config", help="YAML file; several compose, as for fit")
    parser.add_argument(
        "--threshold", type=float, default=0.9, help="least cosine of near-twins, 0.5 to 1"
    )
    described = "; ".join(f"{name}: {what}" for name, what in POLICIES.items())
    parser.add_argument(
        "--policy", default="report", help=f"{described}; the two drops may be joined by a comma"
    )
    parser.add_argument("--output", help="the new file, .json or .jsonl, that a policy writes")
    parser.add_argument("--page", help=f"where the page goes; {PAGE_NAME} here or in the run")
    parser.add_class_arguments(DataConfig, "data")
    layers, rest = read_layers(arguments)
    known = option_names(parser)
    rest = drop_options(rest, known)

    def parse(layers: dict[str, Any]) -> Any:
        given = {"data": layers["data"]} if layers.get("data") is not None else {}
        try:
            return parser.parse_args(rest, namespace=parser.parse_object(given))
        except ArgumentError as error:
            raise InputError(f"prepare: {explain(str(error), known)}") from None

    settings = parse(layers)
    if settings.run_folder is not None:
        settings = parse(merge([_run_config(Path(settings.run_folder)), layers]))
    return parser.instantiate(settings).data, settings


def _run_config(folder: Path) -> dict[str, Any]:
    if folder.is_file():
        raise InputError(f"{folder}: is a file; a data file is given as --data.path {folder}")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: no run folder (it holds no config.yaml)")
    return read_config(folder / "config.yaml")


# --- where things go ---


def _new_file(path: str | None, policies: Sequence[str], config: DataConfig) -> Path | None:
    """The file to write, which is not there yet; None for a look only."""
    if path is None and not policies:
        return None
    if path is None:
        raise InputError(f"policy: {policies[0]} writes a new file; name it with --output NEW.json")
    if not policies:
        raise InputError(
            f"output: the policy `report` writes no data; --policy {', '.join([*POLICIES][1:])}"
        )
    check_one_file(config)
    return check_new_file(path, "output", config.files())


def _page_file(options: Any, config: DataConfig) -> Path:
    """Where the page goes; it and the JSON beside it may replace those of an earlier look only."""
    folder = Path(options.run_folder or ".")
    page = files.expand_user(options.page, "page") if options.page else folder / PAGE_NAME
    if page.suffix != ".html":
        raise InputError(f"page: {page} must end in .html")
    beside = page.with_suffix(".json")
    for path in (page, beside):
        keep_from_data(path, "page", config.files())
    if options.output and beside.resolve() == Path(options.output).expanduser().resolve():
        raise InputError(f"page: {beside}, which goes beside it, is the --output")
    if os.path.lexists(beside):
        read_data_quality(beside)  # refuses what is somebody else's
    return page


# --- what is said ---


def describe(quality: Quality, paths: Sequence[str]) -> list[str]:
    """What was found, one line for each kind of thing."""
    sizes = {name: len(part) for name, part in quality.splits._asdict().items()}
    near = {(a, b): quality.count_twins(a, b) for a in sizes for b in sizes}
    lines = [
        f"{', '.join(paths)}: {sizes['train']:,} training, {sizes['test']:,} test and "
        f"{sizes['val']:,} validation entries",
        f"repeats: {quality.repeats['all']:,} entries have the very prompt of an earlier one",
        f"near-twins at {quality.threshold:g}: {near['test', 'train']:,} of {sizes['test']:,} test "
        f"and {near['val', 'train']:,} of {sizes['val']:,} validation entries have one in train; "
        f"{near['train', 'train']:,} of {sizes['train']:,} training entries have one there too",
        _describe_lengths(quality),
        _describe_scripts(quality),
    ]
    if quality.blank:
        lines.append(f"blank answers: {len(quality.blank):,}, {listed(quality.blank)}")
    return lines


def _describe_lengths(quality: Quality) -> str:
    parts = []
    for what, found in (("prompts", quality.prompts), ("answers", quality.answers)):
        quantiles = found.quantiles
        far = len(found.short) + len(found.long)
        parts.append(
            f"half of the {what} have {quantiles['25 %']:,} to {quantiles['75 %']:,} characters, "
            f"the longest {quantiles['most']:,}, {far:,} are far out"
        )
    return f"lengths: {'; '.join(parts)}"


def _describe_scripts(quality: Quality) -> str:
    counts = quality.scripts.counts
    shown = ", ".join(f"{count:,} {name.title()}" for name, count in [*counts.items()][:4])
    more = f" and {len(counts) - 4} more" if len(counts) > 4 else ""
    return f"scripts: {shown}{more}"


def _describe_written(written: Written, quality: Quality) -> str:
    before = {name: len(part) for name, part in quality.splits._asdict().items()}
    sizes = ", ".join(f"{name} {size:,}" for name, size in written.sizes.items())
    left_out = sum(before.values()) - sum(written.sizes.values())
    return f"wrote {written.path}: {sizes}; {left_out:,} left out; to use it:\n\n{written.config}\n"


def _summary(
    config: DataConfig, quality: Quality, policies: Sequence[str], written: Written | None
) -> dict[str, Any]:
    """`data-quality.json`."""
    entries, train = quality.entries, quality.nearest["train"]
    begins = {name: int(quality.places(name)[0]) for name in Splits._fields}
    evaluated = [
        {
            "split": name,
            "place": place - begins[name],
            "key": entry_key(entries[place]),
            "similarity": round(float(train.similarity[place]), 6) or None,
            "twin": int(train.place[place]) if train.place[place] >= 0 else None,
        }
        for name in ("test", "val")
        for place in quality.places(name).tolist()
    ]
    return {
        "format": FORMAT,
        "written": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "data": config.files(),
        **summarize_quality(quality),
        "policies": list(policies),
        "output": {"path": str(written.path), **written.sizes} if written else None,
        "evaluated": evaluated,
    }
