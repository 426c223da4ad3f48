"""``phalanx cluster probe`` on real ranks: the file that it writes plans, and nothing else is left of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.probe import FOLDER
from tests.support import cli, netns

pytestmark = pytest.mark.timeout(240)
PROCESSES = ("cluster=process", "cluster.nodes=2", "cluster.slots_per_node=1")


def words(folder: Path, *more: str) -> Sequence[str]:
    return ("cluster", "probe", "--quick", *more, f"run.dir={folder / 'runs'}")


def check(folder: Path, done: cli.Result, *, nodes: int, slots: int) -> dict[str, Any]:
    """The document is whole, the file plans, and the probe has cleaned up."""
    assert done.code == 0, done.err
    document: dict[str, Any] = done.document
    assert (document["nodes"], document["slots"]) == (nodes, slots)
    measured = {key: one["value"] for key, one in document["figures"].items() if one["source"] == "measured"}
    for key in ("flops_fp32", "flops_16", "memory_bandwidth", "inter_bandwidth", "inter_latency_s"):
        assert measured[key] > 0, key
    assert measured["storage_bandwidth"] > 0
    disk = document["figures"]["disk_bandwidth"]
    assert disk["source"] == "measured" or "is memory (" in disk["note"], disk
    assert "measuring: matmul fp32" in done.err
    assert not (folder / "runs").exists()
    cli.assert_nothing_left(folder)
    given = [f"cluster.hardware.{key}={'1e-5' if key.endswith('_s') else '1e9'}" for key in document["missing"]]
    search = f"hydra.searchpath=[file://{folder / 'conf'}]"
    planned = cli.phalanx("plan", "--json", search, f"cluster={document['name']}", *given, cwd=folder)
    assert planned.code == 0, planned.err
    assert planned.document["cluster"]["hardware"]["flops_fp32"] == pytest.approx(measured["flops_fp32"], rel=1e-4)
    return document


@pytest.mark.full  # tests/test_docs.py runs it, too
def test_processes_of_this_machine(tmp_path: Path) -> None:
    done = cli.phalanx(*words(tmp_path, *PROCESSES, "--json"), cwd=tmp_path)
    document = check(tmp_path, done, nodes=2, slots=1)
    assert document["machines"] == 1
    assert "intra_bandwidth" in "".join(document["remarks"])
    again = cli.phalanx(*words(tmp_path, *PROCESSES), cwd=tmp_path)
    assert again.code == 2
    assert "--force" in again.err


@pytest.mark.full
def test_an_embedded_cluster(tmp_path: Path) -> None:
    size = ("cluster=local", "cluster.nodes=2", "cluster.slots_per_node=2")
    done = cli.phalanx(*words(tmp_path, *size, "--json", "--name", "mine"), cwd=tmp_path)
    assert check(tmp_path, done, nodes=2, slots=2)["missing"] == []


@pytest.mark.full
@pytest.mark.skipif(not netns.available(), reason="needs root and ip netns")
def test_an_existing_cluster_that_asks_for_a_token(tmp_path: Path) -> None:
    token = "ab" * 32
    with netns.network(2) as net:
        cluster = netns.RayCluster(net, token=token)
        try:
            cluster.start(nodes=2)
            address = f"cluster.address={cluster.address}"
            refused = cli.phalanx(*words(tmp_path, "cluster=existing", address), cwd=tmp_path, env={"HOME": "/none"})
            assert refused.code == 4, refused.err
            secret = {"RAY_AUTH_TOKEN": token}
            done = cli.phalanx(*words(tmp_path, "cluster=existing", address, "--json"), cwd=tmp_path, env=secret)
            document = check(tmp_path, done, nodes=2, slots=2)
            assert not document["missing"]
            process = cli.start(*words(tmp_path, "cluster=existing", address, "--name", "b"), cwd=tmp_path, env=secret)
            cli.wait_for(lambda: any((tmp_path / "runs").glob(f"*/{FOLDER}/progress")), "the ranks measure")
            os.killpg(process.pid, signal.SIGINT)
            assert cli.end(process).code == 103
            assert not (tmp_path / "runs").exists()
            cli.assert_nothing_left(tmp_path)
        finally:
            cluster.close()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["process", "local"])
def test_an_interrupt_ends_everything(tmp_path: Path, kind: str) -> None:
    size = (f"cluster={kind}", "cluster.nodes=2", "cluster.slots_per_node=1")
    process = cli.start(*words(tmp_path, *size), cwd=tmp_path)
    cli.wait_for(lambda: any((tmp_path / "runs").glob(f"*/{FOLDER}/progress")), "the ranks measure")
    os.killpg(process.pid, signal.SIGINT)
    done = cli.end(process)
    assert done.code == 103, done.err
    assert list(tmp_path.iterdir()) == []
    cli.assert_nothing_left(tmp_path)


@pytest.mark.full
def test_nodes_without_torch_are_told_apart(tmp_path: Path) -> None:
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    done = cli.phalanx(*words(tmp_path, *PROCESSES), cwd=tmp_path, env={"PYTHONPATH": str(shadow)})
    assert done.code == 100, done.err
    assert "torch cannot be imported by" in done.err
    assert "phalanx[train]" in done.err
    assert not (tmp_path / "runs").exists()
