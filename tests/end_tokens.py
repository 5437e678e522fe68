"""What must hold of every rollout, whichever tokens end a response and whichever engine sampled."""

import torch


def ends_rightly(r, end):
    "Every response ends at its first end token, or is cut at the limit and not finished."
    is_end = torch.isin(r.tokens, torch.tensor(end)) & r.response_mask
    last = r.tokens[torch.arange(len(r)), r.length - 1]
    assert torch.equal(r.finished, torch.isin(last, torch.tensor(end)))
    assert torch.equal(is_end.sum(1), r.finished.long())
    return {t: int((last[r.finished] == t).sum()) for t in end}
