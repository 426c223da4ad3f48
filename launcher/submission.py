"""Everything that a submit needs before its data are prepared, or everything that is in its way, at once.

Nothing is written: plan, cluster, project, the place of the run and its data are only looked at.
"""

from __future__ import annotations

import datetime
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import build, examination, launch
from launcher.config import Draft, draft
from launcher.findings import Findings, common
from launcher.request import LaunchRequest
from launcher.schema import ClusterConfig, Config
from launcher.ship import Shipment
from strategies.errors import ConfigError, PhalanxError
from strategies.specs import ClusterSpec

if TYPE_CHECKING:
    from launcher.drill.toy import Toy
    from launcher.ray_process import RayProcess


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A run that can be started once its data are prepared.

    Attributes:
        config: Settled.
        request: What will be sent; its data are not prepared.
        shipment: A script's project.
        toy: The rehearsal, if it is one.
    """

    config: Config
    request: LaunchRequest
    shipment: Shipment | None = None
    toy: Toy | None = None


def submission(
    overrides: Sequence[str], ray: RayProcess | None, *, rehearse: bool = False, detach: bool = False
) -> Submission:
    """What these overrides submit.

    Args:
        overrides: Words in Hydra's grammar.
        ray: Whom to ask about a running cluster, if there is somebody already.
        rehearse: Submit it in miniature.
        detach: Nobody will watch it.

    Raises:
        PhalanxError: Something is in its way; all of it is told.
    """
    found = draft(overrides)
    machines = _Machines(ray)
    if found.problems:
        examination.refuse(found, _beside(found, machines, rehearse=rehearse, detach=detach))
    (config,) = found.readings
    findings = Findings()
    toy = None
    if rehearse:
        from launcher.drill.miniature import miniature
        from launcher.host.accelerator import devices

        toy = findings.of(lambda: miniature(config, devices(os.environ)))
        findings.refuse()
    settled = _settled(toy.config if toy else config, toy)
    machine = findings.of(lambda: machines.of(settled))
    request = None
    if findings:
        findings.note(examination.of_plan(settled))
    else:
        request = findings.of(lambda: build.build_request(settled, overrides, machine))
    shipment = findings.of(lambda: launch.project(settled))
    _look_around(settled, findings, detach=detach)
    if request is not None:
        plan, cluster = request.job.plan, request.cluster
        findings.of(lambda: launch.check_disks(plan, cluster))
    if findings and toy is None:
        findings.note(examination.of_data([settled]))
    findings.refuse()
    assert request is not None, "nothing is in its way"
    return Submission(config=settled, request=request, shipment=shipment, toy=toy)


def _beside(found: Draft, machines: _Machines, *, rehearse: bool, detach: bool) -> list[str]:
    """What else is in the way of a run with whose values something is wrong already."""

    def judge(config: Config) -> list[str]:
        findings = Findings()
        machine = findings.of(lambda: machines.of(config)) if not rehearse else None
        findings.note(examination.of_plan(config, machine))
        findings.of(lambda: launch.project(config))
        _look_around(config, findings, detach=detach)
        return findings.lines

    readings = [_settled(one, None) for one in found.readings]
    lines = common(readings, judge)
    if not rehearse:  # it has a text of its own
        formed = any(one.key.startswith(("data.sources", "data.path")) for one in found.problems)
        lines += examination.of_data(readings, formed=formed)
    return lines


def _look_around(config: Config, findings: Findings, *, detach: bool) -> None:
    """Note what is wrong with the place of a run, and with how it is to be watched."""
    if detach and config.cluster.kind != "existing":
        what = f"--detach needs cluster=existing: a cluster={config.cluster.kind} run is controlled by this command."
        hint = "Use cluster=existing cluster.address=IP:PORT, or leave --detach out."
        findings.add(ConfigError(what, hint=hint))
    findings.of(lambda: launch.check_place(Path(config.run.dir) / str(config.run.name)))


def _settled(config: Config, toy: Toy | None) -> Config:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    name = build.default_name(config, f"rehearsal-{stamp}" if toy else stamp, secrets.token_hex(2))
    return build.settle(config, name=name, cwd=Path.cwd())


class _Machines:
    """Running clusters, each asked once, whatever it has answered."""

    def __init__(self, ray: RayProcess | None) -> None:
        self._ray = ray
        self._answers: dict[ClusterConfig, ClusterSpec | PhalanxError | None] = {}

    def of(self, config: Config) -> ClusterSpec | None:
        """The machine as it reports itself; None for one that phalanx starts. Raises as ``launch.measured``."""
        key = config.cluster
        if key not in self._answers:
            try:
                self._answers[key] = launch.measured(config, self._ray)
            except PhalanxError as error:
                self._answers[key] = error
        answer = self._answers[key]
        if isinstance(answer, PhalanxError):
            raise answer
        return answer
