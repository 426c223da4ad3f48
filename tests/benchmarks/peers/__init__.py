"""What phalanx is measured against: the same training loop on the same engine, kept alive by others."""

JOB = "job.json"
"""Name of the job's file in the run directory of a peer."""

TAG = "peer"
"""Name of DeepSpeed's checkpoints."""
