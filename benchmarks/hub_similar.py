"""Alike adapters of a hub: how many are found, what sketching costs, and how the search grows."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from contestants import ROOT, clock, in_own_process, report, table

THRESHOLD = 0.95
COUNTS = (1_000, 10_000, 100_000)
COSINES = (0.95, 0.96, 0.98, 0.99, 0.999)
# (families of planted adapters, targets, side, rank)
FULL, QUICK = (20, 64, 2048, 16), (4, 8, 256, 8)


def plant(hub: Path, families: int, targets: int, side: int, rank: int) -> dict[tuple[str, str], str]:
    """Write a hub, and say what is what: of each family an adapter in other guises, and a merge of it and the next."""
    import torch
    from safetensors.torch import save_file

    stems = [f"model.layers.{i}.self_attn.q_proj" for i in range(targets)]

    def drawn(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [
            (torch.randn(rank, side, generator=generator), torch.randn(side, rank, generator=generator)) for _ in stems
        ]

    def write(name: str, factors: list[tuple[torch.Tensor, torch.Tensor]], scale: float, dtype: torch.dtype) -> None:
        folder, tensors, r = hub / name, {}, factors[0][0].shape[0]
        folder.mkdir()
        for stem, (down, up) in zip(stems, factors, strict=True):
            tensors[f"base_model.model.{stem}.lora_A.weight"] = down.to(dtype).contiguous()
            tensors[f"base_model.model.{stem}.lora_B.weight"] = up.to(dtype).contiguous()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": r, "lora_alpha": scale * r, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    def gauged(factors: list[tuple[torch.Tensor, torch.Tensor]], seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        q = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return [((torch.linalg.inv(q) @ d.double()).float(), (u.double() @ q).float()) for d, u in factors]

    def summed(
        a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]], x: float, y: float
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs = zip(a, b, strict=True)
        return [(torch.cat([d, e]), torch.cat([x * u, y * v], 1)) for (d, u), (e, v) in pairs]

    half, single = torch.bfloat16, torch.float32
    truth: dict[tuple[str, str], str] = {}
    for k in range(families):
        own, name = drawn(k), f"a{k:03}"
        write(name, own, 1.0, half)
        write(f"{name} gauge", gauged(own, k), 1.0, single)  # whose factors 16 bits would round anew
        write(f"{name} float", own, 1.0, single)
        write(f"{name} half", own, 0.5, half)
        truth |= {(name, f"{name} {kind}"): "copy" for kind in ("gauge", "float")}
        truth[name, f"{name} half"] = "scaled copy"
        cosine = COSINES[k % len(COSINES)]
        noise = (1 / cosine**2 - 1) ** 0.5
        write(f"{name} near", summed(own, drawn(1000 + k), 1.0, noise), 1.0, half)
        truth[name, f"{name} near"] = "derivative"
        write(f"merge{k:03}", summed(own, drawn((k + 1) % families), 0.7, 0.3), 1.0, half)
        truth[f"merge{k:03}", ""] = "merge"
        write(f"other{k:03}", drawn(2000 + k), 1.0, half)
    return truth


def hub_table(quick: bool) -> str:
    """Recall by relation, what else was found, and seconds."""
    import torch

    from loratools.files import load
    from loratools.hub.similar import Similar, similar
    from loratools.hub.sketches import sketch

    shape = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        hub = Path(folder)
        truth = plant(hub, *shape)
        torch.set_num_threads(1)
        names = sorted(p.name for p in hub.iterdir())
        seconds = []
        for name in names:
            start = time.perf_counter()
            with load(hub / name) as adapter:
                sketch(adapter)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = similar(hub, Similar(THRESHOLD - 0.001, workers=2))
        whole = time.perf_counter() - start
        size = sum(p.stat().st_size for p in (hub / names[0]).iterdir())
    told = {(p.adapter, p.other): p for p in found.pairs}
    merges = {m.adapter for m in found.merges}
    rows = []
    for relation in ("copy", "scaled copy", "derivative", "merge"):
        planted = [pair for pair, kind in truth.items() if kind == relation]
        hits = sum(
            name in merges if relation == "merge" else _is(told, (name, other), relation) for name, other in planted
        )
        rows.append([relation, str(len(planted)), str(hits)])
    kin = sum(_family(a) != _family(b) for a, b in told)
    rows.append(["between families", "0", str(kin)])
    rows.append(["merges of what is none", "0", str(sum(not name.startswith("merge") for name in merges))])
    families, targets, side, rank = shape
    method = (
        f"### A hub with planted relatives\n\n{len(names)} adapters of {targets} targets of {side} x {side} at rank "
        f"{rank}, {size / 1e6:.1f} MB in bfloat16: {families} adapters, of each the same delta in other factors and in "
        "float32, half of it, a derivative at a cosine from 0.95 to 0.999, a merge with the next, and an unrelated "
        f"one. A sketch takes {1000 * sorted(seconds)[len(seconds) // 2]:.0f} ms of one core (median, with reading); "
        f"the whole of `hub similar --workers 2` {whole:.1f} s.\n\n"
    )
    return method + table(["relation", "planted", "found"], rows)


def _is(told: dict[tuple[str, str], object], pair: tuple[str, str], relation: str) -> bool:
    return getattr(told.get(pair), "relation", None) == relation


def _family(name: str) -> str:
    return name.split()[0]


def simulated(count: int) -> None:
    """Search sketches of which a hundredth has a relative, and print seconds, memory and how many were found."""
    import torch

    from loratools.hub.nearest import candidates, unit
    from loratools.hub.sketches import LENGTH

    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    rows = torch.empty(count, LENGTH)
    for part in rows.split(4096):
        part.normal_(generator=generator)
    kin = count // 100
    near = torch.linspace(THRESHOLD, 1, kin)[:, None]
    rows[-kin:] = near * rows[:kin] + (1 - near**2).sqrt() * rows[-kin:]
    units = unit(rows)
    del rows
    truth = {
        (i, count - kin + i)
        for i, cosine in enumerate((units[:kin] * units[-kin:]).sum(1).tolist())
        if cosine >= THRESHOLD
    }
    with clock() as elapsed:
        found = candidates(units, THRESHOLD)
        wall, cpu = elapsed()
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    report(wall, cpu, json.dumps([len(truth), len(truth & pairs), len(pairs - truth)]))


def search_table(counts: tuple[int, ...], measure: Callable[[int], list[str]]) -> str:
    """How the search grows."""
    head = ["sketches", "seconds", "peak memory, MB", "pairs over the threshold", "of these found", "others to confirm"]
    method = (
        "### The search alone\n\nSketches of unrelated adapters, a hundredth of which has a relative at a cosine from "
        f"{THRESHOLD} to 1, in a process of its own with two threads; of the memory each sketch takes 4 kB. "
        "Others to confirm lie within four standard errors below the threshold.\n\n"
    )
    return method + table(head, [measure(count) for count in counts])


def searched(count: int) -> list[str]:
    """One row."""
    run = in_own_process(ROOT / "benchmarks" / "hub_similar.py", "--search", str(count))
    truth, hits, others = json.loads(run.note)
    return [f"{count:,}", f"{run.wall:.2f}", f"{run.peak / 1e6:.0f}", str(truth), str(hits), str(others)]


def main(*, quick: bool = False) -> str:
    """The tables, as Markdown."""
    counts = COUNTS[:1] if quick else COUNTS
    return "\n\n".join(["# Alike adapters", hub_table(quick), search_table(counts, searched)])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--search"]:
        simulated(int(sys.argv[2]))
    else:
        print(main(quick="--quick" in sys.argv))
