"""Jobs that only compute with a model: evaluation and generation.

``rows`` turns files into rows of tokens where the job is submitted; ``questions`` reads and checks them; ``scoring``
and ``generation`` run the rows through a :class:`jobs.forward.Forward`; ``results`` sums up. Only those two need torch.
"""
