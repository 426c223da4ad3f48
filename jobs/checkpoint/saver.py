"""Who makes the checkpoints of a training loop: the persister of the node behind the rank, or the rank itself.

Behind the rank there are two phases. The state is copied into shared memory, a large one beside the forward and
backward of the next step (:mod:`jobs.checkpoint.copying`); before the update of that step every rank waits until its
copy is whole and the replica of it confirmed. That copy is a generation of the memory tier, and where a
checkpoint on disk is due, the persister writes it from there while training goes on. The next one due waits until the
one before is committed, and there every rank learns if it could not be written (:mod:`jobs.checkpoint.outage`).
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from jobs.checkpoint.copying import Copier, pin
from jobs.checkpoint.errors import Unsaved
from jobs.checkpoint.fence import owed
from jobs.checkpoint.fragments import access
from jobs.checkpoint.frequency import Frequency, Price
from jobs.checkpoint.gang import agree, gather, most, revive
from jobs.checkpoint.image import Image
from jobs.checkpoint.layout import Place, Token
from jobs.checkpoint.memory import StreamInfo, generation_of
from jobs.checkpoint.outage import SIGN_OF_LIFE_S, passing, waits, words
from jobs.checkpoint.persister import PersisterLink, unreachable
from jobs.checkpoint.save import Run, copies_of, image_of_state, runs_of
from jobs.checkpoint.state import rng_state, trainer_state
from jobs.frames import FrameError, Message
from jobs.hooks import Hooks
from jobs.location import Location, locate
from jobs.paths import RunPaths
from jobs.report import Reporter
from jobs.spec import JobSpec, RankEnv
from strategies.codec import to_json
from strategies.errors import PhalanxError, StorageError


class Saver(Protocol):
    """What the loop calls. Every method is collective.

    Attributes:
        copies_every: Steps between two copies in memory as of now; 0 for none.
    """

    copies_every: int

    def open(self) -> None:
        """Once, when every rank has its state."""

    def keep(self, step: int, extra: Mapping[str, Any]) -> None:
        """After every step at which no checkpoint on disk is due."""

    def stalled_s(self) -> float:
        """Seconds for which this rank has stood still for copies in memory, since it was asked last; not collective.

        Ask when a step has ended. What a checkpoint on disk has cost is reported with it instead.
        """

    @property
    def troubled(self) -> bool:
        """Whether the newest checkpoint of which every rank knows could not be written; the same on every rank."""

    def save(self, step: int, extra: Mapping[str, Any], *, wait: bool, patience_s: float = 0.0) -> Location:
        """A checkpoint on disk is due; returns the path of its manifest, which exists when ``wait`` is true.

        Args:
            step: The step that is complete.
            extra: What the caller wants back.
            wait: Return when it is written.
            patience_s: Then, how long it is tried again where it cannot be written.

        Raises:
            CheckpointConflict: Another gang has taken over; on every rank.
            StorageError: It was to be waited for, and cannot be written; on every rank.
        """


class BehindSaver:
    """The persister writes. Arguments as of :class:`jobs.checkpoint.direct.DirectSaver`, and ``link`` to it."""

    def __init__(
        self, engine: Any, job: JobSpec, env: RankEnv, hooks: Hooks, reporter: Reporter, link: PersisterLink
    ) -> None:
        self._optimizer = access(engine.ds)
        self._own_time = engine.own_time
        engine.before_update(lambda: self._own_time.stall(self.land))
        self._copier = Copier(self._optimizer)
        self._job = job
        self._env = env
        self._hooks = hooks
        self._reporter = reporter
        self._link = link
        self._token = Token(env.epoch, env.attempt)
        self._root = RunPaths(env.run_dir).checkpoints
        self._image = Image(slices=())
        self._runs: list[Run] = []
        self._device = torch.device("cpu")  # where most of the state lives
        self._buffers: dict[int, npt.NDArray[np.float32]] = {}
        self._pending: dict[str, Any] | None = None  # the checkpoint that is being written: step, stall_s
        self._in_memory = False
        self._rank_state: dict[str, Any] = {}
        self._unconfirmed = False  # a replica of the newest copy is on its way
        self._kept_s = 0.0  # what keep() has taken since it was told
        policy = job.checkpoint
        self._frequency = Frequency(every=policy.memory_every, share=policy.memory_share, most=policy.every)
        self._cores = len(os.sched_getaffinity(0))
        self._toil_s = 0.0  # of the persister, for copies, as it was told last
        self.copies_every = 0
        self._warned = ""
        self._base = restored_from(env)  # the newest checkpoint on disk of which every rank knows
        self._last: Location | None = None  # the one that is being written
        self._troubled = False

    @property
    def image_bytes(self) -> int:
        """Size of what a step stands still for."""
        return self._image.bytes

    def open(self) -> None:
        """See :class:`Saver`."""
        env, job = self._env, self._job
        self._image = image_of_state(self._optimizer)
        self._runs = runs_of(self._optimizer, self._image)
        self._device = next((run.owner.device for run in self._runs), self._device)
        wanted = job.checkpoint.memory_every > 0
        hello, _, _ = self._ask("hello", share=self._image.bytes * env.local_world_size if wanted else 0)
        first = {one.name: one.shape for one in self._image.slices if not one.start and not any(b[0] for b in one.box)}
        told = gather([hello["address"], first, hello["refused"]])
        refused = {rank: why for rank, (_, _, why) in enumerate(told) if why}
        self._in_memory = wanted and not refused
        self.copies_every = self._frequency.now if self._in_memory else 0
        about: dict[str, Any] = {}
        if env.rank == 0:
            tensors = {name: shape for _, some, _ in told for name, shape in some.items()}
            about = {"run_id": job.run_id, "plan": job.plan, "model": job.model, "tensors": tensors}
            about["debt"] = owed(RunPaths(env.run_dir).debt(env.attempt), self._token)
        info = StreamInfo(
            epoch=env.epoch,
            attempt=env.attempt,
            rank=env.rank,
            world=env.world_size,
            image=tuple(self._image.rows()),
            about=about,
            skips=tuple((skip.step, skip.samples) for skip in job.skips),
        )
        self._ask(
            "open",
            info=to_json(info),
            peers=[where for where, _, _ in told],
            in_memory=self._in_memory,
            keep=job.checkpoint.keep,
            restored=generation_of(env.resume_from),
        )
        if env.rank == 0:
            warn(without_memory(refused))

    def keep(self, step: int, extra: Mapping[str, Any]) -> None:
        """See :class:`Saver`."""
        begin = time.perf_counter()
        self.land()
        self._settle(wait=False)
        if self._in_memory and self._frequency.due(step):
            self._reconsider(step)
            self._copy()
            record = self._record(extra)
            self._copier.then(lambda: self._seal(step, record, flush=False))
        self._kept_s += time.perf_counter() - begin

    def stalled_s(self) -> float:
        """See :class:`Saver`."""
        kept_s, self._kept_s = self._kept_s, 0.0
        waited_s = float(self._own_time.stalled_s)
        if self._pending is not None and "waited_s" not in self._pending:
            self._pending["waited_s"] = waited_s  # it was the copy of this one
            return kept_s
        self._frequency.stalled(kept_s + waited_s)
        return kept_s + waited_s

    def _reconsider(self, step: int) -> None:
        """Whether to copy more seldom from here on, or more often again."""
        price = self._frequency.price(step, time.perf_counter()) if self._frequency.adapts else None
        if price is None:
            return
        told = self._frequency.reconsider(Price(*most(price)))
        self.copies_every = self._frequency.now
        if told and self._env.rank == 0:
            print(told, flush=True)

    @property
    def troubled(self) -> bool:
        """See :class:`Saver`."""
        return self._troubled

    def save(self, step: int, extra: Mapping[str, Any], *, wait: bool, patience_s: float = 0.0) -> Location:
        """See :class:`Saver`."""
        begin = time.perf_counter()
        self.land()
        self._copy()
        record = self._record(extra)
        self._hooks.checkpoint_begin(step)
        self._agree_on_the_last()
        hold = self._hooks.holds_commit(step)
        self._copier.then(lambda: self._seal(step, record, flush=True, hold=hold))
        self._pending = {"step": step, "stall_s": time.perf_counter() - begin}
        self._last = manifest = Place(self._root, step, self._token).manifest
        if hold:
            self._copier.wait()
            self._ask("durable")
            self._hooks.checkpoint_shards_written(step)
            self._ask("release")
        if wait:
            self._copier.wait()
            self._pending["since"] = begin
            self._insist(step, record, patience_s)
        return manifest

    def _insist(self, step: int, record: Mapping[str, Any], patience_s: float) -> None:
        """Until the checkpoint is written, or patience is over; the state stays what it is meanwhile. Collective."""
        pending, last, more = self._pending, self._last, waits(patience_s)
        while failure := self._agree_on_the_last():
            # the clock of one rank decides for all
            delay_s = agree(None, next(more, None) if self._env.rank == 0 else None)[0]
            if delay_s is None:
                of = Unsaved if step >= self._job.train.steps else StorageError
                raise of(failure["what"], why=failure["why"], hint=failure["hint"])
            self._wait(delay_s, step)
            self._pending, self._last = pending, last
            self._copy()
            self._copier.then(lambda: self._seal(step, record, flush=True, again=True))
            self._copier.wait()

    def _wait(self, seconds: float, step: int) -> None:
        while seconds > 0:
            self._reporter.send("step", step=step, next="save")
            time.sleep(min(seconds, SIGN_OF_LIFE_S))
            seconds -= SIGN_OF_LIFE_S

    def land(self) -> None:
        """Wait for the newest copy and its replica.

        Every rank does so before it takes part in an update, so that a step is complete on no rank before the state of
        the step before is safe on all of them: a failure costs a step.
        """
        self._copier.wait()
        if self._unconfirmed:
            self._unconfirmed = False
            self._own_time.wait(self._confirm)

    def _copy(self) -> None:
        answer, _, fds = self._ask("begin")
        number, size = answer["buffer"], answer["bytes"]
        for fd in fds:
            self._buffers[number] = _mapped(fd, size)
            if why := pin(self._buffers[number], self._device):
                warn(why)
        self._copier.start(copies_of(self._optimizer, self._runs, self._image, self._buffers[number]))

    def _record(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """What goes beside the tensors, as it is now."""
        trainer = trainer_state(self._optimizer)
        record: dict[str, Any] = {"trainer": to_json(trainer), "time": time.time()}
        rank_state = {"rng": rng_state()}
        if rank_state != self._rank_state:  # long, and hardly ever another
            self._rank_state = record["rank_state"] = rank_state
        if self._env.rank == 0:
            record["extra"] = dict(extra)
        return record

    def _seal(
        self, step: int, record: Mapping[str, Any], *, flush: bool, hold: bool = False, again: bool = False
    ) -> None:
        base = str(self._base or "") if flush else ""
        answer = self._ask("seal", step=step, record=record, flush=flush, hold=hold, again=again, base=base)[0]
        self._unconfirmed = answer["replica"]

    def _confirm(self) -> None:
        """Wait for the replica of the newest copy, or for the news that there will be none."""
        answer = self._ask("settle")[0]
        toil_s, self._toil_s = answer["toil_s"] - self._toil_s, answer["toil_s"]
        if self._device.type == "cpu":  # beside a device there are cores to spare
            self._frequency.toiled(toil_s / self._cores)
        broken = answer["broken"]
        if broken != self._warned:
            self._warned = broken
            told = f"warning: {self._warned}; the newest steps are only on their own nodes"
            print(told if self._warned else "replicas are kept again", flush=True)

    def _agree_on_the_last(self) -> dict[str, Any] | None:
        """Wait for the checkpoint that is being written, and tell every rank what became of it. Collective.

        Returns:
            Why it could not be written, where training goes on all the same; on every rank.
        """
        error, failure = None, None
        try:
            failure = self._settle(wait=True)
            if failure is not None and not passing(failure):
                raise revive(failure)
        except PhalanxError as caught:
            error = caught
        self._pending = None
        told: dict[str, Any] | None = agree(error, failure)[0]
        last, self._last = self._last, None
        if last is not None:
            self._troubled = told is not None
        if told is None:
            self._base = last or self._base
        return told

    def _settle(self, *, wait: bool) -> dict[str, Any] | None:
        """Rank 0 asks what has become of the checkpoint on its way, and reports it; returns why it failed."""
        pending = self._pending
        if pending is None or self._env.rank != 0:
            return None
        done = self._ask("outcome", token=self._token, step=pending["step"], wait=wait)[0]["done"]
        if done is None or ("error" in done and not wait):
            return None  # every rank learns of a failure where all can take part
        self._pending = None
        if "error" in done:
            warn(f"the checkpoint of step {pending['step']} could not be written: {words(done['error'])}")
            if passing(done["error"]):
                self._reporter.send("unsaved", step=pending["step"], reason=words(done["error"]))
            return dict(done["error"])
        warn(done.pop("warning", ""))
        stalled_s = pending["stall_s"] + pending.get("waited_s", 0.0)
        stall_s = time.perf_counter() - pending["since"] if "since" in pending else stalled_s
        self._reporter.send("checkpoint", stall_s=stall_s, **done)
        return None

    def _ask(self, op: str, **fields: Any) -> tuple[Message, bytes, list[int]]:
        try:
            return self._link.ask(op, **fields)
        except FrameError as error:
            raise unreachable(error) from error


def warn(text: str) -> None:
    """Tell people, if there is something to tell."""
    if text:
        print(f"warning: {text}", flush=True)


def without_memory(refused: Mapping[int, str]) -> str:
    """What people should know when nodes have no room for generations; empty when all have.

    A generation that lacks the part of one rank restores nobody, so then nobody keeps any.
    """
    if not refused:
        return ""
    rank, why = min(refused.items())
    return f"no step can be restored from memory, on no node: that of rank {rank} has no room ({why})"


def restored_from(env: RankEnv) -> Location | None:
    """The checkpoint on disk that this gang goes on from, if it is one."""
    return locate(env.resume_from) if env.resume_from and generation_of(env.resume_from) is None else None


def _mapped(fd: int, size: int) -> npt.NDArray[np.float32]:
    try:
        if not size:
            return np.empty(0, np.float32)
        # Every page now, not one by one under the first copy.
        return np.frombuffer(mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), np.float32)
    finally:
        os.close(fd)
