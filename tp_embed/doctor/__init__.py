"""``tp-embed doctor`` checks, before a job, that its processes can work together.

Each rank inspects itself (:mod:`.facts`, a module per topic). Rank 0 gathers the facts over
:mod:`.meeting`, where every wait has a timeout, and turns them into a list of
:class:`~.findings.Finding`. :mod:`.exam` runs it all.
"""
