"""Pictures in notebooks: fewer bytes, the same picture."""

import base64
import io
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from pages import cleaned  # noqa: E402
from pictures import COLOURS, in_palette, with_palettes  # noqa: E402

matplotlib.use("agg")


def figure(**options) -> bytes:
    "A figure with overlapping bands, as the studies draw them."
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(4, 2))
    x = np.linspace(0, 1, 60)
    for i in range(6):
        y = np.sin(5 * x + i)
        ax.plot(x, y)
        ax.fill_between(x, y - 0.4, y + 0.4, alpha=0.3)
    file = io.BytesIO()
    fig.savefig(file, format="png", **options)
    plt.close(fig)
    return file.getvalue()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_a_palette_halves_a_figure_and_moves_no_colour_far():
    before = figure()
    after = in_palette(before)
    assert len(after) < len(before) / 2 and Image.open(io.BytesIO(after)).mode == "P"
    moved = np.abs(pixels(before) - pixels(after)).max(-1)
    # half of the pixels are paper, which stays what it is
    assert moved.mean() < 2 and np.quantile(moved, 0.999) < 40
    assert len(np.unique(pixels(after).reshape(-1, 3), axis=0)) <= COLOURS
    assert in_palette(after) == after  # once is enough


def test_a_transparent_figure_stays_what_it_is():
    before = figure(transparent=True)
    assert in_palette(before) == before


def test_only_pictures_of_a_notebook_change():
    picture = base64.b64encode(figure()).decode()
    outputs = [{"output_type": "display_data", "metadata": {}, "data": {"image/png": picture}}]
    outputs.append({"output_type": "stream", "name": "stdout", "text": ["1\n"]})
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": ["1"], "outputs": outputs}
    cell["execution_count"] = None
    text = cleaned(
        json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    )
    made = with_palettes(text)
    assert len(made) < len(text) and cleaned(made) == made and with_palettes(made) == made
    before, after = json.loads(text), json.loads(made)
    for nb in (before, after):
        del nb["cells"][0]["outputs"][0]["data"]["image/png"]
    assert before == after
