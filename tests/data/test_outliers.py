"""Lengths and scripts: what is named, and what is not."""

from __future__ import annotations

import pytest

from lightning_sft.data.outliers import find_script, find_scripts, measure_lengths


def test_lengths_far_out() -> None:
    texts = ["x" * n for n in (50, 55, 60, 65, 70, 75, 80, 85, 90, 95, 2000)] + [""]
    found = measure_lengths(texts)
    assert (found.long, found.short) == ([10], [11])
    assert found.quantiles["least"] == 0
    assert found.quantiles["50 %"] in (70, 75)
    assert found.quantiles["most"] == 2000


def test_lengths_that_are_all_alike() -> None:
    assert measure_lengths(["abc"] * 9)[1:] == ([], [])
    assert measure_lengths(["abc"]).quantiles["most"] == 3


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("The cat sleeps.", "LATIN"),
        ("Die Katze schläft über Nacht.", "LATIN"),
        ("Кошка спит", "CYRILLIC"),
        ("Translate: кошка спит на диване", "CYRILLIC"),
        ("猫在睡觉，很好", "CJK"),
        ("ｆｕｌｌｗｉｄｔｈ", "LATIN"),
        ("12 + 30 = 42", "no letters"),
        ("a = b", "no letters"),
        ("", "no letters"),
        ("😀😀😀😀😀", "no letters"),
    ],
)
def test_the_script_of_most_letters(text: str, script: str) -> None:
    assert find_script(text) == script


def test_other_scripts_than_most() -> None:
    found = find_scripts(["The cat", "Кошка спит", "1 + 1", "The dog", "ねこはねる"])
    assert found.counts == {"LATIN": 2, "CYRILLIC": 1, "no letters": 1, "HIRAGANA": 1}
    assert found.others == [1, 4]
    assert find_scripts(["1", "2"]).others == []
