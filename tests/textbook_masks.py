"""The masks of the papers, in plain Python, one token at a time; they share no line with the package.

Each gives the set of (response, token) that lose their gradient.
"""

import math


def tokens_of(b, i):
    return [t for t in range(b.logp.shape[1]) if b.response_mask[i, t]]


def probabilities(b, i, t):
    return tuple(math.exp(float(x[i, t])) for x in (b.logp, b.logp_old, b.logp_mu))


def one_by_one(b, drops):
    return {
        (i, t)
        for i in range(len(b.logp))
        for t in tokens_of(b, i)
        if drops(*probabilities(b, i, t), float(b.advantage[i]))
    }


def by_response(b, drops):
    gone = set()
    for i in range(len(b.logp)):
        y = tokens_of(b, i)
        if y and drops([probabilities(b, i, t) for t in y], float(b.advantage[i])):
            gone |= {(i, t) for t in y}
    return gone


def minirl(b):
    "2512.01374, Eq. 7."

    def drops(pi, old, mu, a):
        return a > 0 and pi / old > 1.27 or a < 0 and pi / old < 0.8

    return one_by_one(b, drops)


def gspo(b):
    "2507.18071: the geometric mean of pi/old outside [1 - 3e-4, 1 + 4e-4]."

    def drops(y, a):
        s = math.prod(pi / old for pi, old, _ in y) ** (1 / len(y))
        return a > 0 and s > 1 + 4e-4 or a < 0 and s < 1 - 3e-4

    return by_response(b, drops)


def dppo_tv(b):
    "2602.04879, binary total variation around the rollout policy."

    def drops(pi, old, mu, a):
        return a > 0 and pi - mu > 0.15 or a < 0 and mu - pi > 0.15

    return one_by_one(b, drops)


def floored(x):
    "What a float32 log-probability of zero leaves of 1 - p."
    return max(x, 1e-8)


def dppo_kl(b):
    "2602.04879, binary KL divergence around the rollout policy."

    def drops(pi, old, mu, a):
        kl = mu * math.log(mu / pi)
        kl += floored(1 - mu) * math.log(floored(1 - mu) / floored(1 - pi))
        return kl > 0.05 and (a > 0 and pi > mu or a < 0 and pi < mu)

    return one_by_one(b, drops)


def trm_max(b):
    "2512.23075, the largest (log rho)^2 / 2 of a response."
    return by_response(b, lambda y, a: max(math.log(p / m) ** 2 / 2 for p, _, m in y) > 0.05)


def trm_mean(b):
    "2512.23075, the mean of rho - 1 - log rho."

    def drops(y, a):
        return sum(p / m - 1 - math.log(p / m) for p, _, m in y) / len(y) > 1e-3

    return by_response(b, drops)


def opsm(b):
    "2512.02556: A < 0 and mean of log(mu/pi) above a bound."
    return by_response(
        b, lambda y, a: a < 0 and sum(math.log(m / p) for p, _, m in y) / len(y) > 0.1
    )


def products(b):
    "(response, token, position from 1, product of pi/old up to it, A) of every token."
    for i in range(len(b.logp)):
        product = 1.0
        for k, t in enumerate(tokens_of(b, i), start=1):
            pi, old, _ = probabilities(b, i, t)
            product *= pi / old
            yield i, t, k, product, float(b.advantage[i])


def ctpo(b):
    "2605.07331: the log of the product of pi/old up to t, against bounds that grow with sqrt(t)."
    gone = set()
    for i, t, k, product, a in products(b):
        high, low = math.exp(0.05 * k**0.5), math.exp(-0.025 * k**0.5)
        if a > 0 and product > high or a < 0 and product < low:
            gone.add((i, t))
    return gone


def ctpo_grown(b):
    "Its second clip: A < 0, and a product that has grown beyond a bound."
    return {
        (i, t) for i, t, k, product, a in products(b) if a < 0 and product > math.exp(k**0.5 / 20)
    }
