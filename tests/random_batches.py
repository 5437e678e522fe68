"""Random batches for the tests of weights, clipping and objective."""
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# derandomised: a failure found once is found by everyone
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


@dataclass
class Batch:
    logp: Tensor
    logp_old: Tensor
    logp_mu: Tensor
    advantage: Tensor
    mask: Tensor

    def __iter__(self): return iter((self.logp, self.logp_old, self.logp_mu, self.advantage, self.mask))

    def to(self, dtype): return Batch(*(x.to(dtype) for x in (self.logp, self.logp_old, self.logp_mu, self.advantage)), self.mask)

    def rows(self, index): return Batch(*(x[index] for x in self))

    def padded(self, columns, junk):
        grow = lambda x: torch.cat([x, torch.full((len(x), columns), junk, dtype=x.dtype)], 1)
        return Batch(grow(self.logp), grow(self.logp_old), grow(self.logp_mu), self.advantage,
                     torch.cat([self.mask, torch.zeros(len(self.mask), columns, dtype=torch.bool)], 1))


def make(seed: int, B: int = 6, T: int = 7, shift: float = 0.5) -> Batch:
    "B responses of random length (prompts of random length before them); log-ratios of standard deviation `shift`, float64."
    g = torch.Generator().manual_seed(seed)
    normal = lambda *s: torch.randn(*s, dtype=torch.float64, generator=g)
    logp_mu = -normal(B, T).abs()
    logp_old = logp_mu + shift * normal(B, T)
    logp = logp_old + shift * normal(B, T)
    start = torch.randint(0, T, (B, 1), generator=g)
    stop = start + 1 + torch.randint(0, T, (B, 1), generator=g)
    t = torch.arange(T)
    advantage = normal(B)
    advantage[torch.rand(B, generator=g) < 0.2] = 0.0
    return Batch(logp, logp_old, logp_mu, advantage, (t >= start) & (t < stop))


batches = st.builds(make, seed=st.integers(0, 2**31), B=st.integers(1, 8), T=st.integers(1, 9), shift=st.sampled_from([0.0, 0.1, 0.5, 3.0]))
