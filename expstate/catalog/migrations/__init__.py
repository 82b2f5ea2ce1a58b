"""How the tables of the catalog came to be what they are: one migration per version, run by Alembic.

``versions.py`` of the catalog says when. ``schema`` holds what they lead to, and a test compares the two.
"""
