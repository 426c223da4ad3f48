"""The persister: one process per node that owns the memory of its ranks' snapshots and writes the disk tier.

It outlives ranks and attempts, so that what was copied is written although those who copied it are dead, and so that
the next attempt finds the newest generations where they were. (What is committed once that attempt has begun counts
only if it goes on from there: :mod:`jobs.checkpoint.fence`.) No torch, no numpy.
"""
