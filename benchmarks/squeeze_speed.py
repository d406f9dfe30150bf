"""How near squeezing comes to merely reading the input and writing the output, in seconds and in memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from contestants import clock, command_line, fastest, interleaved, median, report, sync, table, with_output
from synthetic import PROJECTIONS, llama_like

RANK = 16
LAYERS = 32
TARGET = "at most 2.0 times the floor, at most 400 MB, and no more for a longer adapter"


def idle(weights: Path, output: Path) -> None:
    """What every contestant starts from."""
    import torch  # noqa: F401

    report(0.0, 0.0)


def _floor(weights: Path, output: Path, rank: int | None) -> None:
    """Read every tensor, write tensors of the size of the output."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    shapes = {}
    with safe_open(weights, "pt") as file:
        for key in file.keys():  # noqa: SIM118 -- not a mapping
            shapes[key] = [rank if rank and n == min(s) else n for s in [file.get_slice(key).get_shape()] for n in s]
    results = {key: torch.ones(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
    with clock() as elapsed:
        with safe_open(weights, "pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in shapes}  # the clone reads what is only mapped
        save_file(results, output, metadata={"format": "pt"})
        sync(output)
        wall, cpu = elapsed()
    report(wall, cpu, f"{len(tensors)} tensors")


def floor(weights: Path, output: Path) -> None:
    _floor(weights, output, RANK)


def floor_same_size(weights: Path, output: Path) -> None:
    _floor(weights, output, None)


def loratools(weights: Path, output: Path) -> None:
    """File to file, as the command line does it: atomic, hashed, with the error of what was stored."""
    import torch  # noqa: F401

    from loratools.files import load
    from loratools.ops.squeeze import squeeze_file

    with clock() as elapsed:
        _, result = squeeze_file(load(weights.parent), output.with_suffix(""), RANK)
        wall, cpu = elapsed()
    report(wall, cpu, f"error {result.total['relative_error']:.6f}")


def thin_qr(weights: Path, output: Path) -> None:
    """The plain loop: two thin QR factorisations and a small SVD for each module, in float32."""
    import torch
    from safetensors.torch import load_file, save_file

    with clock() as elapsed:
        tensors, results = load_file(weights), {}
        for key, down in tensors.items():
            if ".lora_A." not in key:
                continue
            partner = key.replace(".lora_A.", ".lora_B.")
            q_up, r_up = torch.linalg.qr(tensors[partner].float())
            q_down, r_down = torch.linalg.qr(down.float().T)
            u, s, vt = torch.linalg.svd(r_up @ r_down.T)
            root = s[:RANK].sqrt()
            results[key] = (root.unsqueeze(1) * vt[:RANK] @ q_down.T).bfloat16().contiguous()
            results[partner] = (q_up @ u[:, :RANK] * root).bfloat16().contiguous()
        save_file(results, output, metadata={"format": "pt"})
        sync(output)
        wall, cpu = elapsed()
    report(wall, cpu)


def dense(weights: Path, output: Path) -> None:
    """One layer by the product and its full SVD."""
    import torch
    from safetensors import safe_open

    with safe_open(weights, "pt") as file, clock() as elapsed:
        for projection in PROJECTIONS:
            prefix = f"base_model.model.model.layers.0.self_attn.{projection}"
            up, down = (file.get_tensor(f"{prefix}.lora_{slot}.weight").float() for slot in "BA")
            u, s, vt = torch.linalg.svd(up @ down, full_matrices=False)
            _ = u[:, :RANK] * s[:RANK], vt[:RANK].clone()
        wall, cpu = elapsed()
    report(wall, cpu)


CONTESTANTS = {f.__name__: f for f in (idle, floor, floor_same_size, loratools, thin_qr, dense)}
NAMES = {
    "floor": "read all, write a file of the output's size",
    "loratools": f"loratools squeeze to rank {RANK}",
    "thin_qr": "plain thin-QR loop, float32",
    "floor_same_size": "read all, write a file of the input's size",
}


def main(*, quick: bool = False) -> str:
    """The tables, as Markdown."""
    repeats, repeats_long = (3, 1) if quick else (9, 3)
    short, long = llama_like(LAYERS), llama_like(4 * LAYERS)
    for weights in (short, long):
        weights.read_bytes()  # into the page cache
    runs = interleaved({name: partial(with_output, __file__, name, short) for name in NAMES}, repeats)
    longer = interleaved({name: partial(with_output, __file__, name, long) for name in NAMES}, repeats_long)
    nothing = with_output(__file__, "idle", short).peak
    base, base_median, base_long = fastest(runs["floor"]), median(runs["floor"]), fastest(longer["floor"])
    rows = []
    for name, label in NAMES.items():
        own, own_long = runs[name], longer[name]
        rows.append(
            [
                label,
                f"{fastest(own) / base:.2f}",
                f"{median(own) / base_median:.2f}",
                f"{fastest(own):.2f}",
                f"{min(r.cpu for r in own):.2f}",
                f"{(max(r.peak for r in own) - nothing) / 1e6:.0f}",
                f"{fastest(own_long) / base_long:.2f}",
                f"{(max(r.peak for r in own_long) - nothing) / 1e6:.0f}",
            ]
        )
    header = ["", "× floor", "× floor, medians", "s", "CPU s", "MB", "4 × as long: × floor", "4 × as long: MB"]
    method = (
        f"{LAYERS} layers × q, k, v, o of 4096 × 4096, rank 64, bf16 ({short.stat().st_size / 1e6:.0f} MB), to "
        f"rank {RANK}; the longer one has {4 * LAYERS} layers ({long.stat().st_size / 1e6:.0f} MB). Synthetic: seeded, "
        f"power-law spectra. Fresh process each, {repeats} interleaved repeats ({repeats_long} of the longer), the "
        "fastest unless a column says medians; "
        "imports outside the seconds, input in the page cache, output synced to disk. MB: peak "
        f"resident memory above an idle `import torch` ({nothing / 1e6:.0f} MB). Goal: {TARGET}."
    )
    parts = [f"### Squeezing a Llama-sized adapter\n\n{method}", table(header, rows)]
    if not quick:
        one = with_output(__file__, "dense", short).wall
        parts.append(
            f"Forming the product and its full SVD took {one:.0f} s for one layer (4 modules), {one / base:.0f} times "
            f"the floor of the whole adapter. *Extrapolated, not measured:* {LAYERS} layers would take "
            f"{LAYERS * one / 60:.0f} minutes, {LAYERS * one / fastest(runs['loratools']):.0f} times as long as "
            "loratools."
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    command_line(__doc__, CONTESTANTS, main)
