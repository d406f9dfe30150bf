"""How long it takes to find intruders in one large matrix, by bounds, by a cached basis and as published.

And how often bounds and dense SVDs agree.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

from contestants import (
    CACHE,
    ROOT,
    Run,
    clock,
    command_line,
    fastest,
    in_own_process,
    interleaved,
    median,
    report,
    table,
)
from synthetic import write_config

SIZE, RANK, TOP_K, EPSILON = 4096, 64, 10, 0.5
GOALS = "at least 20 times faster than dense SVDs without a cache, 100 times with it, and every verdict the same"
BASES = {"trained": "a falling spectrum", "noise": "Gaussian noise"}
STRENGTHS = {"gentle": 0.3, "hard": 1.5}
TARGET = "model.layers.0.q_proj"
_CASES = 200  # of the check of agreement


def case(kind: str, strength: str) -> Path:
    """A folder with base.safetensors and a PEFT adapter of it, made once.

    `trained`: leading singular values i^-0.2, as in layer 10 of SmolLM2's q_proj, and its bulk stretched; scaled so
    that the largest is 1. The adapter's own spectrum falls from `strength` to a thirtieth of it.
    """
    import torch
    from safetensors.torch import save_file

    folder = CACHE / f"intruders-{kind}-{strength}"
    if (folder / "adapter_config.json").is_file():
        return folder
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    if kind == "trained":
        u = torch.linalg.qr(weight).Q
        v = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
        lead = torch.arange(1, 65) ** -0.2
        bulk = lead[-1] * (1 - torch.linspace(0, 1, SIZE - 64)) ** 1.4
        weight = (u * torch.cat([lead, bulk])) @ v.T
    else:
        weight /= 2  # its largest singular value is about 2
    left = torch.linalg.qr(torch.randn(SIZE, RANK, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(SIZE, RANK, generator=generator)).Q
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{TARGET}.weight": weight.contiguous()}, folder / "base.safetensors")
    prefix = f"base_model.model.{TARGET}"
    up = left * STRENGTHS[strength] * torch.logspace(0, -1.5, RANK)
    tensors = {f"{prefix}.lora_A.weight": right.T.contiguous(), f"{prefix}.lora_B.weight": up.contiguous()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_config(folder, RANK)
    return folder


def dense(folder: Path, output: Path) -> None:
    """As the published script does it: float32 SVDs of W0 and of W0 + BA, then all cosines; left and right."""
    import torch
    from safetensors.torch import load_file

    with clock() as elapsed:
        weight = load_file(folder / "base.safetensors")[f"{TARGET}.weight"]
        factors = load_file(folder / "adapter_model.safetensors")
        down, up = (factors[f"base_model.model.{TARGET}.lora_{x}.weight"] for x in "AB")
        config = json.loads((folder / "adapter_config.json").read_text())
        up = up * (config["lora_alpha"] / config["r"])
        u0, _, v0 = torch.linalg.svd(weight, full_matrices=False)
        u, _, v = torch.linalg.svd(weight + up @ down, full_matrices=False)
        sides = (u[:, :TOP_K].T @ u0).abs().amax(1), (v[:TOP_K] @ v0.T).abs().amax(1)
        found = [(side < EPSILON).nonzero().flatten().tolist() for side in sides]
        wall, cpu = elapsed()
    output.write_text(json.dumps(found))
    report(wall, cpu)


def certified(folder: Path, output: Path) -> None:
    _ours(folder, output, cached=False)


def cached(folder: Path, output: Path) -> None:
    _ours(folder, output, cached=True)


def _ours(folder: Path, output: Path, *, cached: bool) -> None:
    """From the files to the verdicts."""
    import torch

    import loratools
    from loratools.ops import intruders  # noqa: F401 -- imports are not counted

    torch.linalg.qr(torch.ones(64, 8))  # nor is the set-up of the linear algebra library
    search = loratools.Search(cache=loratools.default_cache() if cached else None)
    with clock() as elapsed:
        base = loratools.load_base(folder / "base.safetensors")
        found = loratools.intruders(loratools.load(folder), base, top_k=TOP_K, epsilon=EPSILON, search=search)
        wall, cpu = elapsed()
    (target,) = found.targets.values()
    output.write_text(json.dumps([target.left.indices, target.right.indices]))
    report(wall, cpu, target.verdict)


def whole_model(folder: Path, output: Path) -> None:
    """All matrices of SmolLM2-135M, and an adapter that was trained hard."""
    import torch  # noqa: F401

    import loratools
    from loratools.ops import intruders  # noqa: F401

    with clock() as elapsed:
        found = loratools.intruders(loratools.load(folder), loratools.load_base(output))
        wall, cpu = elapsed()
    report(wall, cpu, json.dumps(found.total))


def idle(folder: Path, output: Path) -> None:
    """What Python with torch takes before anything is done."""
    import torch  # noqa: F401

    report(0.0, 0.0)


def fill(folder: Path, output: Path) -> None:
    """Put the basis of W0 in the cache."""
    import loratools

    loratools.intruders(
        loratools.load(folder),
        loratools.load_base(folder / "base.safetensors"),
        search=loratools.Search("dense", loratools.default_cache()),
    )
    report(0.0, 0.0)


CONTESTANTS = {f.__name__: f for f in (dense, certified, cached, whole_model, idle, fill)}


def _run(name: str, folder: Path, verdicts: dict[str, list[list[int]]]) -> Run:
    output = folder / f"{name}.json"
    os.environ["LORATOOLS_CACHE"] = str(CACHE / "bases")
    found = in_own_process(Path(__file__), "--contestant", name, str(folder), str(output))
    if output.is_file():
        verdicts[name] = json.loads(output.read_text())
        output.unlink()
    return found


def real(repeats: int) -> str:
    """The whole model, where it and the adapter are at hand."""
    sys.path.append(str(ROOT / "tests"))
    from real.smollm2 import ADAPTERS, load_real_model, missing

    if reason := missing():
        return f"Skipped: {reason}."
    folder = CACHE / "smollm2"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base.safetensors").is_file():
        load_real_model(folder, n_rows=1)
    paths = (str(ADAPTERS / "en_lora_r8_hot"), str(folder / "base.safetensors"))
    runs = [in_own_process(Path(__file__), "--contestant", "whole_model", *paths) for _ in range(repeats)]
    total = json.loads(runs[-1].note)
    peak = min(run.peak for run in runs) - in_own_process(Path(__file__), "--contestant", "idle", *paths).peak
    return (
        f"SmolLM2-135M with `en_lora_r8_hot`, {total['targets']} matrices, both sides, no cache: {fastest(runs):.1f} s "
        f"(goal: under 60 s), {peak / 1e6:.0f} MB above idle torch, {total['left']} left and {total['right']} right "
        "intruders at epsilon 0.5 (dense SVDs elsewhere counted 216 left)."
    )


def agreement() -> str:
    """Bounds against dense float64 SVDs on random matrices, and what the bounds left to a dense SVD."""
    import numpy as np
    import torch

    from loratools.operators import LowRank
    from loratools.ops.base_spectra import BaseSpectrum, Search
    from loratools.ops.examine import examine

    vectors = differing = outside = decided = 0
    for seed in range(_CASES):
        generator = torch.Generator().manual_seed(seed)
        m, n = ((480, 480), (448, 640), (640, 448), (384, 700))[seed % 4]
        p = min(m, n)
        u, v = (torch.linalg.qr(torch.randn(size, p, generator=generator)).Q for size in (m, n))
        spectrum = torch.cat([torch.linspace(3, 1.2, 14), torch.exp(-2 * torch.linspace(0, 1, p - 14))])
        weight = (u * spectrum) @ v.T
        rank = 1 + seed % 16
        left, right = (torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q for size in (m, n))
        strength = (0.3, 1.5, 3.0, 8.0)[seed // 4 % 4]
        change = LowRank(left * torch.logspace(0, -1, rank), right.T, strength)
        found = examine(BaseSpectrum("w", weight, Search("certified")), change, top_k=TOP_K, thresholds=(EPSILON,))
        decided += found.verdict == "certified"
        u0, _, v0 = np.linalg.svd(weight.double().numpy(), full_matrices=False)
        tuned = weight.double().numpy() + (change.left.double() @ change.right.double()).numpy() * strength
        u1, _, v1 = np.linalg.svd(tuned, full_matrices=False)
        for side, cosines in ((found.left, u1[:, :TOP_K].T @ u0), (found.right, v1[:TOP_K] @ v0.T)):
            true = np.abs(cosines).max(1)
            vectors += len(true)
            differing += int(((side.most.numpy() < EPSILON) != (true < EPSILON)).sum())
            outside += int(((side.most.numpy() < true - 1e-3) | (side.least.numpy() > true + 1e-3)).sum())
    return (
        f"On {_CASES} random weights of 384 to 700 rows and columns with adapters of rank 1 to 16, {vectors:,} "
        f"singular vectors: {differing} verdicts differ from those of float64 SVDs, {outside} largest cosines lie "
        f"outside their bounds. Bounds decided all vectors of {decided} of the {_CASES} weights; the rest took a dense "
        "SVD of W0."
    )


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    repeats = 1 if quick else 2
    rows, peaks = [], []
    for kind, spectrum in BASES.items():
        for strength in STRENGTHS:
            folder = case(kind, strength)
            verdicts: dict[str, list[list[int]]] = {}
            _run("fill", folder, {})
            names = ("dense", "certified", "cached")
            runs = interleaved({name: partial(_run, name, folder, verdicts) for name in names[1:]}, repeats)
            runs["dense"] = [_run("dense", folder, verdicts)]
            best = fastest(runs["dense"])
            nothing = _run("idle", folder, {}).peak
            left, right = verdicts["dense"]
            for name, label in (
                ("dense", "two dense SVDs"),
                ("certified", "loratools, no cache"),
                ("cached", "cached"),
            ):
                same = "yes" if verdicts[name] == verdicts["dense"] else "NO"
                peak = (min(run.peak for run in runs[name]) - nothing) / 1e6
                rows.append(
                    (
                        f"{spectrum}, {strength} ({len(left)}/{len(right)})",
                        label,
                        runs[name][-1].note,
                        f"{fastest(runs[name]):.2f} s",
                        f"{median(runs[name]):.2f} s",
                        f"{best / fastest(runs[name]):.1f}",
                        same,
                        f"{peak:.0f} MB",
                    )
                )
                peaks.append(peak)
    header = ("base, adapter (intruders)", "by", "verdict", "fastest", "median", "times faster", "agrees", "memory")
    method = (
        f"From files to verdicts: one {SIZE} x {SIZE} float32 weight (67 MB), an adapter of rank {RANK}, k = {TOP_K}, "
        f"epsilon = {EPSILON}, both sides; each in a process of its own; ratios of the fastest. "
        f"Memory is above that of idle torch. Goal: {GOALS}. Noise has no outlying directions: its leading singular "
        "values lie so close that bounds cannot tell their vectors apart, and loratools then decomposes W0 once, and "
        "never W0 + BA."
    )
    parts = [f"### Intruders of a large matrix\n\n{method}", table(header, rows)]
    parts += ["### Bounds against dense SVDs", agreement()]
    parts += ["### Intruders of a whole model", real(repeats)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    command_line(__doc__, CONTESTANTS, main)
