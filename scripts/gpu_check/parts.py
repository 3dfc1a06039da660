"""What is run, in which order, and for how long at most.

What is right comes before what is quick: a machine that computes wrongly need not be measured.
This module does not import torch until a part runs.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

from gpu_check.notebook import Notebook, SkipError, describe


class Part(NamedTuple):
    """A part of the check.

    place: `module.function`, called with a `Notebook`.
    limit: Seconds, after which it is killed.
    """

    place: str
    limit: int

    def run(self, notebook: Notebook) -> None:
        """Do it in this process; what went wrong is written down and raised again."""
        module, function = self.place.split(".")
        try:
            getattr(importlib.import_module(f"gpu_check.{module}"), function)(notebook)
        except SkipError as reason:
            notebook.write(notebook.part, skipped=str(reason))
        except Exception as error:
            notebook.write(notebook.part, error=describe(error))
            raise


PARTS: dict[str, Part] = {
    "device": Part("agreement.check_device", 60),
    "precision": Part("agreement.check_precision", 120),
    "layouts": Part("agreement.check_layouts", 60),
    "repeat": Part("agreement.check_repeat", 60),
    "chapter": Part("speed.measure_chapter", 90),
    "gpt2": Part("speed.measure_gpt2", 120),
    "qwen3": Part("speed.measure_qwen3", 150),
    "decoding": Part("speed.measure_decoding", 90),
    "memory": Part("speed.check_memory", 60),
    "sharded": Part("agreement.check_sharded_one", 60),
    "sharded-all": Part("agreement.check_sharded_all", 60),
    "tests": Part("gpu_tests.run_tests", 120),
    "smollm2": Part("speed.measure_smollm2", 120),
}
