"""From words to a typed configuration: what is accepted, and what is said about what is not."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from launcher import build
from launcher.config import compose, conf_dir, recompose, to_yaml
from launcher.schema import GROUPS, Config
from launcher.typed import leaf_types
from strategies.errors import ConfigError, PlanInfeasible
from strategies.plan import Balance


def problem(*words: str) -> str:
    """What is said about a configuration that is wrong."""
    with pytest.raises(ConfigError) as caught:
        compose(words)
    return str(caught.value)


def test_defaults_compose() -> None:
    config = compose([])
    assert config.model.name == "gpt_tiny"
    assert config.strategy.dp is None
    assert config.run.dir == "runs"


def test_overrides_of_every_kind() -> None:
    config = compose(
        ["model=llama_tiny", "strategy.tp=2", "++train.lr=1e-4", "~train.min_lr", "strategy.stages=[1,2,1]"]
    )
    assert config.model.flavour == "llama"
    assert config.strategy.tp == 2
    assert config.train.lr == 1e-4
    assert config.train.min_lr is None
    assert config.strategy.stages == (1, 2, 1)


def test_the_command_line_wins_over_an_experiment() -> None:
    config = compose(["experiment=quickstart", "train.steps=7", "cluster.spares=3"])
    assert config.train.steps == 7
    assert config.cluster.spares == 3
    assert config.strategy.tp == 2
    assert config.experiment.require_faults


def test_unknown_names_get_the_nearest_and_the_list() -> None:
    assert "Did you mean 'gpt_tiny'?" in problem("model=gpt_tin")
    assert "llama3_8b" in problem("model=gpt_tin")
    assert "Did you mean 'micro_batch'?" in problem("strategy.microbatch=2")
    assert "Did you mean 'train.steps'?" in problem("steps=2")
    assert "Did you mean 'strategy'?" in problem("strateg={tp: 2}")
    assert "unknown key 'x'" in problem("++x=1")


def test_all_problems_at_once() -> None:
    text = problem("strategy.tq=2", "steps=3", "model=nope", "train.steps")
    assert "has 4 problems" in text
    text = problem("train.steps=abc", "train.clip=x", "strategy.schedule=1f1c")
    assert "has 3 problems" in text
    for part in ("train.steps: expected a whole number", "train.clip: expected a number", "'1f1b'"):
        assert part in text


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("train.steps=0", "expected at least 1, found 0"),
        ("strategy.zero_stage=4", "expected at most 3, found 4"),
        ("train.lr=nan", "expected a finite number"),
        ("train.lr=-1", "expected at least 0"),
        ("strategy.tp=2.5", "expected a whole number, found 2.5"),
        ("strategy.tp=0", "expected at least 1, found 0"),
        ("train.precision=fp12", "Known: bf16, fp16, fp32, fp8"),
        ("objective=cheap", "Known: cost, goodput, memory, time"),
        ("planner.framework=megatrn", "Did you mean 'megatron'?"),
        ("train.tokens=0", "expected at least 1, found 0"),
        ("model.moe=8", "expected a section, found 8"),
        ("model.moe={experts: 8, top_k: 0, ffn: 64}", "expected at least 1, found 0"),
        ("cluster.hardware.inter_latency_s=5", "expected at most 1, found 5"),
        ("cluster.hardware.failures_per_node_day=1e7", "expected at most 100, found"),
        ("train.deterministic=maybe", "expected bool, found 'maybe'"),
        ("train=5", "expected a section, found 5"),
        ("train.lr=${train.nope}", "train.nope"),
        ("run.name=../x", "is no name"),
        ("run.name=latest", "newest run"),
        ("cluster.nodes=null", "must be given"),
    ],
)
def test_wrong_values(word: str, part: str) -> None:
    text = problem(word)
    assert word.partition("=")[0] in text
    assert part in text


def test_wrong_type_in_a_file_names_the_file_and_the_key(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    mine = tmp_path / "model" / "mine.yaml"
    mine.write_text((conf_dir() / "model" / "gpt_tiny.yaml").read_text().replace("layers: 4", "layers: four"))
    text = problem(f"hydra.searchpath=[{tmp_path}]", "model=mine")
    assert f"model.layers: expected a whole number, found 'four' ({mine})" in text


def test_own_folder_of_configurations(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    text = (conf_dir() / "model" / "gpt_tiny.yaml").read_text()
    (tmp_path / "model" / "mine.yaml").write_text(text.replace("name: gpt_tiny", "name: mine"))
    assert compose([f"hydra.searchpath=[{tmp_path}]", "model=mine"]).model.name == "mine"
    assert "mine" in problem(f"hydra.searchpath=[{tmp_path}]", "model=min")
    assert "is not a folder" in problem("hydra.searchpath=[/does/not/exist]")
    (tmp_path / "model" / "broken.yaml").write_text("a: [1\nb")
    assert "not valid YAML" in problem(f"hydra.searchpath=[{tmp_path}]", "model=broken")


def test_grammar_errors_are_explained() -> None:
    assert "has no '='" in problem("train.steps")
    assert "is a sweep" in problem("train.steps=1,2")
    assert "cannot be parsed" in problem("strategy.stages=[1,2")
    assert "takes no Hydra settings" in problem("hydra.run.dir=x")
    assert "a run needs a model" in problem("~model")


def test_text_values_need_no_quotes_inside_quotes() -> None:
    config = compose(["job=script", "job.command=torchrun train.py --x=1 --list 1,2 'a b'", "run.name=12"])
    assert config.job.command == "torchrun train.py --x=1 --list 1,2 'a b'"
    assert config.run.name == "12"


def test_faults_survive_a_shell_that_eats_quotes() -> None:
    quoted = compose(['faults=["rank_kill@rank=3,step=12","node_kill@node=0,step=20"]'])
    eaten = compose(["faults=[rank_kill@rank=3,step=12,node_kill@node=0,step=20]"])
    assert quoted.faults == eaten.faults == ("rank_kill@rank=3,step=12", "node_kill@node=0,step=20")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["data=text"], "data.path: missing"),
        (["strategy=auto", "job=script", "job.command=x"], "a script brings its own parallelism"),
        (["job=script"], "job.command: missing"),
        (["job=script", "job.command=x", "faults=[rank_kill@rank=0,step=1]"], "not into scripts"),
        (
            ["strategy.pp=2", "strategy.balance=parameters", "strategy.stages=[1,3]"],
            "strategy.balance: parameters and strategy.stages=[1, 3] both say how blocks are spread",
        ),
    ],
)
def test_contradictions(words: list[str], part: str) -> None:
    assert part in problem(*words)


def test_stored_configuration_comes_back_and_takes_new_overrides(tmp_path: Path) -> None:
    first = build.settle(compose(["experiment=quickstart", "train.seed=5"]), name="r1", cwd=tmp_path)
    stored = tmp_path / "config.yaml"
    stored.write_text(to_yaml(first))
    assert recompose(stored, []) == first
    second = recompose(stored, ["cluster=process", "cluster.nodes=2", "train.lr=1e-5"])
    assert second.cluster.kind == "process"
    assert second.cluster.nodes == 2
    assert second.train.lr == 1e-5
    assert second.train.seed == 5
    with pytest.raises(ConfigError, match="experiment cannot be changed"):
        recompose(stored, ["experiment=quickstart"])
    with pytest.raises(ConfigError, match=r"train\.steps: expected"):
        recompose(stored, ["train.steps=x"])


def test_settling_makes_paths_absolute(tmp_path: Path) -> None:
    config = compose(["data=text", "data.path=sub/../x.txt", "run.dir=../runs"])
    settled = build.settle(config, name="n", cwd=tmp_path / "here")
    assert settled.run.dir == str(tmp_path / "runs")
    assert settled.data.path == str(tmp_path / "here" / "x.txt")
    assert settled.data.cache == str(tmp_path / "runs" / ".data")
    assert build.default_name(config, "20260102-030405", "ab12") == "gpt_tiny-20260102-030405-ab12"


def test_request_is_a_pure_function_of_the_configuration(tmp_path: Path) -> None:
    config = build.settle(compose(["experiment=quickstart"]), name="q", cwd=tmp_path)
    one, two = build.build_request(config, ["a"]), build.build_request(config, ["a"])
    assert one == two
    assert one.digest == two.digest
    assert one.job.plan.describe() == "TP2 x PP2 x DP2 ZeRO-1, micro-batch 2 x 4"
    assert "random" not in one.job.faults[0]
    assert one.run_dir == str(tmp_path / "runs" / "q")


def test_fault_seed_moves_the_fault(tmp_path: Path) -> None:
    faults = set()
    for seed in range(8):
        config = build.settle(compose(["experiment=quickstart", f"fault_seed={seed}"]), name="q", cwd=tmp_path)
        faults.add(build.build_request(config, []).job.faults)
    assert len(faults) > 4


LLAMA = ["model=llama3_8b", "cluster=h100", "cluster.nodes=8", "strategy.pp=8"]
LLAMA += ["train.precision=bf16", "train.global_batch=64"]


def test_stages_are_even_in_what_is_asked_for() -> None:
    """Llama 3 8B on eight stages: 32 blocks, whose vocabulary weighs as much as 2.4 of them at either end."""
    found = {balance: build.outline(compose([*LLAMA, f"strategy.balance={balance}"])) for balance in get_args(Balance)}
    stages = {balance: one.plan.stages for balance, one in found.items()}
    assert {one.broken for one in found.values()} == {()}
    assert stages["blocks"] == (4,) * 8 == build.outline(compose(LLAMA)).plan.stages
    assert stages["parameters"] == (2, 4, 4, 5, 5, 5, 5, 2)
    assert stages["time"] == (4, 4, 4, 4, 4, 4, 5, 3)
    block = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336 + 2 * 4096
    ends = [128256 * 4096, *[0] * 6, 128256 * 4096 + 4096]
    sizes = [count * block + end for count, end in zip(stages["parameters"], ends, strict=True)]
    assert sum(sizes) == 8_030_261_248
    assert max(sizes) - block <= min(sizes), "no block can move and make them more alike: of equal blocks, the best cut"


def test_infeasible_plan_lists_every_rule(tmp_path: Path) -> None:
    config = build.settle(compose(["strategy.tp=3", "strategy.pp=9"]), name="q", cwd=tmp_path)
    with pytest.raises(PlanInfeasible) as caught:
        build.build_request(config, [])
    rules = {violation.rule for violation in caught.value.violations}
    assert {"heads_divisible_by_tp", "pp_at_most_layers", "world_size_fits_cluster"} <= rules


def test_existing_cluster_too_small() -> None:
    config = compose(["cluster=existing", "cluster.address=h:1", "cluster.nodes=4", "strategy.dp=8"])
    sketch = build.outline(config, build.cluster_spec(config, (3, 2)))
    rules = {violation.rule: violation for violation in sketch.violations}
    assert "the cluster has 3 nodes x 2 slots" in rules["cluster_has_nodes"].message
    assert "strategy.dp=6" in rules["world_size_fits_cluster"].hint
    free = compose(["cluster=existing", "cluster.address=h:1"])
    assert build.cluster_spec(free, (3, 2)).slots == 6
    with pytest.raises(ConfigError, match="size of the existing cluster is not known"):
        build.cluster_spec(free)


def test_submit_needs_an_address_and_plan_does_not(tmp_path: Path) -> None:
    words = ["cluster=existing", "cluster.nodes=3", "cluster.slots_per_node=2"]
    config = build.settle(compose(words), name="q", cwd=tmp_path)
    assert build.outline(config).violations == ()
    with pytest.raises(ConfigError, match=r"cluster\.address: missing; without it .* planned for only"):
        build.build_request(config, words)


def test_sections_that_may_be_left_out_are_reached_by_overrides() -> None:
    config = compose(["model.moe={experts: 8, top_k: 2, ffn: 256}", "model.moe.experts=16", "~model.latent"])
    assert config.model.moe is not None
    assert (config.model.moe.experts, config.model.moe.top_k, config.model.moe.dense_layers) == (16, 2, 0)
    assert config.model.latent is None
    config = compose(["cluster=a100_80", "cluster.hardware.inter_bandwidth=12.5e9", "cluster.hardware.restart_s=60"])
    assert config.cluster.hardware is not None
    assert config.cluster.hardware.inter_bandwidth == 12.5e9
    assert compose(["cluster=a100_80", "cluster.hardware=null"]).cluster.hardware is None
    config = compose([f"model.moe.{size}" for size in ("experts=8", "top_k=2", "ffn=64")])
    assert config.model.moe is not None


def test_a_section_that_is_half_given_says_what_is_missing() -> None:
    text = problem("model.moe.experts=8")
    assert "model.moe.top_k: missing" in text
    assert "model.moe.ffn: missing" in text


def test_unknown_keys_of_a_section_get_its_names() -> None:
    text = problem("cluster.hardware.inter_bandwith=1e9")
    assert "unknown key 'inter_bandwith' in 'cluster.hardware'" in text
    assert "Did you mean 'inter_bandwidth'?" in text
    assert "slots_per_node" not in text
    assert "Did you mean 'top_k'?" in problem("model.moe.topk=2")


def test_a_cluster_file_with_bad_links_names_file_key_and_legal_value(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    mine = tmp_path / "cluster" / "mine.yaml"
    text = (conf_dir() / "cluster" / "a100_80.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.strip().startswith("inter_bandwidth")]
    text = "\n".join(lines).replace("intra_bandwidth: 300.0e9", "intra_bandwidth: 300")
    text = text.replace("host_bandwidth: 32.0e9", "host_bandwidth: -1.0").replace("processors: 108", "processors: many")
    mine.write_text(text.replace("storage_bandwidth: 2.0e9", "storage_bandwidth: 0"))
    said = problem(f"hydra.searchpath=[{tmp_path}]", "cluster=mine")
    assert "has 5 problems" in said
    for part in (
        f"cluster.hardware.inter_bandwidth: missing ({mine}). Bytes per second in one direction",
        f"cluster.hardware.intra_bandwidth: expected at least 1e+06, found 300.0 ({mine})",
        f"cluster.hardware.host_bandwidth: expected at least 1e+06, found -1.0 ({mine})",
        f"cluster.hardware.storage_bandwidth: expected at least 1e+06, found 0.0 ({mine})",
        f"cluster.hardware.processors: expected a whole number, found 'many' ({mine})",
    ):
        assert part in said


def test_values_out_of_bounds_and_of_a_wrong_type_come_together() -> None:
    text = problem("train.steps=0", "train.clip=x", "strategy.zero_stage=9")
    assert "has 3 problems" in text


def test_what_is_not_asked_is_left_to_the_planner() -> None:
    assert compose(["strategy.tp=2", "strategy.pp=null"]).strategy.asked()["tp"] == 2
    assert "pp" not in compose(["strategy.pp=null"]).strategy.asked()
    assert build.outline(compose(["strategy.pp=null", "strategy.schedule=null"])).plan.pp == 1


def test_the_workload_is_what_the_configuration_says() -> None:
    config = compose(["cluster=h100", "model=llama3_8b", "train.precision=bf16", "planner.framework=mcore"])
    work = build.workload(config, build.outline(config))
    assert work is not None
    assert (work.framework, work.precision, work.cluster.device) == ("mcore", "bf16", "H100-80GB")
    assert work.tokens == config.train.steps * config.train.global_batch * 8192
    config = compose(["cluster=h100", "train.tokens=1e12"])
    work = build.workload(config, build.outline(config))
    assert work is not None
    assert work.tokens == 1e12
    for words in (["cluster.hardware=null"], ["job=script", "job.command=x"]):
        config = compose(words)
        assert build.workload(config, build.outline(config)) is None


def test_other_training_code_is_judged_by_what_it_can_do(tmp_path: Path) -> None:
    words = ["strategy.pp=2", "strategy.zero_stage=3", "planner.framework=fsdp"]
    assert "zero_with_pipeline" in {one.rule for one in build.outline(compose(words[:2])).broken}
    sketch = build.outline(compose(words))
    assert sketch.broken == ()
    assert [one.rule for one in sketch.violations] == ["combination_probed"]


def test_every_key_of_the_schema_is_written_in_conf() -> None:
    """So that ``conf/`` shows all that can be set, and a key without a default is never forgotten."""
    composed = (conf_dir() / "config.yaml").read_text()
    optional = ("model.moe.", "model.latent.", "model.rope_stretch.", "cluster.hardware.", "train.ramp.")
    for leaf in (leaf for leaf in leaf_types(Config) if not leaf.startswith(optional)):
        group, _, key = leaf.partition(".")
        files = sorted((conf_dir() / group).glob("*.yaml")) if group in GROUPS and group != "experiment" else []
        texts = [path.read_text() for path in files] or [composed]
        for text in texts:
            assert f"{(key or group).rpartition('.')[2]}:" in text, leaf
    hardware = [leaf.rpartition(".")[2] for leaf in leaf_types(Config) if leaf.startswith("cluster.hardware.")]
    hardware.remove("detect_s")  # recovery.detect_s says it
    for path in (conf_dir() / "cluster").glob("*.yaml"):
        text = path.read_text()
        assert "hardware: null" in text or all(f"  {key}: " in text for key in hardware), path


def test_a_strategy_that_is_picked_replaces_that_of_the_experiment() -> None:
    config = compose(["experiment=gpt3_175b", "strategy=auto", "strategy.pp=4"])
    assert config.strategy.auto
    assert config.strategy.asked() == {"pp": 4, "grad_dtype": "fp32"}
    assert config.cluster.nodes == 128
    assert compose(["experiment=gpt3_175b"]).strategy.tp == 8
