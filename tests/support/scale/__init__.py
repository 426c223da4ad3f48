"""A cluster that is simulated up to its sockets, for the real controller: agents, clock, failures, checkpoints.

What is real: :class:`launcher.controller.Controller` and all below it (gang, muster, sizing, recovery, line-up, store,
ledger, lock, adoption), the wire protocol with its handshake on both sides (:class:`launcher.host.peers.Peers`,
:class:`launcher.host.events.EventLog`), one TCP connection per node, the run directory with its event log and the
manifests of checkpoints. What is played: processes of ranks, devices and the passing of time.

- :mod:`clock`: time that jumps to the next thing that happens once every byte that was sent has been read.
- :mod:`faults`: a seeded trace of failures.
- :mod:`pace`: how far a gang has got, by arithmetic.
- :mod:`node`: one host agent; :mod:`world` has all of them, and breaks them.
- :mod:`storage`: what survives a failure, as real manifests.
- :mod:`play`: one run from the first gang to the last day, with its ledger and the planner's prediction.
- :mod:`serve`: the agents in a process of their own, in real time.
"""
