"""Local copies of published sets for tests, with the keys of two exams.

Also a tokenizer with a chat template, and an engine that answers rightly as often as it is told.
"""

import json

import pytest
import torch

from minirl_nb.batch import Rollout
from minirl_nb.benchmarks import SETS

# the answer keys of the exams, as published by their organiser
AIME24 = [
    204,
    25,
    809,
    116,
    104,
    294,
    540,
    197,
    480,
    113,
    371,
    385,
    110,
    104,
    721,
    73,
    236,
    45,
    33,
    80,
    55,
    699,
    127,
    902,
    468,
    601,
    23,
    321,
    211,
    315,
]


AIME25 = [
    70,
    588,
    16,
    117,
    279,
    504,
    821,
    77,
    62,
    81,
    259,
    510,
    204,
    60,
    735,
    468,
    49,
    82,
    106,
    336,
    293,
    237,
    610,
    149,
    907,
    113,
    19,
    248,
    104,
    240,
]


def mirror(root, name, rows, commit=None, form="parquet"):
    """A local copy of a published set, in the folder layout of `hf download` (with its README and
    notes of the commit), or as `save_to_disk` writes it."""
    import datasets

    entry = SETS[name]
    folder = root / entry.path
    data = datasets.Dataset.from_list(rows)
    if form == "disk":
        datasets.DatasetDict({entry.split: data}).save_to_disk(str(folder))
        return folder
    (folder / "data").mkdir(parents=True)
    data.to_parquet(str(folder / "data" / f"{entry.split}-00000-of-00001.parquet"))
    config = {
        "config_name": entry.config or "default",
        "data_files": [{"split": entry.split, "path": f"data/{entry.split}-*.parquet"}],
    }
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps([config])}\n---\n")
    if commit:
        notes = folder / ".cache" / "huggingface" / "download" / "data"
        notes.mkdir(parents=True)
        (notes / f"{entry.split}-00000-of-00001.parquet.metadata").write_text(
            f"{commit}\netag\n1700000000.0\n"
        )
    return folder


def exam(key, column=str):
    return [
        {
            "problem": f"Made-up problem {i}: find the number that is ${a}$ more than nothing.",
            "answer": column(a),
            "solution": "...",
        }
        for i, a in enumerate(key)
    ]


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)


def tokenizer(template=TEMPLATE):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, clean_up_tokenization_spaces=False)
    fast.chat_template = template
    return fast


class Stub:
    """An engine that answers each prompt rightly in a known share of its samples."""

    version = 0

    def __init__(self, task, tok, share):
        everything = [*task.problems, *(p for b in task.benchmarks.values() for p in b)]
        self.known = {tuple(task.encode(p, tok)): (p, share(p)) for p in everything}
        self.tok, self.calls = tok, []

    def generate(self, prompts, sampling):
        self.calls.append(sampling)
        rows, group = [], []
        for g, prompt in enumerate(prompts):
            problem, share = self.known[tuple(prompt)]
            for k in range(sampling.n):
                right = k < round(share * sampling.n)
                rows.append(
                    (
                        prompt,
                        self.tok(rf"I think \boxed{{{problem.answer if right else '-1'}}}")[
                            "input_ids"
                        ],
                    )
                )
                group.append(g)
        order = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(0)
        )  # an engine need not keep the order
        rows, group = [rows[i] for i in order], torch.tensor(group)[order]
        width = max(len(p) + len(r) for p, r in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for b, (p, r) in enumerate(rows):
            tokens[b, : len(p) + len(r)] = torch.tensor([*p, *r])
        size = (
            torch.tensor([len(p) for p, _ in rows]),
            torch.tensor([len(p) + len(r) for p, r in rows]),
        )
        return Rollout(
            tokens,
            *size,
            torch.zeros(len(rows), width),
            group,
            torch.ones(len(rows), dtype=torch.bool),
        )


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch, tmp_path):
    monkeypatch.delenv("MINIRL_DATA", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before
