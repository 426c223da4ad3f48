"""Tables of published runs: what is read, what is assumed, what is skipped, what is refused."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launcher.calibration import facts
from launcher.calibration.assemble import IMPOSSIBLE
from launcher.calibration.devices import DEVICES, USABLE, find_device
from launcher.calibration.rows import FITTED_ROWS, REQUIRED, Row, Sheet, family_of, parse_rows, read_rows
from launcher.config import conf_dir
from strategies.errors import ConfigError
from strategies.rules import RULES

GOOD = {
    "id": "one",
    "source": "owner/repo@abc:folder/table.md",
    "model": "GPT",
    "layers": "24",
    "hidden": "2048",
    "ffn": "8192",
    "gated_mlp": "n",
    "heads": "16",
    "kv_heads": "16",
    "vocab": "50304",
    "seq": "1024",
    "gpu": "A100-80GB",
    "gpus": "8",
    "gpus_per_node": "8",
    "tp": "2",
    "pp": "2",
    "dp": "2",
    "ep": "1",
    "cp": "1",
    "vpp": "1",
    "micro_batch": "2",
    "global_batch": "32",
    "recompute": "full",
    "seq_parallel": "n",
    "zero_stage": "1",
    "precision": "bf16",
    "flash_attn": "n",
    "outcome": "ok",
    "step_time_s": "1.5",
    "peak_mem_gb": "20",
}


SPEEDS = (
    *("flops_fp32", "flops_16", "flops_fp8", "bf16", "processors", "memory_bandwidth", "intra_bandwidth"),
    *("intra_latency_s", "intra_domain", "inter_bandwidth", "inter_latency_s", "host_bandwidth"),
)


def parse(*changes: dict[str, str], columns: tuple[str, ...] = REQUIRED) -> Sheet:
    """A table of one row per set of changes."""
    out = io.StringIO()
    extra = tuple(name for change in changes for name in change if name not in columns)
    writer = csv.DictWriter(out, [*columns, *dict.fromkeys(extra)])
    writer.writeheader()
    for number, change in enumerate(changes):
        row = {**GOOD, "id": f"row{number}", **change}
        writer.writerow({name: row.get(name, "") for name in writer.fieldnames})
    return parse_rows(out.getvalue(), "runs.csv")


def one(**changes: str) -> Row:
    """The only row of a table."""
    sheet = parse(changes)
    assert not sheet.skipped, sheet.skipped
    return sheet.rows[0]


def refusal(*changes: dict[str, str]) -> str:
    """What is said about a table with bad cells."""
    with pytest.raises(ConfigError) as caught:
        parse(*changes)
    return str(caught.value)


@pytest.fixture(scope="module")
def published() -> Sheet:
    """The rows that ship with phalanx."""
    return read_rows(FITTED_ROWS)


def test_published_rows_are_all_modelled(published: Sheet) -> None:
    assert len(published.rows) == 308
    assert published.skipped == ()
    assert sum(row.outcome == "oom" for row in published.rows) == 4
    assert sum(row.peak_bytes is not None for row in published.rows) == 41  # one of 42 calls itself implausible


def test_rules_that_rows_are_held_to_exist() -> None:
    assert {rule.__name__ for rule in RULES} >= IMPOSSIBLE


def test_published_rows_agree_with_themselves(published: Sheet) -> None:
    for row in published.rows:
        assert sum(row.plan.stages) == row.work.model.layers, row.id
        assert row.plan.rows_per_step >= row.work.batch.global_batch, row.id
        assert row.work.cluster.slots >= row.plan.world_size, row.id


def test_a_plain_row() -> None:
    row = one()
    assert (row.id, row.line, row.family) == ("row0", 2, "repo/table")
    assert row.plan.describe() == "TP2 x PP2 x DP2 ZeRO-1, micro-batch 2 x 8"
    assert (row.plan.recompute, row.plan.grad_dtype, row.plan.flash) == ("full", "fp32", False)
    assert (row.work.framework, row.work.precision, row.work.model.tied) == ("megatron", "bf16", True)
    assert (row.step_s, row.peak_bytes) == (1.5, 20 * 2**30)
    assert row.assumed == ()


@pytest.mark.parametrize(
    ("text", "precision"),
    [("amp_bf16", "bf16"), ("BF16", "bf16"), ("amp_fp8", "fp8"), ("FP8-CS", "fp8"), ("MXFP8", "fp8"), ("fp16", "fp16")],
)
def test_spellings_of_precision(text: str, precision: str) -> None:
    assert one(precision=text, gpu="H100-80GB").work.precision == precision


def test_framework_follows_what_the_code_does() -> None:
    assert one(zero_stage="3", tp="1", pp="1", dp="8").work.framework == "fsdp"
    recipe = {"precision": "FP8-CS", "gpu": "H100-80GB", "flash_attn": "y"}
    assert one(zero_stage="3", tp="1", pp="1", dp="8", **recipe).work.framework == "mcore"
    assert one(flash_attn="y").work.framework == "mcore"
    assert one(flash_attn="n").work.framework == "megatron"


def test_gradients_add_up_in_the_precision_of_their_framework() -> None:
    assert one(precision="fp16").plan.grad_dtype == "fp16"
    assert one(precision="bf16").plan.grad_dtype == "fp32"
    assert one(precision="bf16", notes="FSDP FULL_SHARD; MP mode PURE; more").plan.grad_dtype == "bf16"


def test_gated_models_are_of_the_llama_kind() -> None:
    model = one(gated_mlp="y", kv_heads="4").work.model
    assert (model.flavour, model.tied, model.has_gate, model.kv_heads) == ("llama", False, True, 4)


def test_prose_about_the_model() -> None:
    row = one(gated_mlp="n", notes="ALiBi, embedding layernorm; head_dim 64")
    assert (row.work.model.learned_positions, row.work.model.embed_norm, row.work.model.head_dim) == (0, True, 64)


def test_experts() -> None:
    notes = "first 3 layers dense; 2 shared experts; forced expert balance, dropless"
    moe = one(moe_experts="64", moe_topk="6", moe_ffn="1408", gated_mlp="y", notes=notes).work.model.moe
    assert moe is not None
    assert (moe.experts, moe.top_k, moe.ffn, moe.dense_layers, moe.shared_ffn) == (64, 6, 1408, 3, 2816)
    assert moe.imbalance == 1.0


def test_latent_attention_with_and_without_figures() -> None:
    stated = one(kv_heads="MLA", hidden="7168", notes="MLA q_lora 1024 kv_lora 256 qk 64+32 v 96")
    latent = stated.work.model.latent
    assert latent is not None
    assert (latent.q_rank, latent.kv_rank, latent.nope_width, latent.rope_width, latent.value_width) == (
        *(1024, 256, 64, 32, 96),
    )
    assert stated.assumed == ()
    typical = one(kv_heads="MLA", hidden="7168")
    assert typical.work.model.latent is not None
    assert typical.work.model.latent.q_rank == 1536
    assert "DeepSeek-V3" in typical.assumed[0]


def test_blank_pipeline_cells_are_assumed_and_said() -> None:
    row = one(id="x-interleaved", vpp="", micro_batch="", dp="2", global_batch="64")
    assert (row.plan.vpp, row.plan.schedule, row.plan.micro_batch) == (2, "interleaved", 8)
    assert row.assumed == ("vpp 2", "micro_batch 8")
    assert one(vpp="", micro_batch="", pp="1", dp="4").plan.micro_batch == 1


def test_a_blank_batch_of_a_run_that_failed() -> None:
    row = one(outcome="oom", global_batch="", micro_batch="", step_time_s="", peak_mem_gb="")
    assert (row.outcome, row.step_s, row.work.batch.global_batch) == ("oom", None, 2)


def test_tokens_per_second_stand_in_for_the_step_time() -> None:
    row = one(step_time_s="", tok_s_gpu="4096")
    assert row.step_s == pytest.approx(32 * 1024 / (4096 * 8))


def test_memory_units_and_doubt() -> None:
    assert one(notes="memory column is GiB").peak_bytes == 20 * 2**30
    assert one(notes="memory column is decimal GB").peak_bytes == 20e9
    assert one(notes="memory implausible (its twin shows 56)").peak_bytes is None
    assert one(notes="Peak ALLOCATED; reserved about 40 GB").allocated


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Omni-Path 4x100 Gb/s per node (~12.5 GB/s per 2 GPUs)", 6.25e9),
        ("Omni-Path 4x100 Gb/s per node", 6.25e9),
        ("H100 (500 W, 2.4 TB/s HBM, 400 Gb/s NIC per GPU)", 50e9),
        ("FSDP2 fp8 all-gather, 400 Gb/s per GPU", 50e9),
        ("12.5 GB/s per GPU between nodes", 12.5e9),
        ("Selene, 8 HDR-200 NICs per node", 25e9),
        ("4x HDR InfiniBand", 12.5e9),
        ("NDR400", None),
        ("1600 Gbps node-node interconnect (RoCE)", 25e9),
        ("800 Gb/s per node", 12.5e9),
        ("one node, NVLink only", None),
        ("2 nodes x 4 V100, Omni-Path", None),
    ],
)
def test_prose_about_the_network(text: str, expected: float | None) -> None:
    found = facts.network(text, 8)
    assert found == (None if expected is None else pytest.approx(expected))


def test_the_stated_network_replaces_the_usual_one() -> None:
    assert one().work.hardware.inter_bandwidth == 25e9
    assert one(notes="12.5 GB/s per GPU").work.hardware.inter_bandwidth == 12.5e9
    assert one(nic_gbps_per_gpu="50").work.hardware.inter_bandwidth == 6.25e9


def test_rows_of_one_repository_share_a_machine() -> None:
    silent = {"source": "owner/repo:other.md"}
    sheet = parse(
        {"notes": "12.5 GB/s per GPU"},
        silent,
        {**silent, "gpu": "V100-32GB", "precision": "fp16"},
        {"source": "a/b:c.md"},
    )
    found = [row.work.hardware.inter_bandwidth for row in sheet.rows]
    assert found == [12.5e9, 12.5e9, 6.25e9, 25e9]
    assert sheet.rows[1].assumed != ()
    assert sheet.rows[2].work.hardware == DEVICES["V100-32GB"][1]


def test_rows_of_one_repository_that_disagree_are_left_alone() -> None:
    sheet = parse({"notes": "12.5 GB/s per GPU"}, {"notes": "6.25 GB/s per GPU"}, {})
    assert sheet.rows[2].work.hardware.inter_bandwidth == 25e9


def test_devices_by_their_published_names() -> None:
    odd = find_device("H100-96GB-HBM2e (500 W, 2.4 TB/s HBM, 400 Gb/s NIC per GPU)")
    assert odd is not None
    assert (odd.key, odd.hardware.memory_bandwidth, odd.hardware.flops_16) == ("H100-96GB", 2.4e12, 989e12)
    assert odd.memory_bytes == pytest.approx(95.04 * 2**30)
    names = {"A100-SXM4-40GB": "A100-40GB", "NVIDIA H200": "H200", "h100": "H100-80GB", "GB200": "GB200"}
    for text, key in names.items():
        device = find_device(text)
        assert device is not None
        assert device.key == key
    assert find_device("GH200") is None
    assert find_device("RTX 4090") is None


def test_pcie_cards_have_no_nvlink() -> None:
    card = find_device("A100-80GB PCIe")
    assert card is not None
    assert card.hardware.intra_bandwidth == card.hardware.host_bandwidth


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "Gaudi 2"}, "no figures for the device 'Gaudi 2'"),
        ({"precision": "NVFP4"}, "4-bit"),
        ({"precision": "int8"}, "precision 'int8' is not known"),
        ({"recompute": "block"}, "recompute 'block' is not modelled"),
        ({"gpus": "16"}, "tp 2 x pp 2 x dp 2 x cp 1 = 8 ranks on gpus 16; nearest legal dp: 4"),
        ({"layers": ""}, "layers is empty"),
        ({"heads": "15"}, "hidden 2048 is not divisible by heads 15"),
        ({"global_batch": "2"}, "nearest legal micro_batch: 1"),
        ({"layers": "1"}, "nearest legal pp: 1"),
        ({"tp": "8", "dp": "1", "pp": "1", "heads": "4", "kv_heads": "4"}, "heads 4 is not divisible by tp 8"),
        ({"gpu": "V100-32GB"}, "bf16"),
        ({"ep": "2"}, "has no experts"),
    ],
)
def test_what_is_not_modelled_is_skipped_with_its_reason(changes: dict[str, str], reason: str) -> None:
    sheet = parse(changes, {})
    assert [row.id for row in sheet.rows] == ["row1"]
    assert reason in sheet.skipped[0].reason
    assert (sheet.skipped[0].line, sheet.skipped[0].timed, sheet.skipped[0].weighed) == (2, True, True)


def test_every_bad_cell_is_named_at_once() -> None:
    text = refusal({"tp": "two", "outcome": "okay"}, {}, {"step_time_s": "-1", "zero_stage": "4", "seq": "0.5"})
    assert text.startswith("runs.csv has 5 problems:")
    assert "line 2, column tp: 'two' is not a whole number; 1 or more" in text
    assert "line 2, column outcome: 'okay' is not a known value; Did you mean 'ok'?" in text
    assert "line 4, column step_time_s: -1 is not above 0" in text
    assert "line 4, column zero_stage: '4' is not a known value" in text
    assert "line 4, column seq: 0.5 is not a whole number of 1 or more; nearest: 1" in text


def test_names_must_differ() -> None:
    assert "line 3, column id: 'a' is also on line 2" in refusal({"id": "a"}, {"id": "a"})
    assert "column id: empty" in refusal({"id": ""})


def test_missing_columns_are_all_named() -> None:
    columns = ("id", "step_tme_s", *(name for name in REQUIRED[1:] if name not in ("tp", "gpu", "step_time_s")))
    with pytest.raises(ConfigError) as caught:
        parse({}, columns=columns)
    text = str(caught.value)
    assert "lacks 3 columns" in text
    assert "- step_time_s: is it 'step_tme_s'?" in text
    assert "- tp" in text
    assert "- gpu" in text


def test_lines_of_another_length() -> None:
    header = ",".join(REQUIRED)
    with pytest.raises(ConfigError, match=r"line 2: 2 cells, the header has \d+"):
        parse_rows(f"{header}\na,b\n", "runs.csv")
    with pytest.raises(ConfigError, match=r"line 2: \d+ cells, the header has \d+; quote a cell"):
        parse_rows(f"{header}\n{',' * 60}\n", "runs.csv")


@pytest.mark.parametrize("text", ["", ",".join(REQUIRED) + "\n"])
def test_files_without_runs(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_rows(text, "runs.csv")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(tmp_path / "binary.csv")


@pytest.mark.parametrize(
    ("source", "family"),
    [
        ("owner/repo@1a2b:a/table.png + HEAD:more", "repo/table"),
        ("owner/repo:data/truth.csv (every 12th row)", "repo/truth"),
        ("owner/repo:benchmarking/README.md + more", "repo/benchmarking"),
        ("owner/repo@4d88~1:docs/performance.md", "repo/docs"),
        ("owner/repo:README.md", "repo/README"),
        ("A paper about things, table 3", "A paper about things,"),
        ("", "unnamed"),
    ],
)
def test_families_are_named_after_their_table(source: str, family: str) -> None:
    assert family_of(source) == family


def test_a_sweep_differs_in_its_plan_only() -> None:
    first, second = parse({}, {"tp": "4", "dp": "1"}).rows
    assert first.sweep == second.sweep
    assert first.plan != second.plan
    assert one(global_batch="64").sweep != first.sweep


def test_devices_agree_with_the_clusters_of_conf() -> None:
    compared = set()
    for path in sorted((conf_dir() / "cluster").glob("*.yaml")):
        given = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(given, dict)
        if given.get("device") not in DEVICES:
            continue
        gigabytes, hardware = DEVICES[given["device"]]
        for key in SPEEDS:
            assert given["hardware"][key] == getattr(hardware, key), (path.name, key)
        assert given["device_memory_bytes"] == pytest.approx(gigabytes * USABLE * 2**30, rel=0.035), path.name
        compared.add(given["device"])
    asked = {
        "V100-16GB",
        "V100-32GB",
        "A100-40GB",
        "A100-80GB",
        "H100-80GB",
        "H200",
        "B200",
        "GB200",
        "MI300X",
        "TPUv4",
    }
    assert compared >= asked


def test_four_devices_of_a_v100_node_share_its_cards_less_than_eight() -> None:
    four = one(gpu="V100-32GB", precision="fp16", gpus_per_node="4")
    assert four.work.hardware.inter_bandwidth == 12.5e9
    assert one(gpu="V100-32GB", precision="fp16", gpus_per_node="8").work.hardware.inter_bandwidth == 6.25e9
