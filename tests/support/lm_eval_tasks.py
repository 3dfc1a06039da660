"""Three local tasks for lm-eval, and our answers to them beside those of lm-eval's own model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import yaml

from lightning_sft.decoding.answering import AnsweringModel

COLOURS = ["red", "green", "dark blue", "a colour that nobody has a name for"]


def write_tasks(folder: Path) -> Path:
    """Choices, whole texts, writing; 22 questions each."""
    folder.mkdir()
    questions = [
        {
            "question": "word " * (n * n % 90) + f"Number {n} is the colour",
            "choices": COLOURS,
            "answer": n % len(COLOURS),
        }
        for n in range(20)
    ]
    # Beyond the context of 128 tokens, and empty.
    questions += [{"question": "long " * 200, "choices": COLOURS, "answer": 1}]
    questions += [{"question": "", "choices": COLOURS, "answer": 2}]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    kinds = {
        "colours": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question + ' ' + choices[0]}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "writing": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n", "Number"], "max_gen_toks": 16},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **kind}))
    return folder


def compare_with_hf(model: AnsweringModel, exported: Path, tasks: Path, chat: bool) -> float:
    """Ask our model and, through lm-eval's `hf`, its exported folder; all must be equal.

    Args:
        chat: Ask through the chat template.

    Returns:
        The largest difference of two log-likelihoods, in nats.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from lightning_sft.evaluating.lm_eval_model import EvalModel

    names = ["colours", "rolling", "writing"]
    found = [
        simple_evaluate(
            lm,
            tasks=names,
            task_manager=TaskManager(include_path=str(tasks)),
            apply_chat_template=chat,
            num_fewshot=0,
            bootstrap_iters=10,
        )
        for lm in (
            EvalModel(model, batch_size=5),
            HFLM(pretrained=str(exported), device="cpu", batch_size=4, dtype="float32"),
        )
    ]
    ours, theirs = (result["samples"] for result in found)
    largest = 0.0
    for name in names:
        assert len(ours[name]) == len(theirs[name]) == 22
        for left, right in zip(ours[name], theirs[name], strict=True):
            if name == "writing":
                # An empty prompt is a row of nothing but padding to lm-eval's model.
                assert left["resps"] == right["resps"] or not (left["doc"]["question"] or chat)
                continue
            if name == "rolling":
                pairs = [(left["resps"][0][0], right["resps"][0][0])]
            else:
                both = list(zip(left["resps"], right["resps"], strict=True))
                assert all(a[0][1] == b[0][1] for a, b in both)  # greedy or not
                pairs = [(a[0][0], b[0][0]) for a, b in both]
            for a, b in pairs:
                # The sums of some run over hundreds of tokens, 1e-4 is of one.
                assert math.isclose(float(a), float(b), abs_tol=1e-4, rel_tol=1e-6)
                largest = max(largest, abs(float(a) - float(b)))
    accuracy = [result["results"]["colours"] for result in found]
    assert accuracy[0]["acc,none"] == accuracy[1]["acc,none"]
    assert accuracy[0]["acc_norm,none"] == accuracy[1]["acc_norm,none"]
    return largest
