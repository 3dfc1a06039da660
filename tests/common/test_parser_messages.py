"""jsonargparse's own complaints, provoked, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass

import jsonargparse._common as common
import pytest
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from lightning_sft.common.parser_messages import explain, option_names


@dataclass
class Size:
    """A group of options.

    Args:
        width: How wide.
    """

    width: int = 3


class Shape:
    """What a class_path may name."""


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> ArgumentParser:
    # The settings are the process's: begin without those of tests before.
    monkeypatch.setitem(common.parsing_settings, "import_path_verdicts", {})
    monkeypatch.setitem(common.parsing_settings, "import_paths_enforced", False)
    made = ArgumentParser(exit_on_error=False, prog="tool")
    made.add_class_arguments(Size, "size")
    made.add_argument("--maybe", type=Size | None)
    made.add_argument("--shape", type=Shape)
    return made


def complaint(parser: ArgumentParser, *arguments: str) -> str:
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args(list(arguments))
    return explain(str(caught.value), option_names(parser))


def test_option_names(parser: ArgumentParser) -> None:
    assert {"size.width", "maybe", "shape"} <= set(option_names(parser))


def test_an_unknown_option_gets_the_nearest_name(parser: ArgumentParser) -> None:
    assert "did you mean 'size.width'?" in complaint(parser, "--size.wdith=3")


def test_an_unknown_key_gets_the_nearest_name(parser: ArgumentParser) -> None:
    with pytest.raises(ArgumentError) as caught:
        parser.parse_object({"size": {"wdith": 3}})
    assert "wdith" in explain(str(caught.value), option_names(parser))
    assert "\n" not in explain(str(caught.value))


def test_a_wrong_value_names_its_option(parser: ArgumentParser) -> None:
    assert "size.width" in complaint(parser, "--size.width=many")
    told = complaint(parser, "--maybe.width=many")
    assert "width" in told
    assert "NoneType" not in told


def test_a_refused_class_is_told_how_to_be_allowed(parser: ArgumentParser) -> None:
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["lightning_sft"])
    told = complaint(parser, "--shape=my_package.shapes.Round")
    assert told.endswith(
        "my_package.shapes.Round is not among the classes that a config may name; if you trust it: "
        "--allow_import my_package"
    )
