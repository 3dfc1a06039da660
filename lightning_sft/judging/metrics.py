"""Metrics that need no judge: exact match, token F1, ROUGE-L and chrF.

They compare an answer with the wanted one, word by word or character by character. They know
nothing of meaning: an answer that is right in other words scores low. Their use is that they cost
nothing and never change, so that an offline run has a figure too.

All four run from 0 to 100. chrF comes from sacrebleu, whose figures papers quote. ROUGE-L is
written out here, since rouge-score (last released in 2022) takes two seconds to import and
torchmetrics imports torch; a test holds it to both on the chapter's 110 answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from lightning_sft.judging.significance import Interval, bootstrap_mean

ARTICLES = {"a", "an", "the"}


def normalize(text: str) -> list[str]:
    """Words of `text` in lower case, without punctuation and English articles (as SQuAD does)."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in bare.split() if word not in ARTICLES]


def exact_match(response: str, reference: str) -> float:
    """100 if both are the same words after `normalize`, else 0."""
    return 100.0 * (normalize(response) == normalize(reference))


def token_f1(response: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the bag of words after `normalize`.

    Source: Rajpurkar et al., "SQuAD", 2016, arXiv:1606.05250, section 6.1.
    """
    answer, wanted = normalize(response), normalize(reference)
    shared = sum((Counter(answer) & Counter(wanted)).values())
    if not answer or not wanted:
        return 100.0 * (answer == wanted)
    return _f1(shared, len(answer), len(wanted))


def rouge_l(response: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (not stemmed).

    Source: Lin, "ROUGE", 2004, section 3, with words cut as Google's rouge-score cuts them.
    """
    answer, wanted = (re.findall("[a-z0-9]+", text.lower()) for text in (response, reference))
    return _f1(_longest_common_subsequence(answer, wanted), len(answer), len(wanted))


def chrf(response: str, reference: str) -> float:
    """F-score, recall weighing double, over character n-grams of 1 to 6.

    Works for any script, since it needs no words.

    Source: Popović, "chrF", 2015, as sacrebleu computes it for one sentence.
    """
    from sacrebleu.metrics import CHRF  # 0.3 s to import, and `score --help` does not need it

    return float(CHRF().sentence_score(response, [reference]).score)


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "chrf": chrf,
}
# How pages and messages call them.
TITLES = {
    "score": "Score",
    "exact_match": "Exact match",
    "token_f1": "Token F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
}


def measure(pairs: Iterable[tuple[str, str]]) -> dict[str, list[float]]:
    """Every metric of every (response, reference) pair, in order, rounded to two decimals."""
    pairs = list(pairs)
    return {
        name: [round(metric(response, reference), 2) for response, reference in pairs]
        for name, metric in METRICS.items()
    }


def summarize(values: dict[str, list[float]]) -> dict[str, Interval]:
    """Mean and 95 % interval of each metric."""
    return {name: bootstrap_mean(column) for name, column in values.items()}


def _f1(shared: int, answer_length: int, wanted_length: int) -> float:
    """100 · 2PR/(P+R), where P = shared/answer and R = shared/wanted."""
    return 200.0 * shared / (answer_length + wanted_length) if shared else 0.0


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by a table of which one row is the bits of one number.

    Source: Hyyrö, "Bit-Parallel LCS-length Computation Revisited", 2004.
    """
    places: dict[str, int] = {}  # bit i is set where the word is number i of `first`
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    row = every = (1 << len(first)) - 1  # bit i is 0 where the table grows from column i to i + 1
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & every
    return len(first) - row.bit_count()
