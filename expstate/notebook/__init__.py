"""expstate in a notebook: ``%load_ext expstate`` brings ``%snapshot``, the browser, undo and guarded cells.

``kernel`` holds what lives in one kernel and does what is asked; ``magic`` and ``browser`` are its two faces.
"""
