"""Writes tests/microscaling.json: blocks of 32 numbers as two published libraries round them.

    python tests/record_microscaling.py CHECKOUT

CHECKOUT is a clone of github.com/microsoft/microxcaling (commit 7bc41952, August 2024), the emulation
library that accompanies the OCP microscaling specification; torchao 0.18 must be installed. Neither
is needed to run the tests: the numbers are kept as the bytes of float32, in base64.
"""

import base64
import json
import sys
from pathlib import Path

import numpy as np
import torch

CODES = {
    "mxfp8": ("fp8_e4m3", torch.float8_e4m3fn),
    "mxfp8_e5m2": ("fp8_e5m2", torch.float8_e5m2),
    "mxfp6_e2m3": ("fp6_e2m3", "fp6_e2m3"),
    "mxfp6_e3m2": ("fp6_e3m2", "fp6_e3m2"),
    "mxfp4": ("fp4_e2m1", torch.float4_e2m1fn_x2),
}


def blocks():
    "float32 [28, 32]: normal numbers of many sizes, ties, zeros, largest numbers at each cut."
    random = np.random.Generator(np.random.Philox(7))
    rows = [random.standard_normal(32) * 2.0**k for k in (-90, -20, -8, -3, 0, 1, 2, 9, 40)]
    rows += [random.standard_t(2, 32) for _ in range(4)]
    grid = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])  # ties of E2M1
    rows += [np.resize(np.concatenate([grid, -grid]), 32) * 2.0**k for k in (-4, 0, 3)]
    rows += [np.zeros(32), np.eye(32)[5] * 3]
    for largest in (4.0, 5.0, 5.001, 6.0, 6.001, 6.999, 7.0, 7.25, 7.5, 7.999):
        row = random.uniform(-4, 4, 32)
        row[11] = largest
        rows.append(row)
    return torch.from_numpy(np.stack(rows)).float()


def kept(x):
    return base64.b64encode(x.float().contiguous().numpy().tobytes()).decode()


def main(checkout):
    sys.path.insert(0, checkout)
    from mx.mx_ops import _quantize_mx
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode as Mode
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    def torchao(x, dtype, mode):
        scale, data = to_mx(x, dtype, 32, mode)
        return to_dtype(data, scale, dtype, 32, torch.float32)

    x = blocks()
    out = {"input": kept(x), "microxcaling": {}, "torchao": {}}
    for kind, (theirs, dtype) in CODES.items():
        out["microxcaling"][kind] = kept(
            _quantize_mx(x, 8, theirs, axes=[-1], block_size=32, round="even")
        )
        out["torchao"][kind] = kept(torchao(x, dtype, Mode.FLOOR))
    out["torchao"]["mxfp8_ceil"] = kept(torchao(x, torch.float8_e4m3fn, Mode.RCEIL))
    out["torchao"]["mxfp4_even"] = kept(torchao(x, torch.float4_e2m1fn_x2, Mode.EVEN))
    path = Path(__file__).with_name("microscaling.json")
    path.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
