"""Where snapshots live: one small interface (``base``), a backend a file, and ``open_storage`` that picks one by URL."""
