"""What is made of the error that a rank reports: a sentence with its reason, and a signature without chance."""

from __future__ import annotations

from launcher.recovery import Failure, classify_exit
from strategies.errors import StorageError


def full_disk(rank: int, attempt: int, why: str = "No space left on device") -> Failure:
    """A rank cannot write its shard."""
    shard = f"/runs/r/checkpoints/step-00000009/e0001-a000{attempt}/shard-0000{rank}.safetensors"
    error = StorageError(f"Cannot write the checkpoint shard at {shard}.", why=why, hint="Free space.")
    report = {"type": "StorageError", "message": str(error), "traceback": f"Traceback ...\n{error}", "step": 9}
    return classify_exit({"rank": rank, "code": 7}, node="a", when=1.0, error=report)


def test_the_reason_is_in_the_sentence() -> None:
    assert "shard-00002.safetensors. (No space left on device)" in full_disk(2, 1).detail


def test_which_rank_says_it_first_is_chance() -> None:
    """Else a full disk takes as many attempts as there are ranks until it is called what it is."""
    assert full_disk(0, 1).signature == full_disk(2, 2).signature != ""
    assert full_disk(0, 1).signature != full_disk(0, 1, why="Read-only file system").signature
