"""The report: one file that asks for nothing outside it and shows what is in the logs."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from minirl_nb.cli import main
from minirl_nb.dashboard import accuracies, charts, config_differences, report_html
from minirl_nb.logs import read_log
from minirl_nb.metrics import metric

pytest.importorskip("bokeh")


class Page(HTMLParser):
    "What a file would load, and its text by tag."

    def __init__(self, text):
        super().__init__()
        self.loaded, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [v for k, v in attributes if k in ("src", "href", "srcset") and v]


@pytest.fixture(scope="module")
def long_run(finished, tmp_path_factory):
    "1,000 steps: the finished run again and again."
    folder = tmp_path_factory.mktemp("long") / "run"
    shutil.copytree(finished.folder, folder, ignore=shutil.ignore_patterns("checkpoints"))
    steps = finished.steps()
    rows = [steps[i % 8] | {"step": i + 1, "rollout_step": i // 2 + 1} for i in range(1000)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_thousand_steps_make_a_file_of_a_few_megabytes(long_run, tmp_path, capsys):
    assert main(["report", str(long_run), "--output", str(tmp_path / "r.html")]) == 0
    assert str(tmp_path / "r.html") in capsys.readouterr().out
    assert (tmp_path / "r.html").stat().st_size < 2_000_000


def test_nothing_is_loaded_from_outside(finished):
    page = Page(report_html([read_log(finished.folder)]))
    assert page.loaded == ["data:,"] and "iframe" not in page.tags


def test_charts_hold_the_numbers_of_the_log(finished):
    log = read_log(finished.folder)
    drawn = {c.title.text: c for c in charts([log, log])}
    entropy = drawn["Token entropy"].renderers
    assert len(entropy) == 2
    values = entropy[0].data_source.data["entropy"]
    assert values == pytest.approx([row["entropy"] for row in log.steps], rel=1e-6)
    title = f"{metric('discrepancy/flip_by_layer').title.capitalize()}: {log.name}"
    (image,) = drawn[title].renderers[0].data_source.data["image"]
    assert image.shape == (3, 8)
    assert image[:, 0] == pytest.approx(log.steps[0]["discrepancy/flip_by_layer"], rel=1e-6)


def test_accuracies_have_the_intervals_of_the_evaluations(finished):
    found = accuracies(read_log(finished.folder))
    assert set(found) == {"rollout", "train"}
    for numerics, rows in found.items():
        assert [step for step, *_ in rows] == sorted(finished.evaluations)
        for step, mean, low, high in rows:
            result = finished.evaluations[step][numerics]
            assert mean == result.accuracy() and (low, high) == result.interval()


def test_samples_show_every_token(finished):
    text = report_html([read_log(finished.folder)])
    samples = json.loads((finished.folder / "samples" / "step_000004.json").read_text())
    assert len(samples) == 8
    for sample in samples:
        n = len(sample["tokens"])
        assert n == len(sample["log_ratio"]) == len(sample["flips"]) and sample["layers"] == 3
    marked = sum(f > 0 for f in (x for s in samples for x in s["flips"]))
    assert marked and text.count("routes flipped in") >= marked


def test_a_log_of_others_has_a_report_too(tmp_path):
    row = {"step": 1, "data": {"critic/score/mean": 0.5, "actor/entropy": 0.3}}
    lines = [json.dumps(row | {"step": i}) for i in range(1, 9)]
    (tmp_path / "run.jsonl").write_text("\n".join(lines))
    log = read_log(tmp_path / "run.jsonl")
    assert [c.title.text for c in charts([log])] == ["Training reward", "Token entropy"]
    assert "logged by" in report_html([log])


def test_names_are_escaped(finished):
    from dataclasses import replace

    log = replace(read_log(finished.folder), name="<script>alert(1)</script>")
    assert "<script>alert(1)" not in report_html([log])


def test_settings_that_differ(finished):
    from dataclasses import replace

    a = read_log(finished.folder)
    output = replace(a.config.output, folder="elsewhere")
    b = replace(a, config=replace(a.config, seed=7, output=output))
    assert config_differences([a, b]) == {"seed": [0, 7]}
    assert config_differences([a, a]) == {}


def test_without_bokeh_one_sentence_says_how_to_get_it(finished, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "bokeh.plotting", None)
    assert main(["report", str(finished.folder), "--output", "nowhere.html"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'minirl_nb[report]'" in err and err.count("\n") == 1


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_a_browser_draws_it(long_run, tmp_path):
    "Headless chromium draws what is in view, without an error on the console."
    path = tmp_path / "report.html"
    path.write_text(report_html([read_log(long_run)]), encoding="utf-8")
    options = (
        "--headless --no-sandbox --disable-gpu --enable-logging=stderr --virtual-time-budget=30000"
    )
    folder = f"--user-data-dir={tmp_path / 'profile'}"
    words = ["chromium", *options.split(), folder, "--dump-dom", path.as_uri()]
    p = subprocess.run(words, capture_output=True, text=True, timeout=120)
    said = [line for line in p.stderr.splitlines() if "CONSOLE" in line]
    assert any("document idle" in line for line in said), said
    assert not any(word in line for line in said for word in ("Error", "Uncaught")), said
    assert "bk-Figure" in p.stdout
