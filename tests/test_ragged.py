"""Rows without padding against lists of rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl_nb.ragged import Ragged


def ragged(lengths, dtype=torch.uint8, shape=(3, 2), seed=0):
    n = sum(lengths)
    values = torch.randint(
        0,
        1000 if dtype == torch.uint16 else 200,
        (n, *shape),
        generator=torch.Generator().manual_seed(seed),
    )
    return Ragged(values.to(dtype), torch.tensor(lengths, dtype=torch.int64))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.float32, torch.int64, torch.bool]
)
@given(lengths=st.lists(st.integers(0, 9), max_size=12), data=st.data())
@settings(max_examples=40, deadline=None)
def test_ragged_agrees_with_lists_of_rows(dtype, lengths, data):
    r = ragged(lengths, dtype)
    lists = [x.tolist() for x in r.rows()]
    assert len(r) == len(lengths) == len(lists) and [len(x) for x in lists] == lengths
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8)) if lengths else []
    s = r.select(rows)
    assert s.dtype == dtype and [x.tolist() for x in s.rows()] == [lists[b] for b in rows] == [
        r[b].tolist() for b in rows
    ]
    width = max(lengths, default=0) + data.draw(st.integers(0, 3))
    padded = r.padded(width)
    assert padded.shape == (len(lengths), width, 3, 2) and padded.dtype == dtype
    back = Ragged.pack(padded, r.length)
    assert (
        torch.equal(back.values, r.values)
        and torch.equal(back.length, r.length)
        and back.dtype == dtype
    )
    for x, n in zip(padded, lengths):
        assert not x[n:].bool().any()
    both = Ragged.cat([r, s])
    assert [x.tolist() for x in both.rows()] == lists + [lists[b] for b in rows]
    empty, order = (
        Ragged.zeros(r.length, (3, 2), dtype),
        torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1)),
    )
    empty.put_(order, r.select(order))
    assert torch.equal(empty.values, r.values)


def test_ragged_refuses_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="add up to 5, but there are 4"):
        Ragged(torch.zeros(4), torch.tensor([2, 3]))
    with pytest.raises(ValueError, match="lengths"):
        Ragged(torch.zeros(1), torch.tensor([2, -1]))
    with pytest.raises(ValueError, match="T = 3 is less than the longest row, 4"):
        ragged([4, 1]).padded(3)
    with pytest.raises(ValueError, match="do not fit"):
        ragged([4, 1]).put_([1], ragged([2]))
