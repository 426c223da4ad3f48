"""From the records of ranks to a cluster file that composes: medians, shared links, stragglers, and what is missing."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.paths import RunPaths
from jobs.probe import FOLDER
from launcher import probe
from launcher.config import compose
from launcher.follow import Screen
from launcher.probe_results import Probed, device_key, summarise
from launcher.render_probe import cluster_yaml, probe_document, probe_text, remarks
from launcher.store import RunStore
from strategies.errors import ConfigError, StorageError
from strategies.hardware import Hardware
from strategies.specs import ClusterSpec
from tests.support.cli import PHALANX, phalanx

MIB = 1 << 20


def record(rank: int, *, slots: int = 2, speed: float = 1.0, machine: str = "", **changes: Any) -> dict[str, Any]:
    """What a rank leaves that multiplies at 100 TFLOP/s in 16 bits."""
    node = rank // slots
    rates = [("fp32", 256, 20e12), ("fp32", 512, 50e12), ("bf16", 256, 60e12), ("bf16", 512, 100e12)]
    return {
        "rank": rank,
        "node_rank": node,
        "host": f"host{node}",
        "machine": machine or f"boot{node}",
        "device": "NVIDIA A100-SXM4-80GB",
        "backend": "nccl",
        "devices": 2,
        "processors": 108,
        "memory_bytes": 80 * 10**9,
        "host_memory_bytes": 10**12,
        "bf16": True,
        "torch": "2.9",
        "matmul": [{"dtype": d, "shape": [n, n, n], "flops": speed * rate} for d, n, rate in rates],
        "memory_bandwidth": 1.7e12,
        "host_bandwidth": 24e9,
        "disk_alone": [1000, 1e-6 if rank == 0 else 2e-6] if node == 0 else None,
        "disk_together": [1000, 4e-6],
        "local_folder": "/nvme",
        **({name: times(2e-6 if rank else 1e-6) for name in ("store", "local")} if node == 0 else {}),
        "links": {},
        **changes,
    }


def times(seconds: float, *, direct: bool = True) -> dict[str, Any]:
    """Of a disk that reads four times as fast as it writes."""
    return {"size": 1000, "write_s": seconds, "read_s": seconds / 4, "direct": direct}


def link(shared: float, *, alone: bool) -> dict[str, Any]:
    curve = {"latency_s": 5e-6, "curve": [[4096, 1e8], [64 * MIB, 2 * shared]]}
    return (curve if alone else {}) | {"shared": shared}


def records(nodes: int = 3, **changes: Any) -> list[dict[str, Any]]:
    found = [record(rank, **changes) for rank in range(2 * nodes)]
    found[0]["links"] = {"intra": link(200e9, alone=True), "inter": link(20e9, alone=True)}
    found[1]["links"] = {"intra": {}, "inter": link(10e9, alone=False)}
    if nodes == 1:
        for one in found:
            one["links"].pop("inter")
            one["disk_together"] = None
    return found


def probed(nodes: int = 3) -> Probed:
    return summarise(records(nodes), detect_s=7.0)


def written(found: Probed, folder: Path, name: str = "mine") -> Path:
    """The cluster file in a folder of the user's."""
    spec = ClusterSpec(name="x", kind="existing", nodes=3, slots_per_node=2, address="10.0.0.1:6379")
    file = folder / "cluster" / f"{name}.yaml"
    file.parent.mkdir()
    file.write_text(cluster_yaml(found, spec, name=name, device="A100-80GB", when="today", quick=True))
    return file


def test_figures_are_medians_of_all_devices_and_shares_of_the_links() -> None:
    rows = records()
    rows[4]["memory_bandwidth"] = 1.0
    found = summarise(rows, detect_s=7.0)
    values = {key: figure.value for key, figure in found.figures.items()}
    assert list(values) == [field.name for field in dataclasses.fields(Hardware)]
    assert (values["flops_fp32"], values["flops_16"], values["flops_fp8"]) == (50e12, 100e12, 0.0)
    assert "bf16 matmul 512 x 512 x 512" in found.figures["flops_16"].note
    assert (values["memory_bandwidth"], values["host_bandwidth"]) == (1.7e12, 24e9)
    assert (values["intra_bandwidth"], values["intra_latency_s"]) == (200e9, 5e-6)
    assert values["inter_bandwidth"] == 15e9, "what each device gets while all talk"
    assert values["storage_bandwidth"] == pytest.approx(1e9), "all bytes until the last writer of the node is done"
    assert values["storage_total_bandwidth"] == pytest.approx(1.5e9), "three nodes share a bottleneck"
    assert values["detect_s"] == 7.0
    assert found.of_source("fill in") == ["price_per_device_hour", "failures_per_node_day"]
    assert not found.missing


