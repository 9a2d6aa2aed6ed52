"""The training kernels under compilers' warnings and sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from picogpt.kernels import bindings, compiled
from picogpt.kernels.processor import vector_instructions

SOURCE = Path(compiled.__file__).parent / "csrc" / "block.c"
DRIVER = Path(__file__).parents[1] / "native" / "block_driver.c"
TILES = Path(__file__).parents[1] / "native" / "tiles.h"
SHAPES = {"heads of 4": (12, 4, 512), "heads of 32": (64, 32, 130), "half a panel": (48, 16, 38)}
"""Width, size of a head, and slots of a full window, which with heads of 4 has 511 characters."""
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]

pytestmark = pytest.mark.slow


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


def need(compiler: str, flags: list[str], folder: Path) -> None:
    """Skip where a compiler is missing, or cannot make a program that runs with these flags."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    source, program = folder / "empty.c", folder / "empty"
    source.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
    done = run([compiler, *flags, str(source), "-o", str(program)])
    if done.returncode or run([str(program)]).returncode:
        pytest.skip(f"{compiler} has no runtime for {' '.join(flags)}: {done.stderr.strip()[:200]}")


def flags_of(shape: str, dtype: str, instructions: str) -> list[str]:
    """Of the compiler, for a shape of model and the processor's instructions."""
    if instructions and vector_instructions() not in {instructions, "AVX512"}:
        pytest.skip(f"this processor has no {instructions}")
    width, head, slots = SHAPES[shape]
    flags = [f"-DWIDTH={width}", f"-DHEAD={head}", f"-DSLOTS={slots}", *["-DBFLOAT16=1"] * (dtype == "bfloat16")]
    return [*flags, *compiled.INSTRUCTIONS.get(instructions, "").split()]


@pytest.mark.parametrize("instructions", ["AVX512", "AVX2", ""])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_no_warnings(compiler: str, dtype: str, instructions: str, tmp_path: Path) -> None:
    """Both compilers have nothing to say of any variant, optimized as it is in use."""
    need(compiler, ["-fopenmp"], tmp_path)
    flags = [*WARNINGS, "-O3", "-fPIC", "-fopenmp", *flags_of("heads of 32", dtype, instructions)]
    done = run([compiler, *flags, "-c", str(SOURCE), "-o", str(tmp_path / "block.o")])

    assert (done.stderr, done.returncode) == ("", 0)


def check_driver(compiler: str, flags: list[str], folder: Path) -> None:
    """Compile the driver with sanitizers, and have it run to its end without a finding."""
    need(compiler, [*SANITIZERS, "-fopenmp"], folder)
    program = folder / "driver"
    command = [compiler, *WARNINGS, *SANITIZERS, "-fopenmp", *flags, f"-I{SOURCE.parent}", str(DRIVER), "-o", str(program), "-lm"]
    done = run(command)
    assert (done.stderr, done.returncode) == ("", 0)
    done = run([str(program)])

    assert (done.stdout, done.stderr, done.returncode) == ("ok\n", "", 0)


@pytest.mark.parametrize(
    ("compiler", "shape", "instructions"),
    [
        ("gcc", "heads of 4", "AVX2"),
        ("gcc", "heads of 32", "AVX512"),
        ("gcc", "heads of 32", "AVX2"),
        ("gcc", "half a panel", "AVX512"),
        ("clang", "half a panel", "AVX2"),
        ("clang", "heads of 4", ""),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sanitizers(compiler: str, shape: str, instructions: str, dtype: str, tmp_path: Path) -> None:
    """Texts and Muon read and write nothing out of place, for windows of 1 to 511 characters, 1 and 7 sequences, 9 threads."""
    check_driver(compiler, flags_of(shape, dtype, instructions), tmp_path)


def test_sanitizers_of_matrix_tiles(tmp_path: Path) -> None:
    """So do the functions for AMX, whose registers are emulated."""
    flags = [*flags_of("heads of 32", "bfloat16", "AVX512"), "-DAMX=1", "-include", str(TILES)]
    check_driver("gcc", flags, tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "finding"),
    [
        (".qkv = buffer(rows * 3 * WIDTH, sizeof(elem))", ".qkv = buffer(rows * 3 * WIDTH - 1, sizeof(elem))", "overflow"),
        (".ln1 = zeros(threads * 3 * WIDTH)", ".ln1 = zeros(threads * 3 * WIDTH - 1)", "overflow"),
        (".hidden = buffer(sequences * chars * WIDTH,", ".hidden = buffer((sequences * chars - 1) * WIDTH,", "overflow"),
        ("ids[i] = i % VOCAB", "ids[i] = i", "overflow"),
        ("m->wpe = floats_of(slots * WIDTH, 1)", "m->wpe = buffer(slots * WIDTH, 4)", "the hidden states are not finite"),
    ],
    ids=["short activations", "short gradients", "short hidden states", "unknown characters", "memory never written"],
)
def test_the_driver_notices(before: str, after: str, finding: str, tmp_path: Path) -> None:
    """A buffer that is one entry short, and memory that is read before it was written, are found."""
    need("gcc", [*SANITIZERS, "-fopenmp"], tmp_path)
    text = DRIVER.read_text()
    assert before in text
    changed = tmp_path / "changed.c"
    changed.write_text(text.replace(before, after))
    flags = [*SANITIZERS, "-fopenmp", *flags_of("half a panel", "float32", ""), f"-I{SOURCE.parent}", "-Wno-unused"]
    done = run(["gcc", *flags, str(changed), "-o", str(tmp_path / "changed"), "-lm"])
    assert done.returncode == 0, done.stderr
    done = run([str(tmp_path / "changed")])

    assert done.returncode != 0
    assert finding in done.stderr


@pytest.mark.parametrize("source", [SOURCE, SOURCE.with_name("decode.c")], ids=lambda path: path.stem)
def test_parameters_are_few(source: Path) -> None:
    """No function takes more than seven: what belongs together is a structure."""
    shape = flags_of("heads of 32", "float32", "") if source == SOURCE else []
    listed = run(["cc", "-fsyntax-only", "-aux-info", "/dev/stdout", *shape, "-fopenmp", str(source)])
    if listed.returncode:
        pytest.skip("cc does not list functions (-aux-info), as gcc does")
    own = [line.split("*/", 1)[1].split("; /*")[0] for line in listed.stdout.splitlines() if str(source.parent) in line]

    assert own
    assert [function for function in own if function[function.index("(") :].count(",") > 6] == []


def test_layout_is_complete() -> None:
    """Every structure of bindings.h is compared when a library is loaded."""
    text = SOURCE.with_name("bindings.h").read_text()
    structures = {line.split()[1] for line in text.splitlines() if line.startswith("struct ")}

    assert structures - {"layout_entry"} == set(bindings._STRUCTURES)
