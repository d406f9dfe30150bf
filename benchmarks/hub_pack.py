"""What many adapters cost in shared bases: each way of `loratools hub pack`, and rivals, at equal bytes.

Hubs: made up ones with shared directions, with none, and with both; and the real one of `benchmarks/train_hub.py`,
where it was trained, with those of ../shared that have its rank. Every byte of every file counts. Rivals that are
packages (vlora-dev, lorashare) take part where they are installed:
`pip install --no-deps --target DIR vlora-dev lorashare`, and DIR in PYTHONPATH.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contestants import ROOT, table
from train_hub import HUB

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.operators import LowRank

BUDGETS = ("10%", "20%", "40%")
SHARED = ("en_lora_r8", "en_lora_r8_hot")
METHODS = ("auto", "own", "joint", "cluster", "diag", "sparse", "atoms")
Deltas = dict[str, dict[str, "LowRank"]]  # adapter -> target -> delta


def main(*, quick: bool = False) -> str:
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for title, hub in hubs(Path(folder), quick=quick):
            parts.append(f"## {title}\n\n{_measured(hub, Path(folder), quick=quick)}")
    intro = (
        "# Packs at equal bytes\n\n"
        "The root of the mean squared relative error of the adapters of a hub, each counting the same, within a "
        "share of the bytes of all of them. PCA is of flattened factors, mean taken off, as rivals have it; that of "
        "canonical ones acts on the factors of the singular value decomposition. Of the trained hub, whose fits take "
        "minutes, `auto` was packed, and the single methods are what its plan expected of each by itself."
    )
    return "\n\n".join([intro, *parts])


def hubs(folder: Path, *, quick: bool) -> Iterator[tuple[str, Path]]:
    """Title and place of each."""
    count = 8 if quick else 32
    for kind in ("shared directions", "nothing in common", "two thirds share directions"):
        place = folder / kind.replace(" ", "_")
        made_up(place, kind, count)
        yield f"{count} made up adapters, {kind}", place
    real = folder / "real"
    real.mkdir()
    places = [ROOT.parent / "shared" / "adapters" / name for name in SHARED]
    places += sorted(HUB.glob("*_r8_*")) if HUB.is_dir() else []  # of one rank, so that rivals can take part
    places = [p for p in places if p.is_dir()][: 3 if quick else None]
    for place in places:
        shutil.copytree(place, real / place.name)
    if places:
        yield f"{len(places)} trained adapters of SmolLM2-135M, of rank 8", real


def made_up(hub: Path, kind: str, count: int, *, m: int = 192, n: int = 160, rank: int = 8, layers: int = 2) -> None:
    """PEFT folders of one rank, so that rivals can take part."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    common = [[torch.linalg.qr(torch.randn(s, 24, generator=generator))[0] for s in (m, n)] for _ in range(layers)]
    for i in range(count):
        tensors = {}
        alone = kind.startswith("nothing") or (kind.startswith("two") and i % 3 == 0)
        for layer, (left, right) in enumerate(common):
            up, down = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
            if not alone:
                up, down = left @ up[:24], down[:, :24] @ right.T
            stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            tensors |= {f"{stem}.lora_A.weight": down.contiguous(), f"{stem}.lora_B.weight": up.contiguous()}
        place = hub / f"a{i:02}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
        (place / "adapter_config.json").write_text(json.dumps(config))


def _measured(hub: Path, folder: Path, *, quick: bool) -> str:
    from loratools.errors import UsageError
    from loratools.hub.pack import Packing, pack

    real = hub.name == "real"  # where fitting takes minutes: single methods as the plan of `auto` has them
    budgets = BUDGETS[1:2] if quick or real else BUDGETS
    before = folder_size(hub)
    cells: dict[str, list[str]] = {method: [] for method in METHODS}
    for budget in budgets:
        for method in METHODS[:1] if real else METHODS:
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            try:
                report = pack(hub, out, Packing(budget, method))
            except UsageError:
                cells[method].append("does not fit")
                continue
            cells[method].append(f"{math.sqrt(sum(e * e for e in report.errors) / len(report.errors)):.4f}")
            if real:
                for single, lost in report.expected.items():
                    if single != method:
                        cells[single].append(f"{math.sqrt(lost / len(report.errors)):.4f} planned")
    rows = [[method, *found] for method, found in cells.items() if found]
    truth = _deltas(hub)
    for name, rival in RIVALS.items():
        line = [name]
        for budget in budgets:
            try:
                line.append(f"{rival(hub, truth, int(before * float(budget[:-1]) / 100), folder):.4f}")
            except Exception as error:  # noqa: BLE001 -- whatever a rival fails with is its result
                line.append(" ".join(str(error).split())[:60] or type(error).__name__)
        rows.append(line)
    return table(["", *budgets], rows)


def folder_size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _deltas(hub: Path) -> Deltas:
    import torch

    from loratools.files import load

    found: Deltas = {}
    for place in sorted(p for p in hub.iterdir() if p.is_dir()):
        with load(place) as adapter:
            found[place.name] = {t: adapter[t].operator().to(torch.float64) for t in adapter}  # type: ignore[misc]
    return found


