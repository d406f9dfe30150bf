"""LoRAM: adapters between a pruned and a full model, entry by entry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import Heads, expand, load, load_base, read_plan, restrict, save
from loratools.errors import AdapterError, InputError, LoratoolsError, UnchangedError
from loratools.ops.prune_plan import PrunePlan

# A model of 4 query heads over 2 of keys and values, 3 wide, and 10 neurons; the second pair and some neurons are gone.
HEADS = Heads(4, 2, 3)
WIDTH, NEURONS, R = 12, 10, 2
GONE = [0, 3, 9]
LAYER = "model.layers.0"
SIDES = {  # outputs, inputs, with the removed numbers of each, in the full model
    "self_attn.q_proj": (12, WIDTH, list(range(6, 12)), []),
    "self_attn.k_proj": (6, WIDTH, [3, 4, 5], []),
    "self_attn.v_proj": (6, WIDTH, [3, 4, 5], []),
    "self_attn.o_proj": (WIDTH, 12, [], list(range(6, 12))),
    "mlp.gate_proj": (NEURONS, WIDTH, GONE, []),
    "mlp.up_proj": (NEURONS, WIDTH, GONE, []),
    "mlp.down_proj": (WIDTH, NEURONS, [], GONE),
}
PLAN = {
    "version": 1,
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 3},
    "layers": {LAYER: {"neurons": {"removed": GONE}, "kv_heads": {"removed": [1]}}},
}


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plan_file(folder: Path, plan: dict[str, Any] | None = None) -> Path:
    (folder / "plan.json").write_text(json.dumps(PLAN if plan is None else plan))
    return folder / "plan.json"


def pruned_idx_folder(folder: Path, rows: list[int] | None = None) -> Path:
    """As LoRAM's pruning code saves it."""
    place = folder / "pruned"
    place.mkdir()
    torch.save({"pruned_idx": torch.tensor(GONE)}, place / f"{LAYER}.mlp.gate_proj.pt")
    torch.save({"pruned_idx": torch.tensor(rows or [3, 4, 5])}, place / f"{LAYER}.self_attn.k_proj.pt")
    return place


def peft(
    folder: Path,
    *,
    full: bool,
    dtype: torch.dtype = torch.float32,
    sides: dict[str, tuple[int, int, list[int], list[int]]] = SIDES,
    more: dict[str, torch.Tensor] | None = None,
    **config: Any,
) -> Path:
    """Layer 0 of the model, pruned or full, and an untouched module of layer 1."""
    folder.mkdir()
    tensors = dict(more or {})
    shapes = {f"{LAYER}.{m}": (o, i, a, b) for m, (o, i, a, b) in sides.items()}
    shapes["model.layers.1.mlp.up_proj"] = (NEURONS, WIDTH, [], [])
    for seed, (target, (m, n, rows, columns)) in enumerate(shapes.items()):
        m, n = (m, n) if full else (m - len(rows), n - len(columns))
        tensors[f"base_model.model.{target}.lora_A.weight"] = rand(seed, R, n).to(dtype)
        tensors[f"base_model.model.{target}.lora_B.weight"] = rand(50 + seed, m, R).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": R, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(stated | config))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["json", "kept", "files"])
