"""What is timed. To add a column, register a build function under its name."""

from __future__ import annotations

from fastrnn.bench.work import MODULES, Build

# Name and build function of each column, in the order of the table. A build function returns None
# for a workload it does not do (a peer that cannot train, say): its column then stays empty.
IMPLEMENTATIONS: dict[str, Build] = dict(MODULES)
