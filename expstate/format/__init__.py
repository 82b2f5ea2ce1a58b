"""What is stored.

``manifest`` (the records of ``snapshot.json``), ``validate`` (what a manifest must hold to be believed), ``layout``
(where each tensor lies in the data files) and ``names`` (ids, file names and labels).
"""
