"""``python -m tests.fuzz.drive NAME SECONDS FOLDER``: let atheris, which sees what code is reached, look for what breaks a reader.

Ends with an error if it finds one, and leaves it in the folder as ``crash-...`` or ``timeout-...``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import atheris

MOST_SECONDS = 1.0
"""Of the processor's time, for one input."""


class HangError(BaseException):
    """An input took too long."""


def _reader(name: str, place: Path) -> tuple[Sequence[bytes], Callable[[bytes], None]]:
    """Inputs to begin with, and the call for one; imported only now, so that it is followed."""
    if name == "planted":
        from tests.fuzz import planted

        return planted.SEEDS, planted.read
    from tests.fuzz.targets import READERS

    target = READERS[name](place)
    return target.seeds, target


def main(name: str, seconds: str, folder: str) -> None:
    """Run until the time is up, or something is found."""
    place = Path(folder)
    corpus = place / "corpus"
    corpus.mkdir()
    with atheris.instrument_imports(include=["expstate", "tests.fuzz"]):
        seeds, target = _reader(name, place)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def one(data: bytes) -> None:
        began = time.process_time()
        target(data)
        if time.process_time() - began > MOST_SECONDS:
            raise HangError(f"{time.process_time() - began:.1f} s for {len(data):,} bytes")  # noqa: TRY003, EM102

    options = [f"-max_total_time={seconds}", f"-artifact_prefix={place}/", "-timeout=60", "-rss_limit_mb=4096", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