def test_the_local_disk_is_that_of_a_node_read_and_written_in_turn() -> None:
    figure = probed().figures["disk_bandwidth"]
    assert figure.source == "measured"
    assert figure.value == pytest.approx(2 / (1 / 1e9 + 1 / 4e9)), "2,000 bytes in 2 us and in 0.5 us"
    assert figure.note.startswith("in /nvme, 2 ranks of one node: write and fsync 1 GB/s, read 4 GB/s, past the page")
    assert "; read at 4 GB/s, past the page cache" in probed().figures["storage_bandwidth"].note
    dropped = summarise([one | {"local": times(1e-6, direct=False)} for one in records()], detect_s=5.0)
    assert "after dropping it from the page cache" in dropped.figures["disk_bandwidth"].note


def test_a_local_folder_that_is_no_disk_leaves_the_assumption_and_says_why() -> None:
    rows = [one | {"local": {"error": "/tmp is memory (tmpfs), no disk"}} for one in records()]
    figure = summarise(rows, detect_s=5.0).figures["disk_bandwidth"]
    assert (figure.value, figure.source) == (3e9, "assumed")
    assert figure.note == "one NVMe disk; not measured: /tmp is memory (tmpfs), no disk"


def test_storage_that_nodes_do_not_share_grows_with_them() -> None:
    rows = [one | {"disk_together": [1000, 2e-6]} for one in records()]
    assert summarise(rows, detect_s=5.0).figures["storage_total_bandwidth"].value == 0.0


def test_memory_of_a_cpu_is_the_hosts_over_its_ranks() -> None:
    found = summarise(
        [record(rank, memory_bytes=0, machine="one", host_bandwidth=None) for rank in range(4)], detect_s=5.0
    )
    assert found.device_memory_bytes == 10**12 // 4
    assert found.figures["host_bandwidth"].value == 1.7e12 / 2


@pytest.mark.parametrize(("speed", "named"), [(0.89, True), (0.91, False)])
def test_a_node_more_than_a_tenth_slower_than_the_median_is_named(speed: float, named: bool) -> None:
    rows = records()
    rows[3] = record(3, speed=speed)
    found = summarise(rows, detect_s=5.0)
    assert [(one.host, one.node_rank) for one in found.stragglers or ()] == ([("host1", 1)] if named else [])
    assert any("STRAGGLER: node 1 (host1)" in line for line in remarks(found)) is named


def test_nodes_on_one_machine_are_not_compared() -> None:
    rows = records(machine="one")
    rows[3] = record(3, speed=0.1, machine="one")
    found = summarise(rows, detect_s=5.0)
    assert found.stragglers is None
    assert "The 3 nodes share 1 machine" in "\n".join(remarks(found))


def test_the_file_composes_to_what_was_measured(tmp_path: Path) -> None:
    found = probed()
    file = written(found, tmp_path)
    cluster = compose([f"hydra.searchpath=[file://{tmp_path}]", "cluster=mine"]).cluster
    assert (cluster.name, cluster.kind, cluster.address) == ("mine", "existing", "10.0.0.1:6379")
    assert (cluster.nodes, cluster.slots_per_node, cluster.device) == (3, 2, "A100-80GB")
    assert cluster.device_memory_bytes == 80 * 10**9
    assert cluster.hardware is not None
    assert cluster.hardware.measured
    for key, figure in found.figures.items():
        assert getattr(cluster.hardware, key) == pytest.approx(figure.value, rel=1e-4), key
    assert file.read_text().count("not measurable: fill in") == 2
    assert probe.command_of(file, found.missing) == f"phalanx plan 'hydra.searchpath=[file://{tmp_path}]' cluster=mine"


def test_what_one_node_cannot_show_is_asked_for(tmp_path: Path) -> None:
    found = probed(nodes=1)
    assert found.missing == ["inter_bandwidth", "inter_latency_s"]
    file = written(found, tmp_path)
    words = [f"hydra.searchpath=[file://{tmp_path}]", "cluster=mine"]
    with pytest.raises(ConfigError) as refused:
        compose(words)
    assert all(f"cluster.hardware.{key}" in str(refused.value) for key in found.missing)
    given = compose([*words, "cluster.hardware.inter_bandwidth=1e9", "cluster.hardware.inter_latency_s=1e-5"])
    assert given.cluster.hardware is not None
    assert given.cluster.hardware.inter_bandwidth == 1e9
    assert "cluster.hardware.inter_bandwidth=VALUE" in probe.command_of(file, found.missing)
    assert "since there is one node only: inter_bandwidth, inter_latency_s" in probe_text(found)


