"""`report`: one harmless file, whatever part of the run is missing or hostile."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import re
import resource
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from lightning_sft.common.errors import IncompleteError, InputError
from lightning_sft.common.pages import embed_json
from lightning_sft.judging.judge import JudgeConfig
from lightning_sft.judging.score import score_responses
from lightning_sft.reporting import answers_table, report_page
from lightning_sft.reporting.charts import bar_chart, line_chart
from lightning_sft.reporting.report import collect, report
from lightning_sft.runs.responses import RESPONSES_NAME
from support.judge_server import JudgeServer

EVIL = (
    '</script><script>pwned()</script><img src="http://evil/x" onerror="pwned()"> & '
    "<!--slot:data-->"
)
ENTRIES = [
    {"instruction": "Name a colour.", "input": "", "output": "Red.", "model_response": "Red."},
    {"instruction": EVIL, "input": EVIL, "output": EVIL, "model_response": EVIL + "!"},
    {"instruction": "Add.", "input": "2 and 2", "output": "Four.", "model_response": ""},
    {"instruction": "Say hi.", "input": "", "output": "Hi.", "model_response": "Hello."},
]
METRICS = """step,epoch,train_loss,val_loss,val_perplexity,lr,tokens_per_second,tokens_seen
1,0,2.5,,,1e-5,900,512
2,0,2.0,,,5e-5,1000,1024
2,0,,1.9,6.686,,,
3,1,nan,,,5e-5,1100,1536
3,1,,1.5,4.482,,,
4,1,1.
"""
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PARTS = {
    "metrics.csv": METRICS,
    "samples.jsonl": json.dumps({"epoch": 0, "step": 2, "instruction": "Add.", "response": EVIL}),
    RESPONSES_NAME: json.dumps(ENTRIES),
    "config.yaml": f"seed_everything: 123\nnote: '{EVIL}'\n",
    "versions.json": '{"torch": "2.13.0"}',
}


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "runs" / "tiny" / "version_0"
    folder.mkdir(parents=True)
    for name, text in PARTS.items():
        (folder / name).write_text(text)
    return folder


def add_scores(run: Path) -> None:
    replies = ["90", f"60 or 70, because {EVIL}", "70"]
    with JudgeServer("ollama", replies) as server, pytest.raises(IncompleteError):
        score_responses(run, JudgeConfig(url=server.url), controls=0)


def page_of(run: Path) -> Page:
    return Page((run / "report.html").read_text())


def test_report_of_a_whole_run(run, capsys):
    add_scores(run)
    report(run)
    assert capsys.readouterr().out.rstrip().endswith(f"Report: {run / 'report.html'}")
    text = page_of(run).text
    for words in (
        "tiny/version_0",
        "Average score",
        "53.33",  # (90 + 70 + 0 for the empty one) / 3
        "Not scored: 2 numbers",
        "Validation loss",
        "1.500",
        "Learning rate",
        "Samples over the epochs",
        "epoch 0, step 2",
        "ROUGE-L",
        "Whether the judge is informative is not known",
        "seed_everything: 123",
        "2.13.0",
    ):
        assert words in text, words
    found = json.loads((run / "report.json").read_text())
    assert found["scores"]["scored"] == 3
    assert [answer["score"] for answer in found["answers"]] == [90, None, 0, 70]
    assert found["training"]["val_loss"] == [[2.0, 1.9], [3.0, 1.5]]
    # Neither the NaN nor the torn last line is a point.
    assert found["training"]["train_loss"] == [[1.0, 2.5], [2.0, 2.0], [4.0, 1.0]]


@pytest.mark.parametrize("missing", PARTS)
def test_report_without_a_part(run, missing):
    (run / missing).unlink()
    report(run)
    assert json.loads((run / "report.json").read_text())["notes"] == []


@pytest.mark.parametrize("only", PARTS)
def test_report_of_a_single_part(run, only):
    for name in PARTS:
        if name != only:
            (run / name).unlink()
    report(run)
    page = page_of(run)
    assert ("table", {"id": "answers"}) in page.tags or only != RESPONSES_NAME


def test_offline_run_has_figures_without_a_judge(run):
    report(run)
    found = json.loads((run / "report.json").read_text())
    assert found["scores"] is None
    assert found["metrics"]["exact_match"]["mean"] == 50.0  # two of four
    assert "Average score" not in page_of(run).text
    assert "ROUGE-L" in page_of(run).text


def test_picture_stands_in_for_missing_metrics(run):
    (run / "metrics.csv").unlink()
    (run / "loss-curve.png").write_bytes(PNG)
    report(run)
    images = [attrs["src"] for tag, attrs in page_of(run).tags if tag == "img"]
    assert images == ["data:image/png;base64," + base64.b64encode(PNG).decode()]


EVALUATED = {"task": "arc", "metric": "acc", "value": 0.5, "stderr": 0.1, "samples": 9, "shots": 0}
SCORED = {"index": 0, "kind": "answer", "repeat": 0, "score": 5, "reason": None, "reply": "5"}
SCORED |= dict.fromkeys(("instruction", "input", "output", "response", "prompt", "key"), "text")
SCORED |= {"scale": [0, 100], "judge": {}, "options": {}, "seconds": 0.5}
WRONG = ({"score": "5"}, {"options": []}, {"scale": [0]}, {"judge": None}, {"input": [0]})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (RESPONSES_NAME, "[{"),
        ("versions.json", "{"),
        ("samples.jsonl", "{\n{}\n"),
        ("scores.jsonl", '{"key": "a"}\n'),
        ("config.yaml", b"\xff\xfe\x00"),
        ("metrics.csv", b"\xff\xfe"),
        ("metrics.csv", "step,val_loss\n1," + "9" * 200_000),  # longer than csv takes a field
        ("versions.json", "[" * 100_000),
        ("evaluation.json", "[" * 100_000),
        ("evaluation.json", json.dumps([EVALUATED | {"value": "high"}])),
        ("evaluation.json", json.dumps([EVALUATED | {"stderr": "low"}])),
        ("loss-curve.png", b"root:x:0:0:root"),
        *(("scores.jsonl", json.dumps(SCORED | change)) for change in WRONG),
    ],
)
def test_damaged_part_is_named_and_left_out(run, name, content):
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode() + b"\n")
    report(run)
    notes = json.loads((run / "report.json").read_text())["notes"]
    assert [note.split(" is left out")[0] for note in notes] == [name]
    assert notes[0] in page_of(run).text


@pytest.mark.parametrize("name", [*PARTS, "scores.jsonl", "evaluation.json", "loss-curve.png"])
def test_a_link_out_of_the_run_is_not_followed(run, tmp_path, name):
    """Who passes a run folder on must not make others' reports show their own files."""
    (tmp_path / "private").write_bytes(PNG + b"PLANTED" if name.endswith("png") else b"PLANTED")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "private")
    report(run)
    found = json.loads((run / "report.json").read_text())
    assert found["notes"] == [f"{name} is left out: it is a link that leaves the run folder"]
    for written in ("report.html", "report.json"):
        text = (run / written).read_text()
        assert "PLANTED" not in text
        assert base64.b64encode(PNG).decode()[:40] not in text


