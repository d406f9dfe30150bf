"""A thousand small adapters through a recipe: what workers gain, what each costs beyond the work, and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from contestants import table

ADAPTERS = 1000
LAYERS, MODULES, WIDTH, RANK = 6, ("q_proj", "k_proj", "v_proj", "o_proj"), 768, 16
TO = 8
PAIRS = 3  # one worker and two, in turn: the machine is shared

# Each in a process of its own, so that its memory is its own.
RUN = """
import json, os, resource, sys, time
from pathlib import Path
from loratools.hub.recipe import parse_steps
from loratools.hub.run import Run, run
if __name__ == "__main__":
    hub, out, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    began, before = time.perf_counter(), sum(os.times()[:4])
    report = run(parse_steps([sys.argv[4]]), hub, out, Run(workers))
    seconds, cpu = time.perf_counter() - began, sum(os.times()[:4]) - before
    assert report.counts == {"done": len(report.adapters)}, report.counts
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peaks": peaks}))
"""
# The work itself: the same verb on the same files, one after the other, by the library's own load and save. The hash of
# the source, which a saved file records, is computed in its turn: left alone, `save` does that on another core.
WORK = """
import json, os, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from loratools.files import load, save
from loratools.hub.discover import discover
from loratools.hub.recipe import parse_steps
torch.set_num_threads(int(sys.argv[3]))
os.environ["LORATOOLS_THREADS"] = sys.argv[3]
recipe = parse_steps([sys.argv[4]])
began, before = time.perf_counter(), sum(os.times()[:4])
for found in discover(Path(sys.argv[1])):
    with load(found.path) as adapter:
        digest = adapter.origin.sha256()
        adapter = replace(adapter, origin=replace(adapter.origin, sha256=lambda: digest))
        save(recipe.run(adapter).adapter, Path(sys.argv[2]) / found.stem)
print(json.dumps({"seconds": time.perf_counter() - began, "cpu": sum(os.times()[:4]) - before}))
"""


def make_hub(hub: Path, count: int) -> None:
    """`count` adapters of PEFT in float16, each of its own numbers."""
    import torch
    from safetensors.torch import save_file

    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(MODULES)}
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        tensors = {}
        for layer in range(LAYERS):
            for module in MODULES:
                stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator).half()
                tensors[f"{stem}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=generator).half()
        folder = hub / f"adapter-{i:05}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))


def ran(script: str, hub: Path, out: Path, number: int, step: str) -> dict[str, object]:
    """What a script printed."""
    shutil.rmtree(out, ignore_errors=True)
    place = out.parent / "script.py"  # workers import the main module by its file
    place.write_text(script)
    environ = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    done = subprocess.run(
        [sys.executable, str(place), str(hub), str(out), str(number), step],
        check=True,
        stdout=subprocess.PIPE,
        env=environ,
    )
    return dict(json.loads(done.stdout))


def main(*, quick: bool = False) -> str:
    """The tables, as Markdown."""
    count = 60 if quick else ADAPTERS
    folder = Path(tempfile.mkdtemp(prefix="hub-"))
    step = f"squeeze rank={TO}"
    try:
        began = time.perf_counter()
        make_hub(folder / "hub", count)
        made = time.perf_counter() - began
        make_hub(folder / "tenth", max(1, count // 10))
        rows, gains, over, over_busy = [], [], [], []
        for _ in range(1 if quick else PAIRS):
            work = ran(WORK, folder / "hub", folder / "out", 1, step)
            one = ran(RUN, folder / "hub", folder / "out", 1, step)
            two = ran(RUN, folder / "hub", folder / "out", 2, step)
            seconds = [float(str(result["seconds"])) for result in (work, one, two)]
            busy = [float(str(result["cpu"])) for result in (work, one)]
            gains.append(seconds[1] / seconds[2])
            over.append(1000 * (seconds[1] - seconds[0]) / count)
            over_busy.append(1000 * (busy[1] - busy[0]) / count)
            rows.append(
                [
                    *(f"{s:.1f} s" for s in seconds),
                    f"{gains[-1]:.2f}x",
                    f"{1000 * seconds[0] / count:.1f} ms",
                    f"{over[-1]:.1f} ms",
                    f"{over_busy[-1]:.1f} ms",
                ]
            )
        few = [ran(RUN, folder / "tenth", folder / "out", n, step) for n in (1, 2)]
        slopes = [
            1000 * (float(str(many["seconds"])) - float(str(some["seconds"]))) / (count - max(1, count // 10))
            for many, some in zip((one, two), few, strict=True)
        ]
        peaks = []
        for name, result in ((f"{max(1, count // 10)}", few[1]), (f"{count}", two)):
            kib = [int(k) for k in result["peaks"]]  # type: ignore[attr-defined]
            peaks.append([name, *(f"{k / 1024:.0f} MB" for k in kib)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    median = len(gains) // 2
    return (
        f"{count} adapters of rank {RANK} in float16, {LAYERS * len(MODULES)} targets of {WIDTH} x {WIDTH}, by "
        f"`{step}` ({made:.0f} s to make). The work itself: load, hash, squeeze and save in a loop of one process "
        "with one thread that has torch imported. Beyond it: what 1 worker takes longer.\n\n"
        + table(["work itself", "1 worker", "2 workers", "gain", "work of each", "beyond it", "of that CPU"], rows)
        + f"\n\nMedian gain {sorted(gains)[median]:.2f}x; beyond the work {sorted(over)[median]:.1f} ms an adapter, "
        f"{sorted(over_busy)[median]:.1f} ms of CPU time: starting a process, the hash of the output, the receipt, and "
        "handing out. Without what is done once, by the difference to a tenth of the adapters, an adapter takes "
        f"{slopes[0]:.1f} ms with 1 worker and {slopes[1]:.1f} ms with 2 ({slopes[0] / slopes[1]:.2f}x) in the last "
        "round.\n\nPeak memory of the process that hands out the work, and of the largest worker:\n\n"
        + table(["adapters", "parent", "worker"], peaks)
    )


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
