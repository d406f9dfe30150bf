"""What families of random and shared bases hold at their sizes: the rank of the delta, and how much of it they keep."""

from __future__ import annotations

import sys

from contestants import ROOT, table

ADAPTERS = ROOT.parent / "shared" / "adapters"
TARGET = "model.layers.10.self_attn.q_proj"
# Family, options: from few numbers to many.
CHOICES: tuple[tuple[str, dict[str, object]], ...] = (
    ("tera", {"rank": 4}),
    ("tera", {"rank": 8}),
    ("tera", {"rank": 16}),
    ("vera", {"rank": 64}),
    ("vera", {"rank": 512}),
    ("unilora", {"rank": 4, "repeats": 8}),
    ("randlora", {"rank": 192}),
    ("randlora", {"rank": 64}),
    ("randlora", {"rank": 16}),
    ("lora", {"rank": 1}),
    ("lora", {"rank": 4}),
    ("lora", {"rank": 16}),
)


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    title = "# Random and shared bases: rank, size and what is kept\n\n"
    if not (ADAPTERS / "en_lora_r64").is_dir():
        return f"{title}Skipped: the trained adapter is not at {ADAPTERS}."
    import torch

    from loratools import load
    from loratools.families import FITTABLE
    from loratools.families.base import Layout
    from loratools.families.fitting import Source
    from loratools.linalg.inner import relative_error
    from loratools.linalg.svd import spectrum
    from loratools.operators import Dense

    low = load(ADAPTERS / "en_lora_r64")[TARGET].operator().to(torch.float64)
    generic = Dense(torch.randn(low.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    rows = []
    for name, settings in CHOICES[::3] if quick else CHOICES:
        family = FITTABLE[name]
        options, kept = family.Options(**settings), []
        for delta in (low, generic):
            source = Source(delta, Layout(shape=low.shape), None, torch.float32)
            update = family.encode(source, options)
            made = update.operator().to(torch.float64)
            kept.append(1 - relative_error(delta, made) ** 2)
        values = spectrum(made)  # of the generic delta: nothing but the family bounds its rank
        numbers = sum(t.numel() for t in (*update.parameters().values(), *update.shared_tensors().values()))
        expected = family.expected_energy(source, options)
        rows.append(
            [
                name,
                ", ".join(f"{key}={value}" for key, value in settings.items()),
                f"{numbers:,}",
                str(int((values > 1e-6 * values[0]).sum())),
                f"{float(values.square().sum() / values[0] ** 2):.1f}",
                f"{100 * kept[0]:.2f}",
                f"{100 * kept[1]:.3f}",
                "" if expected is None else f"{100 * expected:.3f}",
            ]
        )
    header = [
        "family",
        "options",
        "numbers",
        "rank",
        "stable rank",
        "energy kept %",
        "of noise %",
        "expected of noise %",
    ]
    method = (
        f"One matrix of {low.shape[0]} x {low.shape[1]}: the delta of {TARGET} of a LoRA of rank 64 trained on "
        "SmolLM2-135M-Instruct, and Gaussian noise. `rank` and `stable rank` are those of the decoded fit to the "
        "noise, whose rank nothing but the family bounds; `expected` is what is told of a generic delta, such as the "
        "noise. A few numbers make a delta of full rank in TeRA and RandLoRA, which keeps little of a delta that was "
        "not trained in its bases.\n\n"
    )
    return title + method + table(header, rows)


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
