"""What the front page shows runs as it stands, in an empty folder."""

import os
import re
from configparser import ConfigParser
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def snippet(number=0):
    "The loop of a trainer, and the drop-in for TRL (tests/test_trl.py runs it)."
    drop_in, loop = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    return (loop, drop_in)[number]


def test_the_loop_of_the_front_page_learns_with_r3(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(compile(snippet(), "README.md", "exec"), names)
    assert torch.isfinite(names["loss"]) and names["advantage"].abs().sum() > 0
    # the first update starts at pi_old, so later ones have moved away from it
    assert names["stats"]["staleness/k3"] > 0
    assert not os.listdir(tmp_path)


def test_replay_surrounds_the_computation_of_logp_old():
    "That is what sets R3 apart from R2: without it `logp_old` belongs to other experts."
    code, names = snippet(), {}
    broken = code.replace(
        "with routing.replay(model, rollout.routes, rollout.routes_valid), torch.no_grad():",
        "with torch.no_grad():",
    )
    assert broken != code
    exec(compile(code.partition("for update")[0], "README.md", "exec"), names)
    replayed = names["logp_old"]
    exec(compile(broken.partition("for update")[0], "README.md", "exec"), names)
    mask = names["rollout"].response_mask
    # E4M3 flips some experts on the cold start: their tokens differ by far more than a rounding
    assert (replayed - names["logp_old"])[mask].abs().max() > 1e-3


def test_the_citation_is_of_this_version_and_names_the_paper():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini")
    settings = config["DEFAULT"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == settings["version"]
    assert citation["authors"] == [{"name": settings["author"]}]
    assert citation["repository-code"] == settings["git_url"]
    (paper,) = citation["references"]
    readme = README.read_text(encoding="utf-8")
    assert paper["title"] in readme and paper["url"].endswith("2512.01374")
    names = re.search(r"author = \{(.*?)\}", readme, re.S)[1]
    assert [" ".join(name.split()) for name in names.split(" and")] == (
        [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    )
