"""Configuration: recipes, command-line words, sections that check themselves, a text for every field."""

import pytest
import yaml

from minirl_nb.checks import objective_of
from minirl_nb.cli import main
from minirl_nb.config import config_yaml, load_config, recipes


def test_config_survives_yaml():
    c = load_config(
        None,
        {
            "optimizer.betas": [0.8, 0.9],
            "task.benchmarks": {"mine": "a.jsonl"},
            "objective.clip_low": 0.1,
            "threads": 2,
        },
    )
    path = "config.yaml"
    tree = yaml.safe_load(config_yaml(c))
    assert tree["optimizer"]["betas"] == [0.8, 0.9] and tree["task"]["benchmarks"] == {
        "mine": "a.jsonl"
    }, path
    assert load_config(None, tree) == c


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--optimiser.lr", "1"], "unknown key 'optimiser.lr'; did you mean 'optimizer.lr'?"),
        (["--lr", "1"], "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        (["--optimizer.lr", "fast"], "optimizer.lr cannot be 'fast'; it must be a number"),
        (["--objective.preset", "ppo"], "must be one of minirl, "),
        (["--steps"], "--steps needs a value"),
        (["--steps", "1.5"], "steps cannot be '1.5'; it must be a whole number"),
        (["steps", "3"], "'steps' does not belong to an option"),
    ],
)
def test_command_line_errors_are_one_sentence(words, sentence):
    with pytest.raises(ValueError) as e:
        load_config(None, words)
    assert sentence in str(e.value) and "\n" not in str(e.value)


def test_recipe_errors(tmp_path):
    path = tmp_path / "r.yaml"
    for text, sentence in (
        ("a: [", "not YAML"),
        ("- 1", "a mapping"),
        ("optimizer: {rate: 1}", "unknown key 'optimizer.rate'"),
        ("steps: many", "steps cannot be 'many'"),
        ("step: 3", "did you mean 'steps'?"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="r.yaml") as e:
            load_config(path)
        assert sentence in str(e.value)
    with pytest.raises(FileNotFoundError, match="there is no recipe nope"):
        load_config("nope")
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="not YAML"):
        load_config(path)


def test_every_recipe_is_a_config():
    assert recipes()
    for path in recipes().values():
        config = load_config(path)
        objective_of(config)
        assert config.steps % config.batch.updates == 0


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"rollout.responses": 1}, "a group of one response has no baseline"),
        ({"batch.rollout_prompts": 6, "batch.updates": 4}, "does not divide the 6 prompts"),
        ({"steps": 0}, "steps is 0; it must be positive"),
        ({"optimizer.lr": 0}, "optimizer.lr is 0.0"),
        ({"rollout.temperature": 0}, "rollout.temperature is 0.0"),
        ({"output.keep": 0}, "output.keep is 0"),
        ({"rollout.floor": 1.0, "rollout.probe": 0}, "rollout.floor is 1.0; it must lie in"),
        ({"rollout.floor": 0.1}, "the parity probe does not"),
        (
            {"rollout.floor": 0.1, "rollout.probe": 0, "rollout.engine": "vllm"},
            "which the torch engine alone knows",
        ),
    ],
)
def test_a_section_refuses_its_own_nonsense(changes, sentence, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(changes))
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("minirl: ") and error.count("\n") == 1