def test_the_text_shows_every_table_and_the_document_every_figure() -> None:
    found = probed()
    text = probe_text(found)
    for line in ("512 x 512 x 512    50   100", "64 MiB", "all devices at once, each", "disk, all nodes", "fill in"):
        assert line in text
    assert re.search(r"^local disk +1\.6  in /nvme, 2 ranks", text, re.MULTILINE)
    document = probe_document(found, file="f", command="c", name="n", device="A100-80GB")
    assert document["figures"]["flops_16"]["source"] == "measured"
    assert document["stragglers"] == []
    assert document["device_name"] == "NVIDIA A100-SXM4-80GB"


@pytest.mark.parametrize(
    ("reported", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA GB200", "GB200"),
        ("cpu", "CPU"),
        ("B200", "B200"),
        ("Gaudi 3", "Gaudi 3"),
    ],
)
def test_devices_are_known_by_the_names_of_the_planner(reported: str, key: str) -> None:
    assert device_key(reported, ["A100-80GB", "A100-40GB", "B200", "GB200", "CPU"]) == key


def test_shipped_cluster_files_name_their_devices() -> None:
    assert {"A100-80GB", "GB200"} <= set(probe.known_devices())
    assert device_key("cpu", probe.known_devices()).lower() == "cpu"


def test_where_the_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert probe.target_of(None, None, force=False) == (tmp_path / "conf/cluster/probed.yaml", "probed")
    assert probe.target_of(None, "mine", force=False) == (tmp_path / "conf/cluster/mine.yaml", "mine")
    assert probe.target_of("a/b.yaml", None, force=False) == (tmp_path / "a/b.yaml", "b")
    (tmp_path / "b.yaml").write_text("precious")
    for arguments in ({"out": "b.yaml", "name": None}, {"out": "b.txt", "name": None}, {"out": None, "name": "../b"}):
        with pytest.raises(ConfigError):
            probe.target_of(**arguments, force=False)
    assert probe.target_of("b.yaml", None, force=True)[0] == tmp_path / "b.yaml"


def test_a_cluster_that_cannot_be_reached_is_told_at_once_and_nothing_is_left(tmp_path: Path) -> None:
    assert PHALANX.exists()
    done = phalanx("cluster", "probe", "cluster=existing", "cluster.address=127.0.0.1:1", "--json", cwd=tmp_path)
    assert done.code == 4, done.err
    assert "127.0.0.1:1" in done.document["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_the_ranks_find_our_packages_and_keep_the_users_path(tmp_path: Path) -> None:
    import shlex
    import subprocess

    given_disk = shlex.split(probe._command(tmp_path, quick=False, disk="/my disk"))[-1]
    assert given_disk.endswith("jobs.probe --disk '/my disk'")
    words = shlex.split(probe._command(tmp_path / "it's here", quick=True, disk=""))
    assert words[-1].endswith("--quick")
    shown = words[-1].replace("exec python -P -m jobs.probe --quick", 'printf %s "$PYTHONPATH"')
    for given, expected in (("", ""), ("/mine", ":/mine")):
        environment = {"PYTHONPATH": given} if given else {}
        done = subprocess.run([*words[:-1], shown], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{tmp_path}/it's here{expected}"


def test_the_screen_shows_phases_instead_of_training(tmp_path: Path) -> None:
    stream = io.StringIO()
    shown = probe.ProbeScreen(Screen(stream, clock=lambda: 0.0), RunPaths(tmp_path))
    shown.say("[    0.1 s] training from step 1")
    shown.progress("running  attempt 1")
    (tmp_path / FOLDER).mkdir()
    for phase in ("matmul fp32", "matmul fp32", "done"):
        (tmp_path / FOLDER / "progress").write_text(phase)
        shown.progress("running  attempt 1")
    shown.say("cancelling cleanly")
    assert stream.getvalue().splitlines() == [
        "starting the ranks",
        "measuring: matmul fp32",
        "measured: done",
        "cancelling cleanly",
    ]


def test_records_that_do_not_arrive_are_a_matter_of_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SHARED_S", 0.0)
    with pytest.raises(StorageError, match="2 of 2 ranks"):
        probe._records(RunStore(tmp_path).paths, 2)
