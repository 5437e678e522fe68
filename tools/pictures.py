"""Pictures of pages in fewer bytes: a palette of 256 colours, which curves and heat maps do not miss.

A PNG of matplotlib has millions of colours at its disposal, and the bands of a figure with six arms
use thousands. A page is one file, read over the net and kept in the history; a third of the bytes
do.
"""

import base64
import io
import json

from PIL import Image

COLOURS = 256


def in_palette(png: bytes) -> bytes:
    """The picture with at most `COLOURS` colours; as it was where that saves nothing or where a
    part of it is transparent."""
    picture = Image.open(io.BytesIO(png))
    if picture.mode == "P" or picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        return png
    plain = picture.convert("RGB").quantize(
        COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
    )
    file = io.BytesIO()
    plain.save(file, "PNG", optimize=True)
    return min(file.getvalue(), png, key=len)


def with_palettes(notebook: str) -> str:
    "The JSON text of a notebook, its PNG outputs in palettes."
    nb = json.loads(notebook)
    changed = False
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" not in data:
                continue
            before = base64.b64decode("".join(data["image/png"]))
            after = in_palette(before)
            if after != before:
                data["image/png"] = base64.b64encode(after).decode()
                changed = True
    return json.dumps(nb, indent=1, ensure_ascii=False) + "\n" if changed else notebook
