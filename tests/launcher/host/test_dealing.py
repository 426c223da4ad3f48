"""Nodes that share a machine do not share its devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from launcher import backends, build
from launcher.config import compose
from launcher.drill.changes import changes_text
from launcher.drill.toy import SUBMIT, shrink
from launcher.host import dealing
from launcher.host.accelerator import Devices
from launcher.host.dealing import DEALT, deal
from launcher.request import LaunchRequest
from tests.support.agents import Agents


def gpus(*ids: str) -> Devices:
    return Devices(accelerator="cuda", variables=("CUDA_VISIBLE_DEVICES",), ids=ids)


EIGHT = gpus(*map(str, range(8)))


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("slots", [1, 2])
def test_every_slot_has_a_device_of_its_own(nodes: int, slots: int) -> None:
    one = deal(EIGHT, nodes=nodes, slots=slots)
    given = dealing.read(one.environment[DEALT])
    mine = [given(str(node))["CUDA_VISIBLE_DEVICES"].split(",") for node in range(nodes)]
    assert [len(share) for share in mine] == [slots] * nodes
    assert len({device for share in mine for device in share}) == nodes * slots
    assert one.environment["DS_ACCELERATOR"] == "cuda"


def test_what_somebody_else_left_us_is_dealt() -> None:
    one = deal(gpus("6", "2", "GPU-5", "7", "1"), nodes=2, slots=2)
    assert one.environment[DEALT] == "CUDA_VISIBLE_DEVICES=6,2;GPU-5,7"
    assert one.note == "devices of this machine, node by node: CUDA 6,2 | GPU-5,7"


def test_all_variables_that_choose_agree() -> None:
    amd = Devices(accelerator="cuda", variables=("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"), ids=("4", "5"))
    given = dealing.read(deal(amd, nodes=2, slots=1).environment[DEALT])
    assert given("1") == {"HIP_VISIBLE_DEVICES": "5", "CUDA_VISIBLE_DEVICES": "5"}


def test_where_there_are_too_few_all_compute_on_the_cpu() -> None:
    one = deal(gpus("0"), nodes=2, slots=4)
    assert one.environment == {"DS_ACCELERATOR": "cpu"}
    assert one.note == "the ranks compute on the CPU: this machine has 1 device for 8 slots"


def test_without_devices_there_is_nothing_to_say() -> None:
    one = deal(None, nodes=2, slots=4)
    assert (one.environment, one.note) == ({}, "")
    assert dealing.read("")("0") == {}


# --- what is done with it -----------------------------------------------------------------------------------------


Kind = Literal["process", "local", "existing"]


def request_of(kind: Kind) -> LaunchRequest:
    config = compose(["cluster=process", "cluster.nodes=2", "cluster.slots_per_node=2", "strategy.dp=4", "run.dir=/r"])
    request = build.build_request(build.settle(config, name="x", cwd=Path("/")), ())
    return replace(request, cluster=replace(request.cluster, kind=kind, spares=1))


@pytest.mark.parametrize(("kind", "dealt"), [("process", True), ("local", True), ("existing", False)])
def test_only_nodes_that_we_start_here_are_dealt_to(kind: Kind, dealt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "devices", lambda environment: EIGHT)
    expected = {"DS_ACCELERATOR": "cuda", DEALT: "CUDA_VISIBLE_DEVICES=0,1;2,3"} if dealt else {}
    assert backends.agent_options(request_of(kind))["env"] == expected


def test_a_rehearsal_says_what_it_computes_on() -> None:
    config = compose(["experiment=gpt3_175b"])

    def row(found: Devices | None) -> str:
        text = changes_text(shrink(config, found=found).changes)
        return " ".join(next(line for line in text.splitlines() if line.startswith("cluster.device ")).split())

    was = config.cluster.device
    assert row(None) == f"cluster.device {was} CPU this machine has no device for ranks"
    assert row(gpus("0", "1")) == f"cluster.device {was} CPU this machine has 2 devices for 8 slots"
    assert row(EIGHT) == f"cluster.device {was} CUDA 0,1,2,3 | 4,5,6,7 on this machine, node by node"


@pytest.mark.timeout(60)
def test_a_spare_takes_the_devices_with_the_place(agents: Agents) -> None:
    agents.environment = deal(gpus("6", "2", "5", "7"), nodes=2, slots=2).environment
    names = ("n0", "n1", "n2")
    for node in names:
        agents.start(node)
    watcher = agents.watch(*names)
    expected = {0: "6,2", 1: "6,2", 2: "5,7", 3: "5,7"}
    for attempt, (first, second) in enumerate((("n0", "n1"), ("n2", "n1")), start=1):
        watcher.spawn(attempt, {first: [0, 1], second: [2, 3]}, FAKE="look,done")
        for rank, devices in expected.items():
            ended = watcher.until_kind("exit", rank=rank, attempt=attempt).data
            assert f'"CUDA_VISIBLE_DEVICES": "{devices}"' in ended["log_tail"]
            assert '"DS_ACCELERATOR": "cuda"' in ended["log_tail"]
            assert DEALT not in ended["log_tail"]


def test_runs_that_are_compared_are_deterministic_on_devices() -> None:
    config = compose(["experiment=gpt3_175b", "train.deterministic=false"])
    assert not shrink(config).config.train.deterministic, "a CPU is, anyway"
    assert shrink(config, found=EIGHT).config.train.deterministic
    assert not shrink(config, SUBMIT, EIGHT).config.train.deterministic
