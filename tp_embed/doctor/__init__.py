"""``tp-embed doctor``: finds out, before a job, whether its processes can work together.

Each rank looks at itself (:mod:`.facts`, a module for each topic); rank 0 gets what all have seen
over :mod:`.meeting`, which waits for nobody for ever, and judges it: a list of
:class:`~.findings.Finding`. :mod:`.exam` is the order of it all.
"""
