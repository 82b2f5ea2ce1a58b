"""The catalog: every take recorded, to be found, compared, kept and thrown away.

``Catalog`` is the face; SQLAlchemy and what else it needs are imported when a catalog is first used. ``recorder`` is what a take tells
it, ``provenance`` gathers where a take came from.
"""
