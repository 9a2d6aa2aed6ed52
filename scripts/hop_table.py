"""Loss against speed for each hop: teacher-forced nats per character on held-out text, and characters a second.

    python scripts/hop_table.py --model RUN --text FILE

Reads texts side by side from the last tenth of FILE, each twice as long as a training sequence; the first half of each fills
the roll and is not scored. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from picogpt.data import TextSource, read_texts
from picogpt.inference import Engine
from picogpt.inference.decoder import RollingDecoder
from picogpt.runs.find import find_model

HOPS = (128, 120, 112, 96, 64, 32, 16, 1)
ROLL = 1280
TIMED = 1024


def nats(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Cross-entropy of each prediction: logits (B, k, V), targets (B, k) -> (B, k)."""
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(scores, targets[..., None].astype(np.intp), axis=-1)[..., 0]
    losses: npt.NDArray[np.float64] = np.log(np.exp(scores).sum(axis=-1)) - chosen
    return losses


def score(engine: Engine, texts: npt.NDArray[np.uint8], hop: int) -> npt.NDArray[np.float64]:
    """Mean loss of each text's second half (B,)."""
    roll = RollingDecoder(engine, hop, batch=len(texts))
    half = texts.shape[1] // 2
    losses = []
    for start in range(0, texts.shape[1] - 1, 64):
        inputs = texts[:, start : min(start + 64, texts.shape[1] - 1)]
        targets = texts[:, start + 1 : start + 1 + inputs.shape[1]]
        losses.append(nats(roll.prefill_all_logits(inputs), targets))
    means: npt.NDArray[np.float64] = np.concatenate(losses, axis=1)[:, half:].mean(axis=1)
    return means


def speed(engine: Engine, text: npt.NDArray[np.uint8], hop: int) -> float:
    """Characters a second of one text read character by character."""
    roll = RollingDecoder(engine, hop)
    count = TIMED if hop > 1 else 64
    roll.prefill(text[None, :256])
    start = time.perf_counter()
    for i in range(256, 256 + count):
        roll.prefill(text[None, i : i + 1])
    return count / (time.perf_counter() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--texts", type=int, default=16, help="texts side by side (default: 16)")
    parser.add_argument("--hops", type=int, nargs="+", default=HOPS, help="hops to measure")
    arguments = parser.parse_args()
    engine = Engine.load(find_model(arguments.model, Path("logs"))[0])
    ids = TextSource(read_texts([arguments.text], name="text"), sequence_len=ROLL, batch_size=1, seed=0).val_ids
    starts = np.linspace(0, len(ids) - 2 * ROLL - 1, arguments.texts).astype(int)
    texts = np.stack([ids[start : start + 2 * ROLL + 1] for start in starts])
    base = score(engine, texts, HOPS[0])
    print("| hop | nats a character | less than hop 128 | characters/s |\n|---|---|---|---|", flush=True)
    for hop in arguments.hops:
        losses = score(engine, texts, hop)
        gain = base - losses
        error = gain.std(ddof=1) / math.sqrt(len(gain))
        median = sorted(speed(engine, ids[:2000], hop) for _ in range(5))[2]
        print(f"| {hop} | {losses.mean():.4f} | {gain.mean():.4f} +- {error:.4f} | {median:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
