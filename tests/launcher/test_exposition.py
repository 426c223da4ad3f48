"""A run in Prometheus' text format, and the file that a controller keeps of it."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from launcher.describe import describe
from launcher.exposition import Metric, exposition
from launcher.meter import Meter, metering
from launcher.run import EventKind
from launcher.store import append_line
from tests.support.golden import assert_golden
from tests.support.runs import BUILT, T0, add_steps, begin_attempt, failed_run, make_run, put, recovered_run

SAMPLE = re.compile(r'^phalanx_[a-z_]+\{run="[^"]*"(,[a-z]+="[^"]*")*\} (-?[0-9.e+-]+|NaN|[+-]Inf)$')


def samples(text: str) -> dict[str, float]:
    """Name with labels -> value."""
    rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name.replace('run="demo",', "").replace('{run="demo"}', ""): float(value) for name, _, value in rows}


def test_of_a_recovered_run(tmp_path: Path) -> None:
    store = recovered_run(tmp_path)
    (store.paths.agents).mkdir()
    (store.paths.agents / "a.json").write_text("{}")
    text = Meter(store, store.request()).text(T0 + 31)
    assert_golden("metrics.prom", text)
    found = samples(text)
    classes = [value for name, value in found.items() if name.startswith("phalanx_seconds")]
    assert sum(classes) == pytest.approx(31.0)
    parts = {name: value for name, value in found.items() if name.startswith("phalanx_incident_part_seconds")}
    assert parts == pytest.approx(
        {
            'phalanx_incident_part_seconds{class="decide",part="teardown"}': 0.5,
            'phalanx_incident_part_seconds{class="restore",part="device"}': BUILT["device_s"],
            'phalanx_incident_part_seconds{class="restore",part="communicators"}': BUILT["communicators_s"],
            'phalanx_incident_part_seconds{class="restore",part="engine"}': BUILT["engine_s"],
            'phalanx_incident_part_seconds{class="restore",part="state"}': BUILT["restored_s"],
        }
    )
    assert found['phalanx_restarts_total{kind="node_lost"}'] == 1
    assert found["phalanx_nodes_up"] == 1


def test_every_line_is_a_sample_or_says_what_it_is(tmp_path: Path) -> None:
    store = failed_run(tmp_path)
    text = Meter(store, store.request()).text(T0 + 31)
    assert text.endswith("\n")
    for block in re.split(r"(?=^# HELP)", text, flags=re.MULTILINE)[1:]:
        head, kind, *lines = block.splitlines()
        name = head.split()[2]
        assert kind in (f"# TYPE {name} gauge", f"# TYPE {name} counter")
        assert lines
        for line in lines:
            assert SAMPLE.match(line), line
            assert line.startswith(f"{name}{{")


def test_a_live_run_is_followed_bit_by_bit(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    meter = Meter(store, store.request())
    found = samples(meter.text(T0 + 1))
    assert (found["phalanx_step"], found['phalanx_run_state{state="queued"}']) == (0, 1)
    assert "phalanx_loss" not in found
    assert "phalanx_checkpoint_age_seconds" not in found
    begin_attempt(store, 1, 2.0, nodes=["a", "b", "c", "d"], step=1, reason="start")
    add_steps(store, 1, 1, 5, 4.0)
    put(store, 9.0, EventKind.CHECKPOINT_COMMITTED, attempt=1, step=5, path="x", bytes=1234, stall_s=0.2)
    found = samples(meter.text(T0 + 12))
    assert (found["phalanx_step"], found["phalanx_checkpoint_step"], found["phalanx_checkpoint_bytes"]) == (5, 5, 1234)
    assert found["phalanx_checkpoint_age_seconds"] == pytest.approx(3.0)
    assert found['phalanx_seconds{class="checkpoint_stall"}'] == pytest.approx(0.2)
    assert found["phalanx_loss"] == pytest.approx(7.75)
    assert samples(meter.text(T0 + 13))["phalanx_checkpoint_age_seconds"] == pytest.approx(4.0)


def test_routers_have_numbers_where_there_are_any(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    begin_attempt(store, 1, 2.0, nodes=["a", "b", "c", "d"], step=1, reason="start")
    add_steps(store, 1, 1, 5, 4.0)
    assert "_moe_" not in Meter(store, store.request()).text(T0 + 12)
    routing = {"aux_loss": 0.5, "imbalance": 2.5, "imbalance_layer": 3, "load": [3, 5], "dropped": 0, "crossed": 4}
    line = {"step": 6, "attempt": 1, "time": T0 + 10, "loss": 7.0, "moe": routing}
    append_line(store.paths.metrics, json.dumps(line).encode() + b"\n")
    found = samples(Meter(store, store.request()).text(T0 + 12))
    names = ("phalanx_moe_aux_loss", "phalanx_moe_imbalance", "phalanx_moe_dropped", "phalanx_moe_crossed")
    assert [found[name] for name in names] == [0.5, 2.5, 0, 4]
    assert (found['phalanx_moe_load{expert="0"}'], found['phalanx_moe_load{expert="1"}']) == (3, 5)
    assert describe(store, T0 + 12)["moe"] == routing


def test_names_are_quoted_and_numbers_that_are_none_are_written() -> None:
    metric = Metric(name="x", kind="gauge", text="X.", samples=[({"a": 'b"\\\n'}, float("nan")), ({}, None)])
    assert exposition('r"', [metric, Metric(name="y", kind="gauge", text="Y.")]) == (
        '# HELP phalanx_x X.\n# TYPE phalanx_x gauge\nphalanx_x{run="r\\"",a="b\\"\\\\\\n"} NaN\n'
    )


def test_the_file_is_renewed_while_a_controller_lives_and_once_more(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    path = store.paths.exposition
    with metering(store, store.request(), period_s=0.01):
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert samples(path.read_text())["phalanx_step"] == 0
        begin_attempt(store, 1, 2.0, nodes=["a", "b", "c", "d"], step=1, reason="start")
        add_steps(store, 1, 1, 3, 4.0)
    assert samples(path.read_text())["phalanx_step"] == 3
    assert [name for name in os.listdir(store.paths.root) if "prom" in name] == ["metrics.prom"]


def test_a_run_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    store.paths.exposition.mkdir()  # nothing can be put in its place
    meter = Meter(store, store.request())
    meter.write(T0)
    assert store.paths.exposition.is_dir()
    assert [name for name in os.listdir(store.paths.root) if name.startswith(".metrics")] == []
