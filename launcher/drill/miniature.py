"""An experiment in miniature, submitted like any other run: ``phalanx submit --rehearse``. Pure, but for its text.

What runs is a configuration (:func:`miniature`), so there is no second way to launch anything. One real fault is part
of it, and the end of the run is judged by what its records say: the fault fired and was noticed, the run came to its
end, and no more was lost than its copies in memory allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.drill.changes import changes_text, same_text
from launcher.drill.toy import CORPUS, EVERY, SUBMIT, Toy, shrink
from launcher.host.accelerator import Devices
from launcher.render import plural, seconds, shorten_ids
from launcher.schema import Config
from strategies.codec import to_json
from strategies.errors import PhalanxError, RunFailed

FAULT = "node_kill@node=random,step=random"
"""A node dies, after the first checkpoint and before the end."""

_LOST_TIME = ("detect_s", "decide_s", "place_s", "restore_s", "wait_s")


def miniature(config: Config, found: Devices | None = None) -> Toy:
    """What to submit instead of an experiment: it at toy width, on Ray on this machine, with a fault that must happen.

    Args:
        config: The experiment.
        found: The devices of this machine.

    Raises:
        ConfigError: It is no training, or the size of its cluster is not known.
        PlanInfeasible: Its plan is illegal, or no small plan of its kind runs.
    """
    text = str(Path(config.run.dir) / ".data" / "rehearsal" / CORPUS)
    setting = replace(SUBMIT, changes={"data.path": text, "experiment.require_faults": True})
    toy = shrink(config, setting, found)
    return replace(toy, config=replace(toy.config, faults=config.faults or (FAULT,)))


def announcement(toy: Toy, faults: Sequence[str]) -> str:
    """The difference between the experiment and its rehearsal.

    Args:
        toy: The rehearsal.
        faults: What will strike it.
    """
    cluster = toy.config.cluster
    where = f"{cluster.nodes} nodes x {cluster.slots_per_node} slots of this machine, {plural(cluster.spares, 'spare')}"
    return "\n".join(
        (
            f"rehearsal of {toy.config.model.name}: {toy.plan.describe()}, {toy.config.train.precision}, on {where}",
            changes_text(toy.changes),
            same_text(toy.same),
            f"to happen: {', '.join(faults)}",
        )
    )


def difference(toy: Toy, faults: Sequence[str]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "plan": to_json(toy.plan),
        "precision": toy.config.train.precision,
        "changes": to_json(list(toy.changes)),
        "same": to_json(dict(toy.same)),
        "faults": list(faults),
    }


# ---- the end ----------------------------------------------------------------------------------------------------


def most_lost(toy: Toy) -> int:
    """Steps that one failure may cost: those since the last copy in memory, or on disk where there is none."""
    return toy.config.checkpoint.memory_every or EVERY


def judge(toy: Toy, run: Mapping[str, Any]) -> PhalanxError | None:
    """What is wrong with a rehearsal that has come to its end.

    Args:
        toy: The rehearsal.
        run: The status document of its run.
    """
    allowed = most_lost(toy)
    costly = [one for one in run["incidents"] if one["steps_lost"] > allowed]
    if not costly:
        return None
    worst = max(costly, key=lambda one: int(one["steps_lost"]))
    return RunFailed(
        f"'{run['run']}' finished, but a failure has cost {plural(worst['steps_lost'], 'step')}.",
        why=f"at most {allowed} may be lost: a copy of the state is made that often "
        f"(checkpoint.memory_every={toy.config.checkpoint.memory_every}); it was {worst['cause']}",
        hint=f"The log of the ranks says why there was no newer copy: phalanx logs {run['run']}.",
    )


def document(toy: Toy, faults: Sequence[str], run: Mapping[str, Any], verdict: PhalanxError | None) -> dict[str, Any]:
    """The difference, what proves each fault, and the verdict, for programs.

    ``noticed_s`` and ``recovered_s`` are seconds since the fault, None where nothing had to be noticed.
    """
    return difference(toy, faults) | {
        "proofs": [_proof(record, run) for record in run["faults"]],
        "most_steps_lost": most_lost(toy),
        "passed": verdict is None,
        "why": "" if verdict is None else f"{verdict.what} {verdict.why}".strip(),
    }


def _proof(record: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """One record of the injector beside the incident that it has caused."""
    caused = [one for one in run["incidents"] if one["attempt"] == record.get("attempt")]
    incident = caused[0] if caused else None
    return {
        "fault": record["fault"],
        "file": f"faults/{record['id']}.json",
        "step": record.get("step"),
        "cause": incident["cause"] if incident else "",
        "noticed_s": incident["detect_s"] if incident else None,
        "recovered_s": sum(incident[key] for key in _LOST_TIME) if incident and incident["recovered"] else None,
        "steps_lost": incident["steps_lost"] if incident else 0,
    }


def verdict_text(found: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """What a rehearsal has shown: of each fault that it fired, what was noticed, and what it cost.

    Args:
        found: Of :func:`document`.
        run: The status document of its run.
    """
    lines = [f"rehearsal: {'passed' if found['passed'] else 'FAILED'}"]
    for one in found["proofs"]:
        lines.append(f"  {one['fault']} fired: {one['file']}, written before it struck")
        if one["noticed_s"] is not None:
            lines.append(f"    noticed after {seconds(one['noticed_s'])}: {shorten_ids(one['cause'])}")
        if one["recovered_s"] is not None:
            lost = f"{plural(one['steps_lost'], 'step')} lost, at most {found['most_steps_lost']} may be"
            lines.append(f"    the ranks trained again {seconds(one['recovered_s'])} after it; {lost}")
    lines.append(f"  {run['state']} at step {run['step']} of {run['steps']}")
    return "\n".join(lines)