def test_a_link_within_the_run_is_followed(run, tmp_path):
    (run / "metrics.csv").rename(run / "kept.csv")
    (run / "metrics.csv").symlink_to("kept.csv")
    (tmp_path / "alias").symlink_to(run)  # nor does it matter how the folder itself is reached
    report(tmp_path / "alias")
    found = json.loads((run / "report.json").read_text())
    assert (found["notes"], len(found["training"]["train_loss"])) == ([], 3)


@pytest.mark.timeout(20)
def test_a_pipe_in_the_run_is_not_waited_for(run):
    (run / "metrics.csv").unlink()
    os.mkfifo(run / "metrics.csv")
    report(run)
    notes = json.loads((run / "report.json").read_text())["notes"]
    assert notes == [f"metrics.csv is left out: {run / 'metrics.csv'}: not a regular file"]


def test_a_long_table_is_in_pages(run, monkeypatch):
    monkeypatch.setattr(answers_table, "PAGE", 3)
    add_scores(run)
    report(run)
    page = page_of(run)
    rows = [attrs for tag, attrs in page.tags if tag == "tr" and "data-score" in attrs]
    assert [row["data-index"] for row in rows] == ["1", "2", "3"]  # the worst three of four
    assert "3 of 4" in page.text
    data = json.loads((run / "report.html").read_text().split('id="data">')[1].split("</script")[0])
    assert data["page"] == 3
    assert [row[0] for row in data["rows"]] == [1, 2, 3, 0]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the peak")
