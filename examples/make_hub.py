"""Make a small hub to try things on: `python examples/make_hub.py my-hub`; 60 adapters, 29 MB, a few seconds.

Adapters of one base in several ranks, as hubs are: fine-tunes that share the directions of their topic, a copy with
other factors, one at half the strength, a merge, a very large one, and a download that broke off. The numbers are
random, and the same for every seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, WIDTH = 4, 512
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
TOPICS = ("law", "medicine", "code", "poems")
RANKS = (4, 8, 8, 16, 16, 32)

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # target -> A (rank, in), B (out, rank)


def targets() -> list[str]:
    return [f"model.layers.{layer}.self_attn.{module}" for layer in range(LAYERS) for module in MODULES]


def topic_bases(generator: torch.Generator, size: int = 24) -> Factors:
    """Directions that fine-tunes of one topic share."""
    made = {}
    for target in targets():
        down, up = (torch.randn(WIDTH, size, generator=generator) for _ in range(2))
        made[target] = (torch.linalg.qr(down).Q.T, torch.linalg.qr(up).Q)
    return made


def fine_tune(bases: Factors, rank: int, generator: torch.Generator) -> Factors:
    """One that uses some of its topic's directions, strong ones and weak ones, and a little of its own."""
    made = {}
    for target, (down, up) in bases.items():
        strengths = 0.75 ** torch.arange(rank)
        left = torch.randn(up.shape[1], rank, generator=generator)
        right = torch.randn(rank, down.shape[0], generator=generator) * strengths[:, None]
        noise = 0.05 * torch.randn(WIDTH, rank, generator=generator)
        made[target] = (right @ down, up @ left + noise)
    return made


def write_peft(folder: Path, factors: Factors, alpha: float | None = None) -> None:
    rank = next(iter(factors.values()))[0].shape[0]
    tensors = {}
    for target, (down, up) in factors.items():
        tensors[f"base_model.model.{target}.lora_A.weight"] = down.to(torch.bfloat16).contiguous()
        tensors[f"base_model.model.{target}.lora_B.weight"] = up.to(torch.bfloat16).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "example/base",
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "target_modules": list(MODULES),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make(hub: Path, seed: int, per_topic: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first: dict[str, Factors] = {}
    for topic in TOPICS:
        bases = topic_bases(generator)
        for i in range(per_topic):
            factors = fine_tune(bases, RANKS[i % len(RANKS)], generator)
            first.setdefault(topic, factors)
            write_peft(hub / topic / f"{topic}-{i:02}", factors)

    turned = {}
    for target, (down, up) in first["law"].items():  # the same deltas: B Q and Q^-1 A
        gauge = torch.randn(len(down), len(down), generator=generator)
        turned[target] = (torch.linalg.solve(gauge, down), up @ gauge)
    write_peft(hub / "uploads" / "my-law-lora", turned)
    write_peft(hub / "uploads" / "law-half-strength", first["law"], alpha=len(down) / 2)
    both = {}
    for target, (down, up) in first["code"].items():
        other_down, other_up = first["poems"][target]
        both[target] = (torch.cat([down, other_down]), torch.cat([0.6 * up, 0.4 * other_up], 1))
    write_peft(hub / "uploads" / "code-and-poems", both)
    write_peft(hub / "uploads" / "huge", fine_tune(topic_bases(generator, 160), 128, generator))

    whole = (hub / "law" / "law-00" / "adapter_model.safetensors").read_bytes()
    broken = hub / "uploads" / "broken-download.safetensors"
    broken.write_bytes(whole[: len(whole) // 2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hub", type=Path, help="folder to make")
    parser.add_argument("--per-topic", type=int, default=14, help="fine-tunes of each of the four topics")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.hub.exists():
        parser.error(f"{options.hub} is there already")
    make(options.hub, options.seed, options.per_topic)
    size = sum(path.stat().st_size for path in options.hub.rglob("*.safetensors"))
    print(f"{options.hub}: {sum(1 for _ in options.hub.rglob('*.safetensors'))} files, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