def rms(truth: Deltas, found: Deltas) -> float:
    """The root of the mean squared relative error."""
    from loratools.linalg.inner import frobenius
    from loratools.operators import sum_of

    errors = []
    for name, targets in truth.items():
        lost = sum(frobenius(sum_of([delta, -found[name][t]])) ** 2 for t, delta in targets.items())
        errors.append(lost / sum(frobenius(delta) ** 2 for delta in targets.values()))
    return math.sqrt(sum(errors) / len(errors))


def _pca(hub: Path, truth: Deltas, budget: int, folder: Path, *, canonical: bool) -> float:
    """Of flattened factors, one basis for each target and side; the largest number of components that fits."""
    import torch

    from loratools.linalg.svd import thin_svd
    from loratools.operators import LowRank

    targets = list(next(iter(truth.values())))
    ranks = {delta.rank for of in truth.values() for delta in of.values()}
    if len(ranks) > 1:
        raise ValueError("ranks differ")
    item = 2 if hub.name == "real" else 4  # bf16, as most of the trained ones are
    flat: dict[tuple[str, int], Tensor] = {}
    for t in targets:
        sides: tuple[list[Any], list[Any]] = ([], [])
        for of in truth.values():
            delta = of[t]
            left, right = delta.left * delta.scale, delta.right
            if canonical:
                u, s, vt = thin_svd(delta)
                left, right = u * s.sqrt(), s.sqrt().unsqueeze(1) * vt
            sides[0].append(left.flatten())
            sides[1].append(right.flatten())
        flat |= {(t, side): torch.stack(sides[side]) for side in (0, 1)}
    sizes = sum(f.shape[1] for f in flat.values())
    count = (budget // item - sizes) // (sizes + len(flat) * len(truth))
    if count < 0:
        raise ValueError("the mean alone does not fit")
    rebuilt = {}
    for key, rows in flat.items():
        mean = rows.mean(0)
        u, s, vt = torch.linalg.svd(rows - mean, full_matrices=False)
        rebuilt[key] = mean + (u[:, :count] * s[:count]) @ vt[:count]
    found: Deltas = {}
    for i, (name, of) in enumerate(truth.items()):
        found[name] = {
            t: LowRank(rebuilt[t, 0][i].reshape(of[t].left.shape), rebuilt[t, 1][i].reshape(of[t].right.shape))
            for t in targets
        }
    return rms(truth, found)


def _pca_raw(hub: Path, truth: Deltas, budget: int, folder: Path) -> float:
    return _pca(hub, truth, budget, folder, canonical=False)


def _pca_canonical(hub: Path, truth: Deltas, budget: int, folder: Path) -> float:
    return _pca(hub, truth, budget, folder, canonical=True)


def _vlora(hub: Path, truth: Deltas, budget: int, folder: Path) -> float:
    from vlora.io import load_adapter
    from vlora.subspace import SharedSubspace

    from loratools.operators import LowRank

    adapters = [load_adapter(hub / name) for name in truth]

    def made(count: int) -> tuple[int, Any]:
        space = SharedSubspace.from_adapters(adapters, list(truth), num_components=count)
        place = folder / "vlora"
        shutil.rmtree(place, ignore_errors=True)
        space.save(place)
        return folder_size(place), space

    space = _largest(made, budget, len(truth))
    found: Deltas = {}
    for name, of in truth.items():
        weights = space.reconstruct(name)
        layers = list(weights.layer_names)
        found[name] = {}
        for t, delta in of.items():
            layer = next(x for x in layers if x.endswith(t))
            found[name][t] = LowRank(weights.lora_b[layer].double(), weights.lora_a[layer].double(), delta.scale)
    return rms(truth, found)


def _lorashare(hub: Path, truth: Deltas, budget: int, folder: Path) -> float:
    from lorashare import SHAREModel

    def made(count: int) -> tuple[int, Any]:
        model = SHAREModel.from_adapters([str(hub / name) for name in truth], num_components=count)
        place = folder / "lorashare"
        shutil.rmtree(place, ignore_errors=True)
        model.save_pretrained(place)
        return folder_size(place), model

    model = _largest(made, budget, 512)
    out = folder / "lorashare_out"
    shutil.rmtree(out, ignore_errors=True)
    for name in truth:
        model.reconstruct(name, str(out / name))
    return rms(truth, _deltas(out))


def _largest(made: Callable[[int], tuple[int, Any]], budget: int, most: int) -> Any:
    """What is made of the largest number of components that fits."""
    low, high, best = 0, most, None
    while low < high:
        middle = (low + high + 1) // 2
        size, what = made(middle)
        if size <= budget:
            low, best = middle, what
        else:
            high = middle - 1
    if best is None:
        raise ValueError("does not fit")
    return best


RIVALS: dict[str, Callable[[Path, Deltas, int, Path], float]] = {
    "PCA of factors": _pca_raw,
    "PCA of canonical factors": _pca_canonical,
    "vlora-dev": _vlora,
    "lorashare": _lorashare,
}


if __name__ == "__main__":
    print(main(quick=True))
