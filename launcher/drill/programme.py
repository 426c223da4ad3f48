"""A whole drill: which faults, one undisturbed run for all of them, one rehearsal each, and what came of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.build import batch_spec
from launcher.drill import report
from launcher.drill.case import Aim, Case, usual_aim
from launcher.drill.catalogue import CATALOGUE, named
from launcher.drill.changes import with_changes
from launcher.drill.compare import compare
from launcher.drill.draw import Draw, draws
from launcher.drill.evidence import gather
from launcher.drill.needs import missing
from launcher.drill.rehearsal import Ended, Rehearsal, create, prepared, undisturbed
from launcher.drill.report import Result
from launcher.drill.toy import CORPUS, STEPS, Toy
from launcher.follow import Screen
from launcher.schema import Config
from launcher.store import RunStore, write_atomic
from strategies.errors import ConfigError, did_you_mean
from strategies.schedule import SampleSchedule, Skip

UNDISTURBED = "undisturbed"
_LINES = 3000


def choose(words: str, toy: Toy, *, seed: int, count: int) -> tuple[Draw, ...]:
    """The faults of a drill.

    Args:
        words: ``all``, ``random``, or names with commas between them.
        toy: The rehearsal.
        seed: Draws the random ones.
        count: How many of them.

    Raises:
        ConfigError: A name is unknown.
    """
    nodes, cases = toy.config.cluster.nodes or 1, known_cases(words)
    if words == "random":
        able = [case for case in cases if case.drawn and not missing(case.needs, toy.plan)]
        return draws(able, seed=seed, count=count, plan=toy.plan, nodes=nodes)
    return tuple(Draw(case=case, aim=usual_aim(case, toy.plan, nodes)) for case in cases)


def known_cases(words: str) -> Sequence[Case]:
    """The faults of the catalogue that are named: all of them by ``all`` and ``random``.

    Raises:
        ConfigError: A name is unknown.
    """
    if words in ("all", "random"):
        return CATALOGUE
    if not words.strip(" ,"):
        raise ConfigError(
            "--faults names no fault.", hint="phalanx drill --faults list shows them; all is the default."
        )
    names = [word.strip() for word in words.split(",")]
    unknown = [name for name in names if named(name) is None]
    if unknown:
        raise ConfigError(
            f"Unknown faults: {', '.join(unknown)}.",
            why=did_you_mean(unknown[0], [case.name for case in CATALOGUE]),
            hint="phalanx drill --faults list tells what each of them does; all and random choose for you.",
        )
    return [case for name in names if (case := named(name)) is not None]


class Programme:
    """Carries out a drill in a folder of its own.

    Args:
        toy: What is rehearsed; its ``run.dir`` is the folder.
        chosen: The faults.
        screen: Where to show how far it is.
    """

    def __init__(self, toy: Toy, chosen: Sequence[Draw], screen: Screen) -> None:
        self.folder = Path(toy.config.run.dir)
        self._toy = toy
        self._chosen = chosen
        self._screen = screen
        self._references: dict[tuple[int, int], RunStore] = {}  # by steps and the step left out

    def carry_out(self, keep: Callable[[Sequence[Result]], None]) -> list[Result]:
        """Every fault, one after the other.

        Args:
            keep: Called with the results so far after each of them.

        Raises:
            ClusterError: The undisturbed run does not succeed.
            StorageError: The folder cannot be written.
        """
        results: list[Result] = []
        width = len(str(len(self._chosen)))
        for number, one in enumerate(self._chosen, 1):
            twice = sum(other.case.name == one.case.name for other in self._chosen) > 1
            name = f"{number:0{width}d}-{one.case.name}" if twice else one.case.name
            results.append(self._one(name, one.case, one.aim, f"{number}/{len(self._chosen)}"))
            self._screen.say(f"[{number}/{len(self._chosen)}] {report.line(results[-1])}")
            keep(results)
        return results

    def _one(self, name: str, case: Case, aim: Aim, place: str) -> Result:
        why = missing(case.needs, self._toy.plan)
        if why:
            return Result(
                name=name, case=case, aim=aim, verdict="skipped", why=f"cannot be rehearsed here: needs {why}"
            )
        config = with_changes(self._toy.config, {"train.steps": case.steps})
        reference = self._reference(config, aim.step if case.numeric else 0)
        store = prepared(case, aim, config, name)
        ended = Rehearsal(store, case, aim, self._watching(f"{place} {name}")).play()
        return report.judge(
            name,
            case,
            aim,
            gather(case, aim, ended),
            compare(store, reference),
            problem=_problem(case, ended),
            precision=self._toy.config.train.precision,
        )

    def _reference(self, config: Config, skipped: int) -> RunStore:
        """The undisturbed run, or the one that leaves out the samples of a step from the beginning; made once."""
        steps, name = config.train.steps, UNDISTURBED
        if (steps, skipped) not in self._references:
            if steps != STEPS:
                name = f"{name}-{steps}"
            if skipped:
                size = SampleSchedule.of(batch_spec(config)).batch_at(skipped)
                skip = Skip(step=skipped, samples=size)
                config, name = replace(config, train=replace(config.train, skips=(skip,))), f"{name}-without-{skipped}"
            store = create(config, name, ())
            undisturbed(store, self._watching(name))
            self._screen.say(f"{name}: step {store.run().step}, weights {str(store.run().weights_digest)[:16]}")
            self._references[steps, skipped] = store
        return self._references[steps, skipped]

    def _watching(self, title: str) -> Callable[[str], None]:
        return lambda line: self._screen.progress(f"{title}: {line}")


def _problem(case: Case, ended: Ended) -> str:
    """What is wrong although the run may be right: how its last controller ended, and what it has left."""
    if ended.problem:
        return ended.problem
    wrong = []
    code = -signal.SIGKILL if case.ambush and not case.resumes else 0
    if ended.exits[-1] != code:
        wrong.append(f"the last controller ended with {ended.exits[-1]} instead of {code}, see drill.log")
    if ended.left:
        wrong.append(f"processes of the run were left: {'; '.join(ended.left)}")
    return "; ".join(wrong)


def keeper(toy: Toy, *, seed: int | None) -> Callable[[Sequence[Result]], None]:
    """What writes ``report.json`` and ``report.txt`` of a drill, after every fault."""
    folder = Path(toy.config.run.dir)

    def keep(results: Sequence[Result]) -> None:
        found = report.document(results, folder=str(folder), plan=toy.plan.describe(), changes=toy.changes, seed=seed)
        write_atomic(folder / "report.json", json.dumps(found, indent=2).encode() + b"\n")
        write_atomic(folder / "report.txt", report.render(results).encode() + b"\n")

    return keep


def corpus(folder: Path) -> Path:
    """A small text to train on, the same for every drill.

    Raises:
        StorageError: The folder cannot be written.
    """
    path = folder / CORPUS
    lines = (f"def f{i}(x):\n    return x * {i} + {i * i % 97}" for i in range(_LINES))
    write_atomic(path, "\n".join(lines).encode())
    return path
