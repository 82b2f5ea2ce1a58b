"""Snapshots in object stores, and wherever fsspec reaches: ``storage`` on top, ``client`` what it asks of a bucket, a client a file.

``open_objects`` picks the client for a URL; ``retry`` tries requests again.
"""
