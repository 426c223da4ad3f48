"""The driver of Ray Train: a ``TorchTrainer`` of version 2 with a ``FailureConfig``, everything else at its defaults.

Ray makes the process group, so our engine must not; the rest is the script of :mod:`tests.benchmarks.peers.loop`.

``python -m tests.benchmarks.peers.ray_train RUN_DIR RANKS [ADDRESS]``: without an address Ray starts here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

MAX_FAILURES = 8


def rank(config: dict[str, Any]) -> None:
    """One worker of Ray Train."""
    import ray.train

    from jobs import distributed
    from tests.benchmarks.peers.loop import environment_of, train

    run_dir = Path(config["run_dir"])
    context = ray.train.get_context()
    distributed.init_process_group = lambda *args, **kwargs: None
    number, world_size = context.get_world_rank(), context.get_world_size()
    attempt = 1 + len(list((run_dir / "pids").glob(f"*-{number}")))
    train(
        environment_of(
            run_dir, rank=number, world_size=world_size, attempt=attempt, address=os.environ["MASTER_ADDR"], port=0
        )
    )


def main() -> None:
    """Train until the end."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    run_dir, ranks, address = Path(sys.argv[1]), int(sys.argv[2]), (sys.argv[3:] or ["local"])[0]
    names = ("PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "RAY_TRAIN_V2_ENABLED")
    variables = {name: os.environ[name] for name in names}
    size = {"num_cpus": ranks, "include_dashboard": False} if address == "local" else {}
    ray.init(address, runtime_env={"env_vars": variables}, log_to_driver=False, **size)
    trainer = TorchTrainer(
        rank,
        train_loop_config={"run_dir": str(run_dir)},
        scaling_config=ScalingConfig(num_workers=ranks),
        run_config=RunConfig(
            name="peer", storage_path=str(run_dir / "ray"), failure_config=FailureConfig(max_failures=MAX_FAILURES)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
