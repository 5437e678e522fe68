"""What a call of an engine is made of: settings, end tokens, random streams, the choice."""

from types import SimpleNamespace

import pytest
import torch

from minirl_nb.decoding import RequestStreams, Sampling, choose, end_tokens, padding_token
from minirl_nb.exact import floored
from minirl_nb.vllm.requests import request_parameters


@pytest.mark.parametrize(
    "bad",
    [dict(n=0), dict(max_new_tokens=0), dict(temperature=-1.0), dict(temperature=float("nan"))],
)
def test_bad_sampling(bad):
    with pytest.raises(ValueError):
        Sampling(**bad)


def model_with(**tokens):
    return SimpleNamespace(generation_config=SimpleNamespace(**tokens))


def test_end_tokens_are_those_of_model_and_tokenizer_or_exactly_the_named_ones():
    model, tokenizer = model_with(eos_token_id=[15, 14]), SimpleNamespace(eos_token_id=14)
    assert end_tokens(model) == [15, 14] and end_tokens(model_with(eos_token_id=3)) == [3]
    assert end_tokens(model, SimpleNamespace(eos_token_id=13)) == [15, 14, 13]
    assert end_tokens(model, tokenizer) == [15, 14]  # each once
    assert end_tokens(model, tokenizer, 7) == [7] and end_tokens(model, tokenizer, [8, 9]) == [8, 9]
    with pytest.raises(ValueError, match="no end token"):
        end_tokens(model_with(eos_token_id=None), SimpleNamespace(eos_token_id=None))


def test_padding_is_the_named_token_the_tokenizers_the_models_or_an_end_token():
    model = model_with(eos_token_id=15, pad_token_id=0)
    tokenizer = SimpleNamespace(eos_token_id=13, pad_token_id=3)
    assert padding_token(model, tokenizer, 5) == 5
    assert padding_token(model, tokenizer) == 3 and padding_token(model) == 0
    assert padding_token(model_with(eos_token_id=None), None, None, [9, 8]) == 9


def test_a_request_draws_the_same_numbers_in_whatever_company():
    "Its stream is keyed by (seed, number): neither the other requests nor the order of asking count."
    together, alone = RequestStreams(3, 0, 5, "cpu"), RequestStreams(3, 4, 1, "cpu")
    request, age = torch.tensor([4, 4, 4]), torch.tensor([0, 31, 200])
    later = alone.at(torch.zeros(3, dtype=torch.long), age, 200)
    early = [together.at(request[i : i + 1], age[i : i + 1], int(age[i])) for i in range(3)]
    assert torch.equal(torch.cat(early), later) and ((later >= 0) & (later < 1)).all()
    other = RequestStreams(4, 4, 1, "cpu").at(torch.zeros(3, dtype=torch.long), age, 200)
    assert not (other == later).any()


def test_choose_never_takes_what_has_no_probability():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(1001, 4)
    token, logp = choose(logits, torch.linspace(0, 1 - 1e-16, 1001, dtype=torch.float64), 1.0)
    assert set(token.tolist()) == {0, 2} and torch.isfinite(logp).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_choose_inverts_the_distribution_and_gives_its_log_probability(temperature):
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]])
    p = (logits[0].double() / temperature).softmax(0)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    token, logp = choose(logits.expand(10_000, 4), u, temperature)
    # a grid of 10,000 points meets each of four intervals within one point at both ends
    assert (torch.bincount(token, minlength=4) / 10_000 - p).abs().max() < 2e-4
    # float32 log-softmax of numbers below 4: some roundings of 2^-22
    assert (logp.double() - p.log()[token]).abs().max() < 1e-6
    assert choose(logits, torch.tensor([0.0]), 0.0)[0].item() == 2


def test_a_floor_is_sampled_and_reported():
    """(1 - floor) p + floor / V, as `exact.floored` has it: the shares of many draws are these
    probabilities, and log-probabilities are their logarithms."""
    p = torch.tensor([[0.9, 0.1, 0.0, 0.0]])
    mixed = 0.8 * p[0] + 0.2 / 4
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    token, logp = choose(p.log().expand(10_000, 4), u, 1.0, floor=0.2)
    # a token's share of an even grid is its probability within one point of the grid
    assert (torch.bincount(token, minlength=4) / 10_000 - mixed).abs().max() <= 1e-4
    torch.testing.assert_close(logp.exp(), mixed[token])
    torch.testing.assert_close(floored(p.log(), 0.2)[0].exp(), mixed)
    for wrong in ({"floor": 1.0}, {"floor": -0.1}, {"floor": 0.1, "temperature": 0.0}):
        with pytest.raises(ValueError, match="floor"):
            Sampling(**wrong)
    with pytest.raises(ValueError, match="vLLM knows no floor"):
        request_parameters(Sampling(floor=0.1), end_tokens=[1], prompts=1)
