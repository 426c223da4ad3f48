"""What a resume would change, field by field: safe, changing the run, or refused. Pure: two requests in, a list out.

*Safe* leaves every later loss as it would have been. *Changes the run* is a person's right, but the numbers after it
are others. *Refused* would make another run out of this one: other weights, other samples, another position in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from launcher import resume_data
from launcher.request import LaunchRequest
from strategies.codec import to_json

Verdict = Literal["safe", "changes the run", "refused"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One field that a resume would change.

    Attributes:
        field: Dotted name in the launch request, without the leading ``job.``.
        before: Value in the last attempt.
        after: Value after the resume.
        verdict: What follows from it.
        reason: Why.
    """

    field: str
    before: Any
    after: Any
    verdict: Verdict
    reason: str


# The first prefix that fits decides. What is derived from other fields is left out (None).
_RULES: tuple[tuple[str, Verdict | None, str], ...] = (
    ("version", None, ""),
    ("overrides", None, ""),
    ("deepspeed", None, "follows from the plan and the recipe"),
    ("run_id", None, "follows from run_name"),
    ("plan.version", None, ""),
    ("plan.grad_accum", None, "follows from the batch and the plan"),
    ("run_name", "refused", "the name is the run's identity"),
    ("run_dir", "safe", "the same run in another place"),
    ("kind", "refused", "another kind of job is another run"),
    ("model.name", "safe", "a name for people"),
    ("model.moe.imbalance", "safe", "only planned with"),
    ("model", "refused", "the checkpoints hold the weights of another model"),
    ("batch", "refused", "the position in the data is counted in batches of the old size"),
    ("inference", "refused", "what is done was done with the old questions"),
    ("initial", "refused", "the weights that the run began with are its own"),
    ("train.seed", "refused", "the seed fixes the initial weights and the order of samples"),
    ("train.sample", "safe", "only the text generated at the end"),
    ("train.eval", "safe", "what is measured beside the run does not change it"),
    ("train.spike_sigmas", "safe", "what is taken for a blow-up does not change the numbers"),
    ("train.steps", "changes the run", "the learning rate decays over the whole run"),
    ("train.precision", "changes the run", "other rounding from the next step on"),
    ("train", "changes the run", "another recipe from the next step on"),
    ("data.store", "safe", "the same tokens in another place"),
    ("data.path", "safe", "the same tokens from another place"),
    ("data.vocab", "refused", "the vocabulary of the checkpoints is another one"),
    ("data.end_token", "safe", "the same token ends a document"),
    ("data.end_id", "refused", resume_data.END),
    ("data.tokenizer", "refused", resume_data.TOKENIZER),
    ("data", "refused", resume_data.OTHER),
    ("plan", "changes the run", "the same losses, but only to rounding: no longer bit-identical"),
    ("checkpoint.url", "refused", "the checkpoints of the run lie where it began"),
    ("checkpoint", "safe", "when checkpoints are made does not change the numbers"),
    ("skips", "changes the run", "other samples at the steps to come"),
    ("faults", "safe", "recovery is exact"),
    ("command", "changes the run", "the script decides"),
    ("workdir", "changes the run", "the project has changed since the last attempt"),
    ("cluster", "safe", "where it runs does not change the numbers"),
    ("recovery", "safe", "patience does not change the numbers"),
    ("tracking", "safe", "only where metrics go"),
)


def compare(before: LaunchRequest, after: LaunchRequest, *, step: int) -> list[Change]:
    """Every field that differs.

    Args:
        before: The request of the last attempt.
        after: The request of the resume.
        step: Step of the checkpoint that the resume would start from; 0 for the beginning.
    """
    old, new = dict(_fields(to_json(before), "")), dict(_fields(to_json(after), ""))
    changes = []
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            change = _judge(name, old.get(name), new.get(name))
            if change is not None:
                changes.append(_judge_tokens(change, before, after))
    if after.job.kind == "pretrain" and after.job.train.steps < max(1, step):
        changes = [change for change in changes if change.field != "train.steps"]
        reason = f"step {step} is done already"
        changes.append(
            Change(
                field="train.steps",
                before=before.job.train.steps,
                after=after.job.train.steps,
                verdict="refused",
                reason=reason,
            )
        )
    return [_judge_skips(change, before, after, step) if change.field == "skips" else change for change in changes]


def _judge_tokens(change: Change, before: LaunchRequest, after: LaunchRequest) -> Change:
    """Digests decide whether tokens are the same; if not, the reason is what made others of them."""
    if change.field not in ("data.digest", "data.sources"):
        return change
    old, new = before.job.data, after.job.data
    if change.field == "data.sources" and resume_data.same_elsewhere(old, new):
        return replace(change, verdict="safe", reason="the same tokens in another place")
    return replace(change, reason=resume_data.cause(old, new))


def _judge_skips(change: Change, before: LaunchRequest, after: LaunchRequest, step: int) -> Change:
    old, new = ([skip for skip in job.skips if skip.step <= step] for job in (before.job, after.job))
    if old == new:
        return change
    return replace(change, verdict="refused", reason=f"the samples up to step {step} have been dealt out already")


def _fields(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Leaves by dotted name; what follows from other fields stays whole."""
    for key, item in value.items():
        name = f"{prefix}{key}".removeprefix("job.")
        if isinstance(item, Mapping) and name != "deepspeed":
            yield from _fields(item, f"{prefix}{key}.")
        else:
            yield name, item


def _judge(name: str, before: Any, after: Any) -> Change | None:
    for prefix, verdict, reason in _RULES:
        if name == prefix or name.startswith((f"{prefix}.", f"{prefix}_")):
            if verdict is None:
                return None
            return Change(field=name, before=before, after=after, verdict=verdict, reason=reason)
    return Change(field=name, before=before, after=after, verdict="refused", reason="its effect is not known")
