"""Checkpoints that the persister of the node makes behind the rank.

There are two phases. The state is copied into shared memory, a large one beside the forward and
backward of the next step (:mod:`jobs.checkpoint.copying`); before the update of that step every rank waits until its
copy is whole and the replica of it confirmed. That copy is a generation of the memory tier, and where a
checkpoint on disk is due, the persister writes it from there while training goes on. The next one due waits a little
for the one before, and there every rank learns what became of that (:mod:`jobs.checkpoint.outage`).
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jobs.checkpoint.copying import Copier, pin
from jobs.checkpoint.fence import owed
from jobs.checkpoint.fragments import access
from jobs.checkpoint.frequency import Frequency, Price
from jobs.checkpoint.gang import agree, gather, most, revive
from jobs.checkpoint.image import Image
from jobs.checkpoint.keeping import restored_from, warn
from jobs.checkpoint.layout import Place, Token
from jobs.checkpoint.memory import StreamInfo, generation_of
from jobs.checkpoint.outage import LATE_S, SIGN_OF_LIFE_S, Underway, passing, waits, words
from jobs.checkpoint.persister import PersisterLink, unreachable
from jobs.checkpoint.save import Run, copies_of, image_of_state, runs_of
from jobs.checkpoint.state import rng_state, trainer_state
from jobs.frames import FrameError, Message
from jobs.hooks import Hooks
from jobs.location import Location
from jobs.paths import RunPaths
from jobs.report import Reporter
from jobs.spec import JobSpec, RankEnv
from strategies.codec import to_json
from strategies.errors import PhalanxError


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
        self._underway: Underway | None = None
        self._earlier: Underway | None = None  # late when the last one had to be made
        self._in_memory = False
        self._rank_state: dict[str, Any] = {}
        self._unconfirmed = False  # a replica of the newest copy is on its way
        self._kept_s = 0.0  # what keep() has taken since it was told
        policy = job.checkpoint
        self._frequency = Frequency(every=policy.memory_every, share=policy.memory_share, most=policy.every)
        self._cores = len(os.sched_getaffinity(0))
        self._toil_s = 0.0  # of the persister, for copies of all gangs so far, as it was told last
        self.copies_every = 0
        self._warned = ""
        self._base = restored_from(env)  # the newest checkpoint on disk of which every rank knows

    @property
    def image_bytes(self) -> int:
        """Size of what a step stands still for."""
        return self._image.bytes

    def open(self) -> None:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""
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
        answer, _, _ = self._ask(
            "open",
            info=to_json(info),
            peers=[where for where, _, _ in told],
            in_memory=self._in_memory,
            keep=job.checkpoint.keep,
            restored=generation_of(env.resume_from),
        )
        self._toil_s = answer["toil_s"]
        if env.rank == 0:
            warn(without_memory(refused))

    def keep(self, step: int, extra: Mapping[str, Any]) -> None:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""
        begin = time.perf_counter()
        self._frequency.passed(step, begin)
        self.land()
        self._settle(0.0)
        if self._in_memory and self._frequency.due(step):
            self._reconsider(step)
            self._keep_copy(step, extra)
        self._kept_s += time.perf_counter() - begin

    def stalled_s(self) -> float:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""
        kept_s, self._kept_s = self._kept_s, 0.0
        waited_s = float(self._own_time.stalled_s)
        if self._underway is not None and self._underway.waited_s is None:
            self._underway.waited_s = waited_s  # it was the copy of this one
            return kept_s
        self._frequency.stalled(kept_s + waited_s)
        return kept_s + waited_s

    def _reconsider(self, step: int) -> None:
        """Whether to copy more seldom from here on, or more often again."""
        price = self._frequency.price(step) if self._frequency.adapts else None
        if price is None:
            return
        began = time.perf_counter()
        dearest = most(price)
        self._kept_s -= time.perf_counter() - began  # of a step: it waits for the slowest rank, here or later
        told = self._frequency.reconsider(Price(*dearest))
        self.copies_every = self._frequency.now
        if told and self._env.rank == 0:
            print(told, flush=True)

    @property
    def in_memory(self) -> bool:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""
        return self._in_memory

    def copy(self, step: int, extra: Mapping[str, Any]) -> None:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""
        self.land()
        self._is_late()  # a checkpoint on its way is given its time
        self._keep_copy(step, extra)
        self.land()

    def save(self, step: int, extra: Mapping[str, Any], *, must: bool = False) -> Location:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""
        begin = time.perf_counter()
        self.land()
        self._copy()
        record = self._record(extra)
        self._hooks.checkpoint_begin(step)
        manifest = Place(self._root, step, self._token).manifest
        late, told_s = self._is_late()
        begin += told_s
        if late and not must:
            self._copier.then(lambda: self._seal(step, record, flush=False))
            self._kept_s += time.perf_counter() - begin
            return manifest
        self._earlier = self._underway
        hold = self._hooks.holds_commit(step)
        self._copier.then(lambda: self._seal(step, record, flush=True, hold=hold))
        stall_s = time.perf_counter() - begin
        self._underway = Underway(step=step, manifest=manifest, record=record, began=begin, stall_s=stall_s)
        if hold:
            self._copier.wait()
            self._ask("durable")
            self._hooks.checkpoint_shards_written(step)
            self._ask("release")
        return manifest

    def finish(self, patience_s: float = 0.0) -> PhalanxError | None:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""
        underway, more = self._underway, waits(patience_s)
        assert underway is not None, "save() came first"
        underway.waited_s = 0.0  # all of it is told as the stall of this one
        self.land()
        self._hear_of_earlier()
        while failure := self._learn(wait_s=None, whole=True)[0]:
            # the clock of one rank decides for all
            delay_s = agree(None, next(more, None) if self._env.rank == 0 else None)[0]
            if delay_s is None:
                return revive(failure)
            self._wait(delay_s, underway.step)
            underway.outcome, self._underway = None, underway
            self._copy()  # the state is what it was
            self._copier.then(lambda: self._seal(underway.step, underway.record, flush=True, again=True))
            self.land()
        return None

    def _hear_of_earlier(self) -> None:
        """What became of the one before is told, if that is over now: nobody asks for it later."""
        if self._earlier is not None:
            newest, self._underway, self._earlier = self._underway, self._earlier, None
            self._learn(wait_s=LATE_S)
            self._underway = newest

    def _wait(self, seconds: float, step: int) -> None:
        while seconds > 0:
            self._reporter.send("step", step=step, next="save")
            time.sleep(min(seconds, SIGN_OF_LIFE_S))
            seconds -= SIGN_OF_LIFE_S

    def _is_late(self) -> tuple[bool, float]:
        """Whether the checkpoint before is still being written, after some patience with it. Collective.

        And how much of that (seconds) has been told to be its fault.
        """
        underway, begin = self._underway, time.perf_counter()
        late = self._learn(wait_s=0.0 if underway is not None and underway.late else LATE_S)[1]
        if late and underway is not None and not underway.late:
            underway.late = True
            waited_s = time.perf_counter() - begin
            self._tell_unsaved(underway.step, f"it is still being written after {LATE_S:.0f} s and more", waited_s)
            return late, waited_s
        return late, 0.0

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

    def _keep_copy(self, step: int, extra: Mapping[str, Any]) -> None:
        """A generation of the memory tier, and no more; it is whole when it has landed."""
        self._copy()
        record = self._record(extra)
        self._copier.then(lambda: self._seal(step, record, flush=False))

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

    def _learn(self, *, wait_s: float | None, whole: bool = False) -> tuple[dict[str, Any] | None, bool]:
        """What has become of the checkpoint on its way; it is so no more unless it is still being written. Collective.

        Args:
            wait_s: How long to wait for that; None: until it is known.
            whole: Training waits for it.

        Returns:
            Why it could not be written, and whether it is still being written; the same on every rank.

        Raises:
            PhalanxError: It could not be written, and no later one will be.
        """
        error: PhalanxError | None = None
        underway, failure, late = self._underway, None, False
        try:
            late = self._settle(wait_s, whole=whole)
            failure = underway.failure if underway is not None else None
            if failure is not None and not passing(failure):
                raise revive(failure)
        except PhalanxError as caught:
            error = caught
        failure, late = agree(error, [failure, late])[0]
        if underway is not None and not late:
            self._underway = None
            self._base = self._base if failure else underway.manifest
        return failure, bool(late)

    def _settle(self, wait_s: float | None, *, whole: bool = False) -> bool:
        """Rank 0 asks what has become of the checkpoint on its way, and reports it; returns if it is being written."""
        underway = self._underway
        if underway is None or self._env.rank != 0 or underway.outcome is not None:
            return False
        done = self._ask("outcome", token=self._token, step=underway.step, wait_s=wait_s)[0]["done"]
        if done is None:
            return True
        underway.outcome = done
        now, stall_s = time.perf_counter(), underway.stall_s + (underway.waited_s or 0.0)
        if whole:
            stall_s, underway.began = now - underway.began, now
        if failure := underway.failure:
            if passing(failure):
                self._tell_unsaved(underway.step, words(failure), stall_s)
            return False
        warn(done.pop("warning", ""))
        self._reporter.send("checkpoint", stall_s=stall_s, **done)
        return False

    def _tell_unsaved(self, step: int, reason: str, stall_s: float) -> None:
        if self._env.rank == 0:
            warn(f"the checkpoint of step {step} is not written: {reason}")
            self._reporter.send("unsaved", step=step, reason=reason, stall_s=stall_s)

    def _ask(self, op: str, **fields: Any) -> tuple[Message, bytes, list[int]]:
        try:
            return self._link.ask(op, **fields)
        except FrameError as error:
            raise unreachable(error) from error


def without_memory(refused: Mapping[int, str]) -> str:
    """What people should know when nodes have no room for generations; empty when all have.

    A generation that lacks the part of one rank restores nobody, so then nobody keeps any.
    """
    if not refused:
        return ""
    rank, why = min(refused.items())
    return f"no step can be restored from memory, on no node: that of rank {rank} has no room ({why})"


def _mapped(fd: int, size: int) -> npt.NDArray[np.float32]:
    try:
        if not size:
            return np.empty(0, np.float32)
        # Every page now, not one by one under the first copy.
        return np.frombuffer(mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), np.float32)
    finally:
        os.close(fd)
