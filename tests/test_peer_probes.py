"""What other resizing tools get wrong, silently or with a crash: here the answer is right, or an error that says why.

The inputs are those of a comparison of sd-scripts, resize_lora, gradience and PEFT in November 2026. Every delta is
computed from the files with the formula that their consumers use.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.base_weights import load_base
from loratools.errors import NeedsBaseError, UnchangedError
from loratools.files import load
from loratools.ops.squeeze import Squeeze, squeeze, squeeze_file
from loratools.ranks import Frobenius
from loratools.reports.squeeze import SqueezeReport

PREFIX = "base_model.model."
F64 = np.ndarray


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kohya(folder: Path, modules: dict[str, tuple[Tensor, Tensor]], alpha: float | None = 8.0, **more: Tensor) -> Path:
    tensors = dict(more)
    for name, (down, up) in modules.items():
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, folder / "in.safetensors", {"ss_network_dim": "16", "ss_network_alpha": "8"})
    return folder / "in.safetensors"


def kohya_deltas(path: Path) -> dict[str, F64]:
    """As sd-scripts applies them: alpha / rows of lora_down, alpha = rank where there is none."""
    tensors, deltas = load_file(path), {}
    for key, up in tensors.items():
        if key.endswith(".lora_up.weight"):
            name = key.removesuffix(".lora_up.weight")
            down = tensors[f"{name}.lora_down.weight"].double().numpy()
            alpha = float(tensors[f"{name}.alpha"]) if f"{name}.alpha" in tensors else len(down)
            deltas[name] = alpha / len(down) * up.flatten(1).double().numpy() @ down.reshape(len(down), -1)
    return deltas


def peft(folder: Path, modules: dict[str, tuple[Tensor, Tensor]], infix: str = "", **config: object) -> Path:
    """A PEFT adapter; modules named embed_* carry embedding factors."""
    source, tensors = folder / "in", {}
    source.mkdir()
    for name, pair in modules.items():
        stem = "lora_embedding_" if name.startswith("embed") else "lora_"
        end = "" if name.startswith("embed") else f"{infix}.weight"
        tensors |= {f"{PREFIX}{name}.{stem}{side}{end}": x for side, x in zip("AB", pair, strict=True)}
    save_file(tensors, source / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": sorted(modules)} | config
    (source / "adapter_config.json").write_text(json.dumps(fields))
    return source


def peft_deltas(folder: Path) -> dict[str, F64]:
    """As PEFT applies them, rank and alpha from the config; shapes that do not fit that rank would not load."""
    config = json.loads((folder / "adapter_config.json").read_text())
    deltas = {}
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, down in tensors.items():
        if ".lora_A" in key or ".lora_embedding_A" in key:
            name = key.removeprefix(PREFIX).partition(".lora_")[0]
            rank = config.get("rank_pattern", {}).get(name, config["r"])
            alpha = config.get("alpha_pattern", {}).get(name, config["lora_alpha"])
            up = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            assert down.shape[0] == up.shape[1] == rank, name
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            deltas[name] = scale * up.double().numpy() @ down.double().numpy()
    return deltas


def assert_best(before: dict[str, F64], after: dict[str, F64], rank: int, tolerance: float = 1e-4) -> None:
    assert before.keys() == after.keys()
    for name, delta in before.items():
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert np.linalg.norm(after[name] - best) <= tolerance * np.linalg.norm(s), name


def run(source: Path, rank: int, **options: object) -> tuple[Path, SqueezeReport]:
    target = source.with_name("out.safetensors" if source.suffix else "out")
    saved, report = squeeze_file(load(source), target, rank, options=Squeeze(**options))  # type: ignore[arg-type]
    return saved.path, report


LINEAR = {"lora_unet_a": (rand(0, 16, 40), rand(1, 32, 16)), "lora_unet_b": (rand(2, 16, 24), rand(3, 40, 16))}
PEFT = {"a.q": (rand(0, 16, 40), rand(1, 32, 16)), "a.v": (rand(2, 16, 24), rand(3, 40, 16))}


class TestSdScripts:
    def test_dora_is_not_copied_in_silence(self, tmp_path: Path) -> None:
        """There dora_scale is copied while the direction changes: the update is off by more than its truncation."""
        down, up = LINEAR["lora_unet_a"]
        base = rand(5, 32, 40)
        magnitude = base.norm(dim=1, keepdim=True) * 1.3
        source = kohya(tmp_path, {"lora_unet_a": (down, up)}, **{"lora_unet_a.dora_scale": magnitude})
        with pytest.raises(NeedsBaseError, match=r"lora_unet_a: .*depends on the base weight; pass --base"):
            run(source, 4)
        assert not (tmp_path / "out.safetensors").exists()
        save_file({"a.weight": base}, tmp_path / "base.safetensors")
        path, _ = run(source, 4, base=load_base(tmp_path / "base.safetensors"))

        def weight(delta: F64, scales: Tensor) -> F64:
            v = base.double().numpy() + delta
            return scales.double().numpy() * v / np.linalg.norm(v, axis=1, keepdims=True)

        wanted = weight(kohya_deltas(source)["lora_unet_a"], magnitude)
        low = kohya_deltas(path)["lora_unet_a"]
        ours = np.linalg.norm(weight(low, load_file(path)["lora_unet_a.dora_scale"]) - wanted)
        assert ours < np.linalg.norm(weight(low, magnitude) - wanted)

    def test_loha_is_not_a_silent_no_op(self, tmp_path: Path) -> None:
        """There the file comes back unchanged with ss_network_dim=4 in its metadata."""
        shapes = {"hada_w1_a": (8, 6), "hada_w1_b": (6, 9), "hada_w2_a": (8, 6), "hada_w2_b": (6, 9)}
        loha = {f"lora_unet_c.{w}": rand(i, *shape) for i, (w, shape) in enumerate(shapes.items())}
        save_file(loha, tmp_path / "in.safetensors")
        with pytest.raises(UnchangedError, match="loha has no ranks to lower; `loratools convert` makes a LoRA of it"):
            run(tmp_path / "in.safetensors", 4)
        path, report = run(kohya(tmp_path, LINEAR, **loha), 4)
        assert "loha has no ranks to lower" in report.unchanged["lora_unet_c"]
        assert all(torch.equal(load_file(path)[key], tensor) for key, tensor in loha.items())
        assert_best(kohya_deltas(tmp_path / "in.safetensors"), kohya_deltas(path), 4)

    def test_adapter_names_in_keys(self, tmp_path: Path) -> None:
        """There `.lora_A.default.weight` is passed over, and the exit code says that all is well."""
        source = peft(tmp_path, PEFT, infix=".default")
        path, report = run(source, 4)
        assert set(report.targets) == set(PEFT)
        assert_best(peft_deltas(source), peft_deltas(path), 4)
        assert set(load_file(path / "adapter_model.safetensors")) == set(
            load_file(source / "adapter_model.safetensors")
        )

    def test_a_peft_config_is_obeyed_and_rewritten(self, tmp_path: Path) -> None:
        """There `.alpha` keys are added, and adapter_config.json stays behind with the old rank."""
        source = peft(tmp_path, PEFT, lora_alpha=40, custom="kept")
        path, _ = run(source, 4)
        assert not [key for key in load_file(path / "adapter_model.safetensors") if "alpha" in key]
        config = json.loads((path / "adapter_config.json").read_text())
        assert (config["r"], config["custom"]) == (4, "kept")
        assert_best(peft_deltas(source), peft_deltas(path), 4)

    @pytest.mark.parametrize(
        ("down", "up"),
        [
            (rand(0, 16, 6, 3, 1), rand(1, 32, 16, 1, 1)),
            (rand(0, 16, 6, 1, 3), rand(1, 32, 16, 1, 1)),
            (rand(0, 16, 6, 3, 3, 3), rand(1, 32, 16, 1, 1, 1)),
            (rand(0, 16, 6, 3), rand(1, 32, 16, 1)),
            (rand(0, 16, 40), rand(1, 1, 16)),
            (rand(0, 16, 1), rand(1, 32, 16)),
        ],
        ids=["3x1 convolution", "1x3 convolution", "3-D convolution", "1-D convolution", "one output", "one input"],
    )
    def test_shapes_that_crash_there(self, tmp_path: Path, down: Tensor, up: Tensor) -> None:
        source = kohya(tmp_path, {"lora_unet_x": (down, up)})
        path, report = run(source, 4)
        rank = min(4, up.shape[0], down[0].numel())
        assert_best(kohya_deltas(source), kohya_deltas(path), rank)
        written = load_file(path)
        assert written["lora_unet_x.lora_down.weight"].shape == (rank, *down.shape[1:])
        assert written["lora_unet_x.lora_up.weight"].shape == (up.shape[0], rank, *up.shape[2:])
        assert report.targets["lora_unet_x"].rank_after == rank

    @pytest.mark.parametrize(("share", "rank"), [(0.9, 3), (0.95, 6), (0.99, 21)])
    def test_sv_fro_takes_no_rank_too_many(self, tmp_path: Path, share: float, rank: int) -> None:
        """There the ranks are one more than suffices: 4, 7 and 22."""
        kept = {0: 0, 1: 0.65, 2: 0.85, 3: 0.91, 4: 0.93, 5: 0.945, 6: 0.955, 20: 0.989, 21: 0.9905, 40: 1}
        s = np.sqrt(np.diff(np.interp(range(41), list(kept), np.square(list(kept.values())))))
        assert (np.diff(s) <= 1e-12).all()
        u, v = (np.linalg.qr(rand(i, n, 40).double().numpy())[0] for i, n in ((0, 60), (1, 50)))
        down, up = torch.from_numpy(s[:, None] * v.T).float().contiguous(), torch.from_numpy(u).float()
        adapter = load(kohya(tmp_path, {"lora_unet_a": (down, up)}, alpha=40.0))
        result, _ = squeeze(adapter, Frobenius(share))
        assert result.entries["lora_unet_a"].rank == rank

    def test_a_file_is_not_made_larger(self, tmp_path: Path) -> None:
        """There rank 4 asked to be 16 is padded with zeros, without a word."""
        small = {"lora_unet_a": (rand(0, 4, 40), rand(1, 32, 4))}
        with pytest.raises(UnchangedError, match="rank 4 is not above the chosen 16"):
            run(kohya(tmp_path, small), 16)
        assert not (tmp_path / "out.safetensors").exists()


def test_resize_lora_a_file_without_alpha(tmp_path: Path) -> None:
    """There it holds no layers; alpha missing means alpha = rank, and stays missing."""
    source = kohya(tmp_path, LINEAR, alpha=None)
    path, report = run(source, 4)
    assert set(report.targets) == set(LINEAR)
    assert_best(kohya_deltas(source), kohya_deltas(path), 4)
    assert not [key for key in load_file(path) if key.endswith(".alpha")]


class TestGradienceAndPeft:
    @pytest.mark.parametrize("mode", ["fold", "keep"])
    def test_rslora_keeps_its_strength(self, tmp_path: Path, mode: str) -> None:
        """gradience halves it from 16 to 4; PEFT's svd merge multiplies it by 4."""
        source = peft(tmp_path, PEFT, use_rslora=True)
        path, _ = run(source, 4, scale=mode)
        assert_best(peft_deltas(source), peft_deltas(path), 4)

    @pytest.mark.parametrize("mode", ["fold", "keep"])
    @pytest.mark.parametrize("rslora", [False, True])
    def test_patterns_survive(self, tmp_path: Path, mode: str, rslora: bool) -> None:
        """There they are wiped: the module of rank 4 keeps its shape, and its scale falls from 4 to 2."""
        modules = PEFT | {"b.o": (rand(7, 4, 24), rand(8, 20, 4)), "b.k": (rand(9, 8, 24), rand(10, 20, 8))}
        patterns = {"rank_pattern": {"b.o": 4, "b.k": 8}, "alpha_pattern": {"b.o": 16, "a.v": 5}}
        source = peft(tmp_path, modules, use_rslora=rslora, **patterns)
        path, report = run(source, 6, scale=mode)
        assert set(report.unchanged) == {"b.o"}
        before, after = peft_deltas(source), peft_deltas(path)
        np.testing.assert_allclose(after.pop("b.o"), before.pop("b.o"), rtol=1e-12)
        assert_best(before, after, 6)

    def test_embeddings_are_squeezed_with_the_rest(self, tmp_path: Path) -> None:
        """There their factors stay at the old rank under the new r, which no reader can load."""
        source = peft(tmp_path, PEFT | {"embed": (rand(7, 16, 50), rand(8, 12, 16))})
        path, report = run(source, 4)
        assert set(report.targets) == {*PEFT, "embed"}
        assert_best(peft_deltas(source), peft_deltas(path), 4)

    def test_one_adapter_is_enough(self, tmp_path: Path) -> None:
        """PEFT's svd combination of one adapter returns it at its old rank."""
        path, report = run(peft(tmp_path, PEFT), 4)
        assert {c.rank_after for c in report.targets.values()} == {4}
        written = load_file(path / "adapter_model.safetensors")
        assert {len(tensor) for key, tensor in written.items() if "lora_A" in key} == {4}

    def test_a_trained_magnitude_is_not_lost(self, tmp_path: Path) -> None:
        """PEFT's svd merge drops it; here DoRA needs its base, and the magnitude is written again."""
        down, up = PEFT["a.q"]
        base = rand(5, 32, 40)
        source = peft(tmp_path, {"a.q": (down, up)}, use_dora=True)
        weights = source / "adapter_model.safetensors"
        magnitude = base.norm(dim=1) * 1.3
        save_file(load_file(weights) | {f"{PREFIX}a.q.lora_magnitude_vector": magnitude}, weights)
        with pytest.raises(NeedsBaseError, match=r"a\.q: .*pass --base"):
            run(source, 15)
        save_file({"a.q.weight": base}, tmp_path / "base.safetensors")
        path, _ = run(source, 15, base=load_base(tmp_path / "base.safetensors"))
        written = load_file(path / "adapter_model.safetensors")[f"{PREFIX}a.q.lora_magnitude_vector"]
        assert written.shape == magnitude.shape
        torch.testing.assert_close(written, magnitude, rtol=0.05, atol=0)  # only refitted: hardly anything was cut off


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 1e-3),
        (torch.float16, 1.0),
        (torch.bfloat16, 1.0),
        (torch.bfloat16, 1e-22),
        (torch.bfloat16, 1e18),
    ],
)
def test_factors_of_16_bits_neither_underflow_nor_overflow(tmp_path: Path, dtype: torch.dtype, size: float) -> None:
    """No more is lost, and no other error reported, than the dtype itself costs; squares of 1e-22 vanish in float32."""
    pairs = {name: ((down * size).to(dtype), (up * size).to(dtype)) for name, (down, up) in LINEAR.items()}
    source = kohya(tmp_path, pairs)
    path, report = run(source, 4)
    before, after = kohya_deltas(source), kohya_deltas(path)
    assert_best(before, after, 4, tolerance=1e-3 if dtype == torch.float16 else 5e-3)
    for name, change in report.targets.items():
        error = np.linalg.norm(before[name] - after[name]) / np.linalg.norm(before[name])
        assert change.relative_error == pytest.approx(error, rel=1e-4)
