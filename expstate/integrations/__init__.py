"""Takes that come by themselves in a training: ``autosave`` for a loop of one's own, and what trainers are given to take and resume.

``lightning``, ``transformers`` and ``accelerate`` are modules of their own, each for the framework of that name, which is not installed
with expstate.
"""
