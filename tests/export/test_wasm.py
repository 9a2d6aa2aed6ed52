"""The assembler: a module worked out by hand, the product's result in node, and what it does not know."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picogpt.export.wasm import assemble

PRODUCTS = Path(__file__).parents[2] / "picogpt" / "export" / "products.wat"
ADD = """
(module  ;; a comment (with parentheses)
  (import "page" "memory" (memory 1))
  (func (export "add") (param $a i32) (local $b i32) local.get $a i32.const 4 i32.add local.set $b)
)
"""


def test_a_module_by_hand() -> None:
    """Sections for types, imports, functions, exports and code, each with its length and one entry."""
    assert assemble(ADD) == (
        b"\0asm\1\0\0\0"
        b"\x01\x05\x01\x60\x01\x7f\x00"
        b"\x02\x10\x01\x04page\x06memory\x02\x00\x01"
        b"\x03\x02\x01\x00"
        b"\x07\x07\x01\x03add\x00\x00"
        b"\x0a\x0d\x01\x0b\x01\x01\x7f\x20\x00\x41\x04\x6a\x21\x01\x0b"
    )


def test_unknown_instruction() -> None:
    """An instruction that is not in its tables is named."""
    with pytest.raises(ValueError, match=r"there is no instruction 'i32\.mul'"):
        assemble(ADD.replace("i32.add", "i32.mul"))


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 16), (200, 256)])
def test_product_in_node(rows: int, columns: int) -> None:
    """The product is numpy's."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (rows, columns))
    vectors: dict[str, list[float]] = {
        "scales": rng.random(rows).tolist(),
        "bias": rng.random(rows).tolist(),
        "x": rng.standard_normal(columns).tolist(),
    }
    program = """
    const memory = new WebAssembly.Memory({ initial: 4 });
    const { multiply } = new WebAssembly.Instance(new WebAssembly.Module(Uint8Array.from(code)), { page: { memory } }).exports;
    let end = 0;
    const put = (kind, values) => { const array = new kind(memory.buffer, end, values.length); array.set(values); end += array.byteLength + 16; return array; };
    const W = put(Int8Array, weights.flat()); end = Math.ceil(end / 16) * 16;
    const [s, b, x, out] = [scales, bias, x_, weights.map(() => 0)].map(values => put(Float32Array, values));
    multiply(W.byteOffset, s.byteOffset, b.byteOffset, x.byteOffset, out.byteOffset, weights.length, weights[0].length);
    console.log(JSON.stringify([...out]));
    """
    given: dict[str, Any] = {"code": list(assemble(PRODUCTS.read_text())), "weights": weights.tolist()}
    given |= {"scales": vectors["scales"], "bias": vectors["bias"], "x_": vectors["x"]}
    constants = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in given.items())
    done = subprocess.run(["node", "-"], input=constants + program, capture_output=True, text=True, check=True, timeout=60)

    expected = weights @ np.array(vectors["x"]) * vectors["scales"] + vectors["bias"]
    assert json.loads(done.stdout) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-2)
