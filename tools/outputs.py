"""What two machines may print differently: stored outputs of a page against fresh ones.

A cell without a directive is compared as text. `#| volatile` is not compared. Between the two
stands a band:

    #| within 5%: sampled losses; five seeds and two CPUs differed by up to 2%
    #| within 0.02, 10%: accuracies of 512 samples, three standard errors
    #| within x3: an extreme of rounding errors, whose last bits differ

The words of such a cell must be equal, and each number must lie in the band around the stored one.
A band is a share (`5%`), an absolute distance (`0.02`) or a factor (`x3`); with several, one of
them has to hold. The reason behind the colon is required.
"""

import re

_BAND = re.compile(r"^#\|\s*within\b(.*)$", re.M)
_TERM = re.compile(
    r"(?:(?P<share>\d+(?:\.\d+)?)%|x(?P<factor>\d+(?:\.\d+)?)|(?P<distance>\d*\.?\d+(?:e-?\d+)?))$"
)
# A number, but not the digits of a name such as fp8, k3 or R2. A point that ends a sentence, or
# that torch prints behind a whole number, is taken along, so that it makes no difference.
_NUMBER = re.compile(
    r"""(?<![A-Za-z_\d.])
        (?P<number>[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)(?:\.(?!\w))?
      | (?<![A-Za-z_])(?P<special>[-+]?(?:nan|inf))(?![A-Za-z_\d])""",
    re.X,
)
_PLACE = "\N{REPLACEMENT CHARACTER}"  # stands for a number among the words


def directives(cell):
    "Names of the directives of a notebook cell."
    return set(re.findall(r"^#\|\s*([\w-]+)", "".join(cell["source"]), re.M))


def band(cell):
    """The band of a cell as a list of (kind, size), or None.

    Raises ValueError for a directive that is misspelt, gives no reason or stands twice.
    """
    found = list(_BAND.finditer("".join(cell["source"])))
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{found[1].group(0)!r} is the cell's second band; write one line")
    line = found[0].group(0)
    terms, colon, reason = found[0].group(1).partition(":")
    if not colon or len(reason.split()) < 3:
        raise ValueError(f"{line!r} needs a reason after a colon")
    terms = [term.strip() for term in terms.split(",")]
    band = []
    for term in terms:
        match = _TERM.match(term)
        if match is None:
            raise ValueError(f"{line!r}: {term!r} is no band; write 5%, 0.02 or x3")
        kind, size = next((k, float(v)) for k, v in match.groupdict().items() if v is not None)
        if kind == "factor" and size < 1:
            raise ValueError(f"{line!r}: a factor is at least 1, not {size:g}")
        band.append((kind, size))
    return band


def printed(cell):
    """What a reader sees of a code cell as text: stdout and text results, without addresses."""
    parts = []
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream" and output.get("name") == "stdout":
            parts.append("".join(output["text"]))
        elif output["output_type"] in ("execute_result", "display_data"):
            data = output.get("data", {})
            if not any(kind.startswith("image/") for kind in data):
                parts.append("".join(data.get("text/markdown", data.get("text/plain", ""))))
    return re.sub(r"0x[0-9a-f]{6,}", "0x", "\n".join(part.rstrip() for part in parts))


def numbers(text):
    """The words of a text, and its numbers.

    The words are the text with a sign in each number's place and with white space folded.
    """
    found = []

    def take(match):
        found.append(float((match["number"] or match["special"]).replace(",", "")))
        return _PLACE

    words = _NUMBER.sub(take, text)
    # columns are as wide as their widest number, and so are the rules under their heads
    words = re.sub(r"[-─]{2,}", "--", re.sub(r"\s+", " ", words))
    return words.strip(), found


def close(stored, fresh, band):
    """Does `fresh` lie within one of the terms of `band` around `stored`?

    NaN and infinities must be the same.
    """
    if stored == fresh or (stored != stored and fresh != fresh):
        return True
    if not abs(stored - fresh) < float("inf"):
        return False
    for kind, size in band:
        if kind == "distance" and abs(stored - fresh) <= size * (1 + 1e-9):
            return True
        if kind == "share" and abs(stored - fresh) <= size / 100 * max(abs(stored), abs(fresh)):
            return True
        if kind == "factor" and stored * fresh > 0 and max(stored / fresh, fresh / stored) <= size:
            return True
    return False


def difference(stored, fresh):
    "None if the fresh cell prints what the stored one allows, else a sentence that says what not."
    if "volatile" in directives(stored):
        return None
    before, after = printed(stored), printed(fresh)
    if before == after:
        return None
    allowed = band(stored)
    if allowed is not None:
        (words, old), (new_words, new) = numbers(before), numbers(after)
        if words == new_words:
            outside = [
                f"{a:g} became {b:g}"
                for a, b in zip(old, new, strict=True)
                if not close(a, b, allowed)
            ]
            if not outside:
                return None
            return f"outside its band: {'; '.join(outside[:8])}\n  printed: {after[:1500]!r}"
    return f"\n  stored:  {before[:1500]!r}\n  printed: {after[:1500]!r}"