def test_100_000_answers_fit_into_a_gigabyte(tmp_path):
    """In a process of its own, for its peak of memory. The aim for its time is half a minute."""
    entries = [
        ENTRIES[0] | {"instruction": f"Task {i}", "model_response": f"Red {i % 97} and {i % 89}."}
        for i in range(100_000)
    ]
    (tmp_path / RESPONSES_NAME).write_text(json.dumps(entries))
    program = (
        "import sys; from pathlib import Path; from lightning_sft.reporting.report import report;"
        "report(Path(sys.argv[1]));"
        # Not ru_maxrss, in which the memory of the process that started this one counts.
        "peak = Path('/proc/self/status').read_text().split('VmHWM:')[1]; print(peak.split()[0])"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(out.split()[-1]) < 1_000_000  # KiB


def test_no_run_at_all(tmp_path):
    with pytest.raises(InputError, match="no such run folder"):
        report(tmp_path / "missing")
    with pytest.raises(InputError, match="holds no part of a run"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_responses_file_stands_for_its_folder(run, tmp_path):
    report(run / RESPONSES_NAME, output=tmp_path / "page.html")
    assert (tmp_path / "page.html").exists()
    assert (tmp_path / "page.json").exists()


def test_page_is_escaped_and_loads_nothing(run):
    add_scores(run)
    report(run)
    check_harmless((run / "report.html").read_text())
    assert EVIL + "!" in page_of(run).text  # shown as it was written


def check_harmless(text: str) -> None:
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2  # the data and the page's own
    assert not {"iframe", "object", "embed", "link", "base", "form"} & set(tags)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style"
            if name in ("src", "href", "action"):
                assert value.startswith("data:"), (tag, value)
    assert "url(" not in text
    assert "@import" not in text


def test_negative_control_without_escaping_the_check_fails(run, monkeypatch):
    monkeypatch.setattr(answers_table, "escape", lambda text: text)
    report(run)
    with pytest.raises(AssertionError):
        check_harmless((run / "report.html").read_text())


def test_policy_names_the_hash_of_what_the_page_holds(run):
    report(run)
    text = (run / "report.html").read_text()
    policy = next(a["content"] for t, a in Page(text).tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    for kind, pattern in (
        ("script", r"<script>(.*?)</script>"),
        ("style", r"<style>(.*?)</style>"),
    ):
        content = re.findall(pattern, text, re.DOTALL)[-1].encode()
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_data_cannot_end_its_script():
    embedded = embed_json({"text": EVIL})
    assert "<" not in embedded
    assert json.loads(embedded) == {"text": EVIL}


def test_key_in_a_config_goes_no_further(run):
    (run / "config.yaml").write_text("judge:\n  api_key: sk-planted0123456789abcdef\n")
    report(run)
    for name in ("report.html", "report.json"):
        assert "sk-planted" not in (run / name).read_text()
    assert "***" in page_of(run).text


def test_worst_comes_first(run):
    add_scores(run)
    report(run)
    rows = [attrs for tag, attrs in page_of(run).tags if tag == "tr" and "data-score" in attrs]
    assert [float(row["data-score"]) for row in rows] == [-1, 0, 70, 90]


def test_report_is_written_atomically(run, monkeypatch):
    report(run)
    before = (run / "report.html").read_text()
    monkeypatch.setattr(report_page, "build_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(run)
    assert (run / "report.html").read_text() == before


# --- charts --------------------------------------------------------------------------------------


def numbers_of(figure: str, tag: str, attribute: str) -> list[str]:
    root = xml.etree.ElementTree.fromstring(figure)
    return [element.get(attribute) or "" for element in root.iter(tag)]


def test_line_chart_places_points_inside_and_in_order():
    figure = line_chart("Loss", {"train": [(0, 4.0), (1, 2.0), (2, 1.0)]}, "step")
    spots = [
        tuple(map(float, p.split(","))) for p in numbers_of(figure, "polyline", "points")[0].split()
    ]
    assert [x for x, _ in spots] == sorted(x for x, _ in spots)
    assert [y for _, y in spots] == sorted(y for _, y in spots)  # falling loss, growing y
    assert all(0 <= x <= 400 and 0 <= y <= 230 for x, y in spots)


@pytest.mark.parametrize(
    "points",
    [
        [(1, 2.0)],
        [(1, 0.0), (2, 0.0)],
        [(5, 1e-9), (5, 1e12)],
        [(k, k % 7) for k in range(9999)],
        [(1, 1e-14), (2, 3e-14)],
        [(1, 5e99), (2, -5e99)],
        [(0, 1.0), (1, 1e308), (2, -1e308), (1e300, 2.0)],
    ],
)
def test_line_chart_at_the_edges(points):
    figure = line_chart("x", {"a": points, "empty": []}, "step")
    xml.etree.ElementTree.fromstring(figure)
    assert len(figure) < 40_000


def test_charts_of_nothing_are_nothing():
    assert line_chart("x", {"a": [], "b": [(1, float("nan"))]}, "step") == ""
    assert bar_chart("x", [("0", 0)], "score") == ""


def test_bar_chart_heights_are_in_proportion():
    figure = bar_chart("x", [("a", 1), ("b", 4), ("c", 0)], "score")
    heights = [float(h) for h in numbers_of(figure, "rect", "height")]
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.01)
    assert heights[2] == 0


# --- start ---------------------------------------------------------------------------------------

HEAVY = ("torch", "lightning", "sklearn", "scipy", "matplotlib", "pandas", "nltk")


def imports_of(arguments: list[str]) -> tuple[set[str], float]:
    """Modules that a Python command imports, and the processor seconds that it takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-500:]
    names = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    return names, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_report_needs_no_torch_and_starts_within_a_second(run):
    """Processor time, since the clock on a busy machine says nothing about the program."""
    program = (
        "import sys; from pathlib import Path; from lightning_sft.reporting.report import report;"
    )
    names, seconds = imports_of(["-c", program + "report(Path(sys.argv[1]))", str(run)])
    assert not names & set(HEAVY)
    assert "lightning_sft.reporting.report" in names
    assert seconds < 1.5  # importtime itself costs some


def test_score_help_needs_no_torch_and_starts_within_a_second():
    names, seconds = imports_of(["-m", "lightning_sft", "score", "--help"])
    assert not names & {*HEAVY, "requests"}
    assert seconds < 1.5


def test_collect_does_not_write(run):
    before = sorted(path.name for path in run.iterdir())
    collect(run)
    assert sorted(path.name for path in run.iterdir()) == before
