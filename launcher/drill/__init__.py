"""Rehearsals. ``phalanx drill``: a run at toy width, broken on purpose, and compared with the undisturbed run.
``phalanx submit --rehearse``: the same run at toy width, submitted like any other, through one fault to its end.

====================  ==================================================================================
``toy``               the experiment, small enough for this machine, every degree above 1 still above 1
``concessions``       what cannot run at all, given up: as little as possible
``changes``           how it differs from the experiment, and what is the same
``miniature``         what is submitted, and how its end is judged
``case``              what a fault of the catalogue is made of
``catalogue``         every fault, with what it does, what it needs and how it must end
``draw``              faults drawn by a seed
``acts``              what the drill does from outside: to files, processes, links and file systems
``needs``             what this machine lets us do
``network``           machines made of network namespaces
``ambush``            a controller that kills itself in a phase of its table
``rehearsal``         one run under observation, from its directory to the proof that nothing is left
``evidence``          what the records of that run prove
``witness``           what the log says of a fault: since it struck, and of where it struck
``promises``          what a fault must have come to beyond being noticed
``bounds``            how soon it must be known, and what it may cost
``compare``           its losses and weights against those of the undisturbed run
``report``            the table, and the same as JSON
====================  ==================================================================================
"""
