"""``phalanx drill``: rehearse a run at toy width, break it on purpose, and compare it with the undisturbed run.

====================  ==================================================================================
``toy``               the experiment, small enough for this machine, every degree above 1 still above 1
``case``              what a fault of the catalogue is made of
``catalogue``         every fault, with what it does, what it needs and how it must end
``draw``              faults drawn by a seed
``acts``              what the drill does from outside: to files, processes, links and file systems
``needs``             what this machine lets us do
``network``           machines made of network namespaces
``ambush``            a controller that kills itself in a phase of its table
``rehearsal``         one run under observation, from its directory to the proof that nothing is left
``evidence``          what the records of that run prove
``compare``           its losses and weights against those of the undisturbed run
``report``            the table, and the same as JSON
====================  ==================================================================================
"""
