"""The plain training script of the peers: our engine and our loop, resumed from the newest committed checkpoint.

It is what a person would write to train with our engine under another launcher: the very code that a rank of phalanx
runs (:mod:`jobs.stages.pretrain`), with digests and fsync, and a look for the newest checkpoint at the start. Under
torchrun it is the script itself; the others call :func:`train`.

Every rank leaves its process id in ``pids/<attempt>-<rank>``, so that the benchmark can kill it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from jobs import checkpoint
from jobs.engine import Engine
from jobs.hooks import NoHooks
from jobs.paths import RunPaths
from jobs.report import Reporter
from jobs.spec import JobSpec, RankEnv
from jobs.stages.pretrain import Pretrain
from jobs.worker import StepCounter
from strategies.codec import from_json
from tests.benchmarks.peers import JOB


def environment_of(run_dir: Path, *, rank: int, world_size: int, attempt: int, address: str, port: int) -> RankEnv:
    """One rank of a gang on this machine that goes on from the newest checkpoint.

    Args:
        run_dir: Folder of the run.
        rank: Global rank.
        world_size: Number of ranks.
        attempt: Which start this is, from 1.
        address: Where rank 0 serves the rendezvous store.
        port: Its port.
    """
    newest = checkpoint.newest(RunPaths(run_dir).checkpoints)
    return RankEnv(
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        node_rank=0,
        master_addr=address,
        master_port=port,
        run_id="peer",
        run_dir=str(run_dir),
        epoch=1,
        attempt=attempt,
        resume_from=str(newest or ""),
    )


def train(env: RankEnv) -> None:
    """Be one rank until the job is done."""
    run_dir = Path(env.run_dir)
    (run_dir / "pids").mkdir(exist_ok=True)
    (run_dir / "pids" / f"{env.attempt}-{env.rank}").write_text(str(os.getpid()))
    job = from_json(JobSpec, json.loads((run_dir / JOB).read_text()), where=JOB)
    engine = Engine.build(job, env)
    Pretrain(job=job, env=env, engine=engine, reporter=Reporter(-1), hooks=NoHooks(), counter=StepCounter()).run()
    engine.close()


def main() -> None:
    """One rank as torchrun starts it."""
    variables = os.environ
    train(
        environment_of(
            Path(sys.argv[1]),
            rank=int(variables["RANK"]),
            world_size=int(variables["WORLD_SIZE"]),
            attempt=int(variables["TORCHELASTIC_RESTART_COUNT"]) + 1,
            address=variables["MASTER_ADDR"],
            port=int(variables["MASTER_PORT"]),
        )
    )


if __name__ == "__main__":
    main()
