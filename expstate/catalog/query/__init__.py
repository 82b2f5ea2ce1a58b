"""Finding records: ``search`` parses a query and a sort, compiles them to SQL with bound values, and gives ``Records``.

``parse`` makes the tree of ``tree``, ``names`` finds what its names mean, ``conditions`` and ``sort`` make SQL of it, ``plans`` run it.
"""

from expstate.catalog.query.finding import search as search
