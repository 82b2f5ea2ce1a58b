"""Two snapshots compared, or a snapshot with live state.

``run`` does the steps: ``live`` digests live state, ``compare`` finds what differs by digests alone, ``facts`` what else is known and
differs, ``stream``, ``slabs`` and ``stats`` read what must be read. ``report`` is what comes out; ``summary``, ``table``, ``page``
and ``heatmap`` are its faces, ``show`` their words.
"""