def test_the_full_delta_is_the_pruned_one_where_it_was_kept(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    if kind == "files":
        plan = read_plan(pruned_idx_folder(tmp_path), HEADS)
    else:
        whole = dict(PLAN)
        if kind == "kept":
            stay = {"kept": [1, 2, 4, 5, 6, 7, 8], "size": NEURONS}
            whole["layers"] = {LAYER: {"neurons": stay, "kv_heads": {"kept": [0]}}}
        plan = read_plan(plan_file(tmp_path, whole))
    adapter = load(peft(tmp_path / "in", full=False, dtype=dtype))
    made, report = expand(adapter, plan)
    saved = save(made, tmp_path / "out")
    again = load(saved.path)
    assert (report.unchanged, report.dropped) == (1, 0.0)
    assert set(report.targets) == {f"{LAYER}.{module}" for module in SIDES}
    for target, update in again.items():
        entry, before = again.entries[target], adapter.entries[target]
        assert (entry.scale, entry.rank) == (before.scale, R)
        assert all(t.dtype == dtype for t in update.parameters().values())
        module = target.removeprefix(f"{LAYER}.")
        m, n, rows, columns = SIDES.get(module, (NEURONS, WIDTH, [], []))
        wanted = np.zeros((m, n), dtype=np.float32)
        where = np.ix_([i for i in range(m) if i not in rows], [j for j in range(n) if j not in columns])
        wanted[where] = adapter[target].delta().numpy()
        assert np.array_equal(update.delta().numpy(), wanted), target  # bit for bit
    back = save(restrict(again, plan)[0], tmp_path / "back")
    one, other = load_file(tmp_path / "in" / "adapter_model.safetensors"), load_file(back.weights)
    assert set(one) == set(other)
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def test_restricting_says_what_it_drops(tmp_path: Path) -> None:
    adapter = load(peft(tmp_path / "in", full=True))
    made, report = restrict(adapter, read_plan(plan_file(tmp_path)))
    lost = whole = 0.0
    for module, (m, n, rows, columns) in SIDES.items():
        target = f"{LAYER}.{module}"
        before = adapter[target].delta().double().numpy()
        where = np.ix_([i for i in range(m) if i not in rows], [j for j in range(n) if j not in columns])
        assert np.array_equal(made[target].delta().double().numpy(), before[where])
        gone = (before**2).sum() - (before[where] ** 2).sum()
        assert report.targets[target].dropped == pytest.approx(gone / (before**2).sum(), rel=1e-6)
        lost, whole = lost + gone, whole + (before**2).sum()
    assert report.dropped == pytest.approx(lost / whole, rel=1e-6)


def test_fused_projections_are_cut_in_all_their_parts(tmp_path: Path) -> None:
    rows = [*range(6, 12), 12 + 3, 12 + 4, 12 + 5, 18 + 3, 18 + 4, 18 + 5]
    halves = [*GONE, *(NEURONS + i for i in GONE)]
    sides: dict[str, tuple[int, int, list[int], list[int]]] = {
        "self_attn.qkv_proj": (24, WIDTH, rows, []),
        "mlp.gate_up_proj": (2 * NEURONS, WIDTH, halves, []),
    }
    adapter = load(peft(tmp_path / "in", full=False, sides=sides))
    made, _ = expand(adapter, read_plan(plan_file(tmp_path)))
    for module, (m, _, gone, _) in sides.items():
        up = made[f"{LAYER}.{module}"].parameters()["up"]
        assert [i for i in range(m) if not up[i].any()] == gone
        stay = [i for i in range(m) if i not in gone]
        assert torch.equal(up[stay], adapter[f"{LAYER}.{module}"].parameters()["up"])


def test_modules_by_name_biases_and_shapes_of_the_base(tmp_path: Path) -> None:
    bias = {f"base_model.model.{LAYER}.mlp.gate_proj.lora_B.bias": rand(9, 7)}
    sides = {"mlp.gate_proj": SIDES["mlp.gate_proj"]}
    adapter = load(peft(tmp_path / "in", full=False, sides=sides, more=bias, lora_bias=True))
    plan = {"version": 1, "modules": {"layers.0.mlp.gate_proj": {"outputs": {"removed": GONE}}}}
    save_file({f"{LAYER}.mlp.gate_proj.weight": rand(0, 11, WIDTH)}, tmp_path / "base.safetensors")
    cuts = read_plan(plan_file(tmp_path, plan))
    made, report = expand(adapter, cuts)
    found = made[f"{LAYER}.mlp.gate_proj"].parameters()["up_bias"]
    assert found[GONE].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(found[[1, 2, 4, 5, 6, 7, 8]], next(iter(bias.values())))
    assert report.targets[f"{LAYER}.mlp.gate_proj"].outputs == (7, 10)
    with pytest.raises(AdapterError, match=r"would be for \(10, 12\) where the base has \(11, 12\)"):
        expand(adapter, cuts, base=load_base(tmp_path / "base.safetensors"))


def test_names_of_other_dialects_are_placed(tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_mlp_0"
    save_file(
        {f"{name}.lora_down.weight": rand(0, 2, 5), f"{name}.lora_up.weight": rand(1, 6, 2)}, tmp_path / "k.safetensors"
    )
    adapter = load(tmp_path / "k.safetensors")
    plan = {"version": 1, "modules": {name: {"inputs": {"removed": [1]}}}}
    made, _ = expand(adapter, read_plan(plan_file(tmp_path, plan)))
    assert made[name].parameters()["down"][:, 1].tolist() == [0.0, 0.0]


def test_part_of_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 rows of keys are no whole heads of 3"):
        read_plan(pruned_idx_folder(tmp_path, [2, 3, 4]), HEADS)


def test_heads_come_from_a_config(tmp_path: Path) -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 12}
    assert Heads.from_config(config) == HEADS
    assert Heads.from_config({**config, "head_dim": 5}) == Heads(4, 2, 5)
    assert Heads.from_config({"hidden_size": 12}) is None
    with pytest.raises(InputError, match=r"model\.layers\.0: how many heads .* pass --base"):
        read_plan(pruned_idx_folder(tmp_path))
    with pytest.raises(InputError, match="4 heads over 3 of keys and values"):
        Heads(4, 3, 2)


def changed(**fields: Any) -> dict[str, Any]:
    return {**PLAN, **fields}


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (changed(version=2), "version 2 of a plan"),
        (changed(layer={}), "a plan has no 'layer'"),
        (changed(layers={LAYER: {"heads": {}}}), "has no 'heads'; there are kv_heads, neurons"),
        (changed(layers={LAYER: {"neurons": {}}}), "give either removed or kept"),
        (changed(layers={LAYER: {"neurons": {"removed": [0, 0]}}}), "names a place twice"),
        (changed(layers={LAYER: {"neurons": {"removed": [-1]}}}), "below 0"),
        (changed(layers={LAYER: {"neurons": {"removed": ["1"]}}}), "no list of whole numbers"),
        (
            changed(layers={LAYER: {"neurons": {"removed": [10], "size": 10}}}),
            "number 10 of a plan is not among the 10",
        ),
        (changed(layers={LAYER: {"kv_heads": {"removed": [2]}}}), "number 2 of a plan is not among the 2"),
        (changed(layers={LAYER: {"kv_heads": {"removed": [0], "size": 3}}}), "3 heads of keys and values where"),
        (changed(attention={"heads": 4}), "attention of a plan states heads"),
        (changed(layers=[]), "layers of a plan is no object"),
    ],
)
def test_malformed_plans_are_refused(tmp_path: Path, plan: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=f"plan.json: .*{problem}"):
        read_plan(plan_file(tmp_path, plan))


