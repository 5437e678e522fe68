"""Random batches for the tests of weights, clipping and objective."""

from dataclasses import dataclass, fields, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# derandomised: a failure found once is found by everyone
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


@dataclass
class Batch:
    logp: Tensor  # [B, T]
    logp_old: Tensor  # [B, T]
    logp_mu: Tensor  # [B, T]
    advantage: Tensor  # [B]
    response_mask: Tensor  # bool [B, T]

    def named(self, *names, **changes):
        "The tensors by name, to be passed by keyword; all of them where no name is given."
        names = names or [f.name for f in fields(self)]
        return {name: getattr(self, name) for name in names} | changes

    def policies(self, **changes):
        "Everything but the advantage."
        return self.named("logp", "logp_old", "logp_mu", "response_mask", **changes)

    def clip(self, **changes):
        "What a clip looks at."
        return self.named("logp", "logp_old", "advantage", "response_mask", **changes)

    def map(self, f):
        return Batch(**{name: f(x) for name, x in self.named().items()})

    def to(self, dtype):
        return replace(self.map(lambda x: x.to(dtype)), response_mask=self.response_mask)

    def rows(self, index):
        return self.map(lambda x: x[index])

    def padded(self, columns, junk):
        "Columns of `junk` behind the responses, off the mask."

        def grow(x):
            if x.ndim == 1:
                return x
            fill = False if x.dtype == torch.bool else junk
            return torch.cat([x, torch.full((len(x), columns), fill, dtype=x.dtype)], 1)

        return self.map(grow)


def make(seed: int, B: int = 6, T: int = 7, shift: float = 0.5) -> Batch:
    """B responses of random length behind prompts of random length; log-ratios of deviation
    `shift`, float64.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    logp_mu = -normal(B, T).abs()
    logp_old = logp_mu + shift * normal(B, T)
    logp = logp_old + shift * normal(B, T)
    start = torch.randint(0, T, (B, 1), generator=g)
    stop = start + 1 + torch.randint(0, T, (B, 1), generator=g)
    t = torch.arange(T)
    advantage = normal(B)
    advantage[torch.rand(B, generator=g) < 0.2] = 0.0
    return Batch(logp, logp_old, logp_mu, advantage, (t >= start) & (t < stop))


batches = st.builds(
    make,
    seed=st.integers(0, 2**31),
    B=st.integers(1, 8),
    T=st.integers(1, 9),
    shift=st.sampled_from([0.0, 0.1, 0.5, 3.0]),
)
