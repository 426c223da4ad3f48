"""Names of every file in a run directory, in one place. The run directory is the truth about a run.

::

    <run.dir>/<run name>/
        request.json            the LaunchRequest, verbatim
        config.yaml             the resolved configuration
        overrides.yaml          what the user typed
        plan.json               the plan
        ds_config.json          DeepSpeed's configuration
        env.json                versions and the (redacted) environment of the submission (mode 0600)
        events.jsonl            append-only, fsynced: every decision
        metrics.jsonl           one line per optimizer step
        metrics.prom            the run in numbers, in Prometheus' text format; renewed while a controller lives
        cluster.json            how to reach the cluster that runs it
        secret                  key of the control connections of this run (mode 0600)
        sample.txt              text generated from the final weights; the results of an evaluation for people
        results.json            what an evaluation or a generation has found
        tracking.json           W&B id and the last step logged
        code/                   our packages and, for scripts, nothing of the user's
        controllers/E.json      lock records: who controlled in epoch E (create-exclusive)
        controllers/E.beat      heartbeat of that controller
        agents/NODE.json        where to reach the agent of a node
        attempts/N/job.json     the JobSpec of attempt N
        attempts/N/ranks.json   rank -> node, pid, coordinates
        attempts/N/leave.json   a request to the ranks: leave after your next checkpoint
        attempts/N/memory.json  where the parts of the generation are that attempt N restores from memory
        attempts/N/errors.json  what its ranks died of, equal errors grouped
        attempts/N/hang.json    where every rank stood when the gang made no progress
        attempts/N/rank-R.log   logs of rank 0 and of the first failing rank; the others stay on their node
        checkpoints/            see jobs.checkpoint; or, instead of that folder,
        checkpoints.url         where else they are kept: a path or an object store
        faults/ID.json          proof that an injected fault fired (create-exclusive)
        control/cancel.json     a request to cancel (create-exclusive)
        control/proposals/      requests of resumes that have not won control (yet)
        control/ballast         room for the end of the log on a full disk
        control/ambush.json     where in its table a controller kills itself (rehearsals)
        sites.json              how the nodes of plain processes are entered (rehearsals)
"""

from __future__ import annotations

from pathlib import Path

from jobs.location import Location, locate


class RunPaths:
    """Paths inside one run directory.

    Args:
        root: The run directory.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.request = self.root / "request.json"
        self.config = self.root / "config.yaml"
        self.overrides = self.root / "overrides.yaml"
        self.plan = self.root / "plan.json"
        self.ds_config = self.root / "ds_config.json"
        self.env = self.root / "env.json"
        self.events = self.root / "events.jsonl"
        self.metrics = self.root / "metrics.jsonl"
        self.exposition = self.root / "metrics.prom"
        self.cluster = self.root / "cluster.json"
        self.secret = self.root / "secret"
        self.sample = self.root / "sample.txt"
        self.results = self.root / "results.json"
        self.tracking = self.root / "tracking.json"
        self.code = self.root / "code"
        self.controllers = self.root / "controllers"
        self.agents = self.root / "agents"
        self.attempts = self.root / "attempts"
        self.checkpoint_dir = self.root / "checkpoints"
        self.pointer = self.root / "checkpoints.url"
        self.faults = self.root / "faults"
        self.control = self.root / "control"
        self.cancel = self.control / "cancel.json"
        self.ambush = self.control / "ambush.json"
        self.sites = self.root / "sites.json"

    @property
    def checkpoints(self) -> Location:
        """Where the checkpoints of the run are kept. Raises OSError: the run directory cannot be read."""
        try:
            return locate(self.pointer.read_text().strip())
        except FileNotFoundError:
            return self.checkpoint_dir

    def at_home(self, path: str) -> str:
        """Where a checkpoint of the run lies now that was recorded before its directory was moved; else ``path``.

        Those that are kept elsewhere are not moved with it.
        """
        if self.pointer.exists() or path.startswith(f"{self.checkpoint_dir}/"):
            return path
        _, mark, inside = path.rpartition(f"/{self.root.name}/{self.checkpoint_dir.name}/")
        return str(self.checkpoint_dir / inside) if mark else path

    def attempt(self, number: int) -> Path:
        """Folder of attempt ``number``."""
        return self.attempts / str(number)

    def job(self, number: int) -> Path:
        """JobSpec of attempt ``number``."""
        return self.attempt(number) / "job.json"

    def ranks(self, number: int) -> Path:
        """Where the ranks of attempt ``number`` run."""
        return self.attempt(number) / "ranks.json"

    def leave(self, number: int) -> Path:
        """The ranks of attempt ``number`` leave after their next checkpoint once this exists."""
        return self.attempt(number) / "leave.json"

    def memory(self, number: int) -> Path:
        """Where the parts of the generation are that attempt ``number`` restores."""
        return self.attempt(number) / "memory.json"

    def debt(self, number: int) -> Path:
        """What attempt ``number`` owes the store of the checkpoints, if that did not answer when it began."""
        return self.attempt(number) / "debt.json"

    def hang(self, number: int) -> Path:
        """Where the ranks of attempt ``number`` stood when it hung."""
        return self.attempt(number) / "hang.json"

    def errors(self, number: int) -> Path:
        """What the ranks of attempt ``number`` died of."""
        return self.attempt(number) / "errors.json"

    def rank_log(self, number: int, rank: int) -> Path:
        """Log of one rank of attempt ``number``, where it was brought to the run directory."""
        return self.attempt(number) / f"rank-{rank}.log"