def neurons(**choice: Any) -> dict[str, Any]:
    return {"version": 1, "layers": {LAYER: {"neurons": choice}}}


@pytest.mark.parametrize(
    ("plan", "act", "problem"),
    [
        (
            neurons(removed=[0], size=NEURONS),
            expand,
            r"mlp\.\w+_proj: the adapter has 7 where the plan leaves 9 of 10",
        ),
        (neurons(kept=list(range(7))), expand, "add size"),
        (neurons(removed=[12]), expand, "number 12 of a plan is not among the 8"),
        (neurons(removed=[0], size=8), restrict, "there are 7 where the plan has 8"),
        (neurons(removed=list(range(7))), restrict, "keeps nothing"),
    ],
)
def test_plans_that_do_not_fit_are_refused(
    tmp_path: Path, plan: dict[str, Any], act: Callable[..., Any], problem: str
) -> None:
    adapter = load(peft(tmp_path / "in", full=False))
    with pytest.raises(AdapterError, match=problem):
        act(adapter, read_plan(plan_file(tmp_path, plan)))


def test_what_has_no_such_form_is_refused(tmp_path: Path) -> None:
    plan = read_plan(plan_file(tmp_path))
    magnitudes = {f"base_model.model.{LAYER}.mlp.up_proj.lora_magnitude_vector": rand(0, 7).abs()}
    sides = {"mlp.up_proj": SIDES["mlp.up_proj"]}
    dora = load(peft(tmp_path / "dora", full=False, sides=sides, more=magnitudes, use_dora=True))
    with pytest.raises(AdapterError, match="norms of pruned weights are others; convert it to LoRA first"):
        expand(dora, plan)
    bias = {f"base_model.model.{LAYER}.mlp.up_proj.base_layer.bias": rand(0, 7)}
    biased = load(peft(tmp_path / "bias", full=False, sides=sides, more=bias, bias="lora_only"))
    with pytest.raises(AdapterError, match="replaces a parameter of a module that the plan cuts"):
        expand(biased, plan)
    pissa = load(peft(tmp_path / "pissa", full=False, init_lora_weights="pissa"))
    with pytest.raises(LoratoolsError, match="trained with init_lora_weights='pissa'"):
        expand(pissa, plan)
    with pytest.raises(UnchangedError, match="cuts no target"):
        expand(load(peft(tmp_path / "in", full=False)), PrunePlan({}))
