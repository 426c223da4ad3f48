"""Every file under ``conf/`` composes and plans."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from launcher import build, calibration
from launcher.calibration.devices import DEVICES, find_device
from launcher.calibration.rows import read_rows
from launcher.config import choices_of, compose, conf_dir
from launcher.schema import GROUPS
from strategies.errors import ConfigError, PlanInfeasible
from strategies.estimate import Estimator
from strategies.rules import check
from strategies.schedule import full_batches
from strategies.specs import ModelSpec
from strategies.workload import run_tokens
from tests.support import hf_models

NEEDED = {
    "data=text": ["data.path=corpus.txt"],
    "data=mixture": ["data.sources=[{path: a.jsonl, weight: 1}]"],
    "job=evaluate": ["job.text=corpus.txt"],
    "job=generate": ["job.prompt=x"],
    "job=script": ["job.command=python train.py"],
    "cluster=existing": ["cluster.nodes=3", "cluster.slots_per_node=2"],
}
CHOICES = [f"{group}={choice}" for group in GROUPS for choice in choices_of(group)]

PUBLISHED_RUNS = Path(calibration.__file__).with_name("published_runs.csv")

# Published counts, exact to the parameter: what the named checkpoints hold (on Hugging Face, "Model size").
PUBLISHED = {
    "gpt2_small": 124_439_808,  # model card of openai-community/gpt2
    "gpt2_medium": 354_823_168,  # openai-community/gpt2-medium
    "gpt2_large": 774_030_080,  # openai-community/gpt2-large
    "gpt2_xl": 1_557_611_200,  # openai-community/gpt2-xl
    "bloom_176b": 176_247_271_424,  # model card of bigscience/bloom
    "llama2_7b": 6_738_415_616,  # meta-llama/Llama-2-7b-hf
    "llama2_13b": 13_015_864_320,  # meta-llama/Llama-2-13b-hf
    "llama2_70b": 68_976_648_192,  # meta-llama/Llama-2-70b-hf
    "llama3_8b": 8_030_261_248,  # meta-llama/Meta-Llama-3-8B
    "llama3_70b": 70_553_706_496,  # meta-llama/Meta-Llama-3-70B
    "llama3_405b": 405_853_388_800,  # meta-llama/Llama-3.1-405B
    "tinyllama_1b1": 1_100_048_384,  # TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T
    "mixtral_8x7b": 46_702_792_704,  # mistralai/Mixtral-8x7B-v0.1
    "mixtral_8x22b": 140_620_634_112,  # mistralai/Mixtral-8x22B-v0.1, vocabulary of 32,000
    "deepseek_v3": 671_026_419_200,  # deepseek-ai/DeepSeek-V3 without the multi-token prediction module
}

# Counts that papers give rounded: billions, and how far they are rounded (relative).
ROUNDED = {
    # Brown et al., arXiv 2005.14165, Table 2.1
    "gpt3_125m": (0.125, 0.003),
    "gpt3_350m": (0.350, 0.02),
    "gpt3_760m": (0.760, 0.001),
    "gpt3_1b3": (1.3, 0.02),
    "gpt3_2b7": (2.7, 0.02),
    "gpt3_6b7": (6.7, 0.01),
    "gpt3_13b": (13.0, 0.012),  # the table's hidden width of 5140 is no multiple of its 40 heads; ours is 5120
    "gpt3_175b": (175.0, 0.003),
    # Narayanan et al., arXiv 2104.04473, Table 1
    "megatron_1b7": (1.7, 0.03),
    "megatron_3b6": (3.6, 0.011),
    "megatron_7b5": (7.5, 0.005),
    "megatron_18b": (18.4, 0.003),
    "megatron_39b": (39.1, 0.001),
    "megatron_76b": (76.1, 0.001),
    "megatron_145b": (145.6, 0.0005),
    "megatron_310b": (310.1, 0.0005),
    "megatron_530b": (529.6, 0.0001),
    "megatron_1t": (1008.0, 0.0001),
    "mtnlg_530b": (530.0, 0.001),  # arXiv 2201.11990
    "opt_175b": (175.0, 0.003),  # arXiv 2205.01068
    "glm_130b": (130.0, 0.011),  # arXiv 2210.02414
    "switch_1t6": (1571.0, 0.0001),  # arXiv 2101.03961, Table 9
    "gpt4_1800b": (1800.0, 0.02),  # public accounts
}

# Billions of parameters that a token passes through.
ACTIVE = {
    "mixtral_8x7b": (12.9, 0.005),  # arXiv 2401.04088, section 2.1
    "mixtral_8x22b": (39.0, 0.005),  # Mistral AI's announcement
    "deepseek_v3": (37.0, 0.02),  # arXiv 2412.19437, abstract
    "gpt4_1800b": (280.0, 0.01),  # public accounts
    "llama2_7b": (6.738, 0.001),  # dense: all
}


def test_every_file_is_a_choice() -> None:
    files = {path.relative_to(conf_dir()) for path in conf_dir().rglob("*.yaml")}
    assert files == {Path("config.yaml"), *(Path(f"{c.replace('=', '/')}.yaml") for c in CHOICES)}
    assert {path.name for path in conf_dir().iterdir() if path.is_dir()} == set(GROUPS)


def _weights(choice: str, folder: Path) -> list[str]:
    """A model that exists, for the jobs that only compute with one."""
    if choice not in ("job=evaluate", "job=generate"):
        return []
    hf_models.make(folder / "hf", "llama")
    return [f"job.weights={folder / 'hf'}"]


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice != "strategy=auto"])
def test_composes_and_plans(choice: str, tmp_path: Path) -> None:
    """It can be planned with; it can be submitted, too, unless it is modelled only: then submit says so."""
    config = compose([choice, *NEEDED.get(choice, []), *_weights(choice, tmp_path)])
    sketch = build.outline(config)
    assert sketch.broken == ()
    settled = build.settle(config, name="run", cwd=tmp_path)
    if sketch.violations:
        with pytest.raises(PlanInfeasible, match="modelled only"):
            build.build_request(settled, [choice])
        return
    if config.cluster.kind == "existing":
        with pytest.raises(ConfigError, match=r"cluster\.address: missing"):
            build.build_request(settled, [choice])
        settled = replace(settled, cluster=replace(settled.cluster, address="10.0.0.1:6379"))
    assert build.build_request(settled, [choice]).job.plan.world_size >= 1


def test_auto_leaves_every_choice_open_but_the_precision_of_sums() -> None:
    config = compose(["strategy=auto"])
    assert config.strategy.auto
    assert config.strategy.asked() == {"grad_dtype": "fp32"}
    assert compose(["strategy=auto", "strategy.grad_dtype=null"]).strategy.asked() == {}


def test_file_and_choice_have_one_name() -> None:
    for group in ("model", "cluster"):
        for choice in choices_of(group):
            assert f"\nname: {choice}\n" in (conf_dir() / group / f"{choice}.yaml").read_text()


@pytest.mark.parametrize(("model", "parameters"), PUBLISHED.items())
def test_parameter_counts_are_those_that_are_published(model: str, parameters: int) -> None:
    assert _model(model).parameters == parameters


def test_rounded_counts_are_those_of_the_papers() -> None:
    for model, (billions, tolerance) in ROUNDED.items():
        assert _model(model).parameters / 1e9 == pytest.approx(billions, rel=tolerance), model
    for model, (billions, tolerance) in ACTIVE.items():
        assert _model(model).active_parameters / 1e9 == pytest.approx(billions, rel=tolerance), model
    tiny = {"gpt_tiny", "llama_tiny", "moe_tiny"}
    assert set(choices_of("model")) == {*PUBLISHED, *ROUNDED, *tiny}


def test_gpt4_adds_up_as_in_the_accounts() -> None:
    model = _model("gpt4_1800b")
    assert model.moe is not None
    assert model.layers * model.attention_parameters / 1e9 == pytest.approx(55, rel=0.02)
    assert model.layers * model.expert_parameters / 1e9 == pytest.approx(111, rel=0.01)
    flops = 6 * model.active_parameters * 13e12
    assert flops == pytest.approx(2.15e25, rel=0.02)


def test_experts_are_kept_evenly_loaded() -> None:
    """Every named model with experts is trained with a balance loss; whose, and how much, its file says."""
    weights = {name: _model(name).moe for name in choices_of("model")}
    found = {name: (moe.balance_weight, moe.z_weight) for name, moe in weights.items() if moe is not None}
    assert found == {
        "deepseek_v3": (0.0001, 0),
        "gpt4_1800b": (0.01, 0.001),
        "mixtral_8x22b": (pytest.approx(0.001 * 2 / 56), 0),
        "mixtral_8x7b": (pytest.approx(0.02 * 2 / 32), 0),
        "moe_tiny": (0.01, 0.001),
        "switch_1t6": (0.01, 0),
    }


@cache
def _model(name: str) -> ModelSpec:
    return build.model_spec(compose([f"model={name}"]))


KEYS = {
    "v100_16": "V100-16GB",
    "v100_32": "V100-32GB",
    "a100_40": "A100-40GB",
    "a100_80": "A100-80GB",
    "h100": "H100-80GB",
    "h200": "H200",
    "b200": "B200",
    "gb200": "GB200",
    "mi300x": "MI300X",
    "tpu_v4": "TPUv4",
    "local": "CPU",
    "process": "CPU",
}


def test_clusters_have_the_figures_that_planning_needs() -> None:
    assert set(choices_of("cluster")) == {*KEYS, "existing"}
    for name, key in KEYS.items():
        machine = build.cluster_spec(compose([f"cluster={name}"]))
        assert machine.device == key
        assert machine.hardware is not None
        assert machine.hardware.flops_16 >= machine.hardware.flops_fp32
        assert (machine.hardware.flops_fp8 > 0) == (key in {"H100-80GB", "H200", "B200", "GB200", "MI300X"})
        assert machine.hardware.measured == (key == "CPU"), "figures of data sheets are not what programs get"
        if key != "CPU":
            assert machine.device_memory_bytes > 0
            if key.endswith("GB"):  # less than is marketed, and not much
                assert 0.97 < machine.device_memory_bytes / (int(key[-4:-2]) * 2**30) < 1
            assert machine.hardware.price_per_device_hour > 0
            assert 0 < machine.hardware.failures_per_node_day < 0.05
            assert machine.hardware.memory_bandwidth > machine.hardware.intra_bandwidth
            assert machine.hardware.intra_bandwidth > machine.hardware.inter_bandwidth


def test_clusters_and_published_runs_describe_the_same_devices() -> None:
    """The calibration is fitted with one set of data sheets and used with the other."""
    for name, key in KEYS.items():
        machine = build.cluster_spec(compose([f"cluster={name}"]))
        if key not in DEVICES or machine.hardware is None:
            continue
        _, fitted = DEVICES[key]
        for figure in ("flops_fp32", "flops_16", "flops_fp8", "bf16", "processors", "memory_bandwidth"):
            assert getattr(machine.hardware, figure) == getattr(fitted, figure), (name, figure)
        for figure in ("intra_bandwidth", "intra_latency_s", "intra_domain", "inter_latency_s"):
            assert getattr(machine.hardware, figure) == getattr(fitted, figure), (name, figure)
        found = find_device(key)
        assert found is not None
        assert machine.device_memory_bytes == pytest.approx(found.memory_bytes, rel=0.04), name


def test_the_plans_of_published_runs_are_legal() -> None:
    for row in read_rows(PUBLISHED_RUNS).rows:
        work = row.work
        broken = check(
            model=work.model,
            plan=row.plan,
            batch=work.batch,
            cluster=work.cluster,
            precision=work.precision,
            modelled=True,
            engine=False,
        )
        assert broken == (), row.id


def test_every_figure_of_a_cluster_says_where_it_is_from() -> None:
    """Prices, failure rates, memory and peaks have a comment on their line or on the one before."""
    for name in KEYS:
        lines = (conf_dir() / "cluster" / f"{name}.yaml").read_text().splitlines()
        for before, line in pairwise(lines):
            key = line.strip().partition(":")[0]
            if key in ("flops_16", "price_per_device_hour", "failures_per_node_day", "device_memory_bytes"):
                assert "#" in line + before or KEYS[name] == "CPU", (name, line)


def test_gpt3_warms_up_over_the_tokens_of_its_account() -> None:
    """Over the first 375 M tokens (appendix B): thousands of the small steps that the batch begins with."""
    config = compose(["experiment=gpt3_175b"])
    batch, train = build.batch_spec(config), build.train_spec(config)
    params = build.outline_deepspeed(config, build.outline(config).plan)["scheduler"]["params"]  # type: ignore[index]
    assert params["total_num_steps"] - 1 == pytest.approx(300e9 / (1536 * 2048), rel=1e-4), "in full batches"
    first = next(step for step in range(1, train.steps) if full_batches(batch, step) >= train.warmup_steps)
    assert run_tokens(batch, first) == pytest.approx(375e6, rel=0.01)
    assert first > 6000


INTERLEAVED = ("strategy.schedule=interleaved", "strategy.vpp=8")


def test_the_reference_runs_have_the_sizes_of_their_accounts() -> None:
    gpt3 = build.outline(compose(["experiment=gpt3_175b"]))
    assert gpt3.violations == ()
    assert (gpt3.plan.world_size, gpt3.batch.tokens) == (1024, 1536 * 2048)
    gpt4 = build.outline(compose(["experiment=gpt4_1800b"]))
    assert (gpt4.plan.tp, gpt4.plan.pp, gpt4.plan.zero_stage, gpt4.plan.world_size) == (8, 15, 1, 24_960)
    assert 8 * (gpt4.cluster.nodes + gpt4.cluster.spares) == 25_000
    assert gpt4.batch.tokens <= 60e6
    longer = build.outline(compose(["experiment=gpt4_1800b_32k"]))
    assert (longer.batch.seq, longer.batch.tokens) == (4 * gpt4.batch.seq, gpt4.batch.tokens)
    assert longer.model.parameters == gpt4.model.parameters
    assert longer.model.rope_theta > 4 * gpt4.model.rope_theta
    assert gpt4.cluster.hardware is not None
    assert gpt4.cluster.hardware.price_per_device_hour == 1
    llama = build.outline(compose(["experiment=llama3_405b"]))
    assert (llama.plan.world_size, llama.batch.global_batch, sum(llama.plan.stages)) == (8192, 2048, 126)
    most = build.outline(compose(["experiment=llama3_405b", "cluster.nodes=2048", "strategy.dp=128", *INTERLEAVED]))
    assert (most.plan.world_size, most.batch, most.broken) == (16_384, llama.batch, ())


@pytest.mark.parametrize("name", ["gpt3_175b", "gpt4_1800b", "gpt4_1800b_32k", "llama3_405b"])
def test_the_reference_runs_can_run(name: str) -> None:
    """What can only be modelled would be refused by submit."""
    assert build.outline(compose([f"experiment={name}"])).violations == ()


def test_gpt4_uses_as_much_of_the_peak_as_in_the_accounts() -> None:
    """32 to 36 %, with the schedule that runs; the interleaved one, which the file names for planning, is faster."""
    used = {}
    for words in ((), INTERLEAVED):
        config = compose(["experiment=gpt4_1800b", *words])
        sketch = build.outline(config)
        work = build.workload(config, sketch)
        assert work is not None
        assert sketch.broken == ()
        used[words] = Estimator(work).estimate(sketch.plan).mfu
    assert 0.32 <= used[()] <= 0.36
    assert used[INTERLEAVED] > used[()]


@pytest.mark.parametrize(
    "name",
    ["gpt3_175b", "gpt4_1800b", "gpt4_1800b_32k", "llama3_405b", "instructgpt_sft", "instructgpt_ppo"],
)
def test_steps_and_tokens_of_an_experiment_agree(name: str) -> None:
    config = compose([f"experiment={name}"])
    work = build.workload(config, build.outline(config))
    assert work is not None
    assert config.train.tokens == work.tokens
    steps = config.train.steps
    assert run_tokens(work.batch, steps - 1) < work.tokens <= run_tokens(work.batch, steps)
    if config.train.ramp is None:
        assert steps == math.ceil(work.tokens / work.batch.tokens)


@pytest.mark.parametrize("name", choices_of("experiment"))
def test_every_experiment_fits_its_cluster(name: str) -> None:
    config = compose([f"experiment={name}"])
    sketch = build.outline(config)
    work = build.workload(config, sketch)
    assert work is not None
    assert sketch.broken == ()
    assert Estimator(work).estimate(sketch.plan).fits


def test_the_stages_of_instructgpt_are_the_work_of_the_paper() -> None:
    """4.9 and 60 PFLOP/s-days (arXiv 2203.02155, section 5.1), as dense runs of 6 FLOPs per parameter and token."""
    for name, days in (("instructgpt_sft", 4.9), ("instructgpt_ppo", 60)):
        config = compose([f"experiment={name}"])
        assert config.train.tokens is not None
        flops = 6 * build.model_spec(config).parameters * config.train.tokens
        assert flops / 8.64e19 == pytest.approx(days, rel=0.005)


def test_quickstart_is_the_main_job() -> None:
    config = compose(["experiment=quickstart"])
    sketch = build.outline(config)
    plan = sketch.plan
    assert (plan.tp, plan.pp, plan.dp, plan.zero_stage, plan.world_size) == (2, 2, 2, 1, 8)
    assert (config.cluster.kind, config.cluster.nodes, config.cluster.slots_per_node) == ("local", 4, 2)
    assert config.cluster.spares == 1
    assert 1_000_000 <= sketch.model.parameters <= 5_000_000
    assert config.tracking.mode == "offline"
    assert config.faults
    assert config.experiment.require_faults


def test_the_quickstart_with_experts_spreads_them_inside_of_the_main_job() -> None:
    sketch = build.outline(compose(["experiment=moe_quickstart"]))
    plan, moe = sketch.plan, sketch.model.moe
    assert sketch.violations == ()
    assert (plan.tp, plan.pp, plan.dp, plan.ep, plan.zero_stage, plan.world_size) == (2, 2, 2, 2, 1, 8)
    assert moe is not None
    assert (moe.routing, moe.capacity_factor) == ("softmax", 0)
    # as many parameters per token as the dense model, but for the routers and the narrower experts' second bias
    dense = _model("gpt_tiny").active_parameters
    assert sketch.model.active_parameters == pytest.approx(dense, rel=0.01)
    assert sketch.model.parameters > 2 * dense
