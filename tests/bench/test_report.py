"""What the benchmark's records and table say of the outcomes."""

from __future__ import annotations

import pytest

from expstate.bench.plan import GIB, MIB, Outcome
from expstate.bench.report import records, table


def _outcomes(*seconds, **more):
    return [Outcome(value, cpu_seconds=value / 2, peak_extra_bytes=int(value * MIB), bytes=GIB, **more) for value in seconds]


def test_the_best_setting_by_its_median_stands_for_a_system():
    results = {
        ("take", "limit", "write", "1 thread"): _outcomes(2.0, 2.0, 2.0),
        ("take", "limit", "write", "2 threads"): _outcomes(1.0, 1.0, 9.0),
        ("take", "expstate", "", ""): _outcomes(1.25, 1.25, 3.0),
        ("take", "torch", "", ""): _outcomes(5.0, 5.0, 5.0),
        ("take", "dcp", "", "1 thread"): _outcomes(4.0, 4.0, 4.0),
    }
    found = {record.system: record for record in records(results)}
    assert ("write 2 threads", [1.0, 1.0, 9.0], 1.0) == (found["limit"].setting, found["limit"].seconds, found["limit"].ratio_to_limit)
    ours = found["expstate"]
    assert (0.8, 0.8, 3.2, 3 * MIB, 0.625) == (
        ours.ratio_to_limit,
        ours.gib_per_s,
        ours.ratio_to_best_peer,
        ours.peak_extra_bytes,
        ours.cpu_seconds,
    )
    assert found["torch"].ratio_to_best_peer is None


def test_a_setting_given_up_early_does_not_win_by_one_lucky_run():
    results = {
        ("take", "dcp", "", "1 thread"): _outcomes(1.0),
        ("take", "dcp", "", "2 threads"): _outcomes(0.7, 1.2, 1.2),
    }
    (record,) = records(results)
    assert "2 threads" == record.setting


def test_the_slowest_component_is_the_limit():
    results = {
        ("take", "limit", "write", "1 thread"): _outcomes(1.0),
        ("take", "limit", "to_host", "1 stream"): _outcomes(2.0),
        ("take", "limit", "to_host", "2 streams"): _outcomes(1.5),
        ("take", "expstate", "", ""): _outcomes(3.0),
    }
    limit, ours = records(results)
    assert ("to_host 2 streams", 0.5) == (limit.setting, ours.ratio_to_limit)


@pytest.mark.parametrize("component", ["write", "to_host"])
def test_no_limit_is_told_where_a_component_of_it_failed(component):
    other = {"write": "to_host", "to_host": "write"}[component]
    results = {
        ("take", "limit", component, ""): [Outcome(error="OSError: broken")],
        ("take", "limit", other, ""): _outcomes(2.0),
        ("take", "expstate", "", ""): _outcomes(3.0),
    }
    limit, ours = records(results)
    assert ("OSError: broken", [], None) == (limit.error, limit.seconds, ours.ratio_to_limit)


def test_a_failure_is_a_row_and_its_reason_stands_below():
    results = {
        ("restore_cold", "expstate", "", ""): _outcomes(0.5, cached_bytes=3 * MIB),
        ("restore_cold", "torch", "", "mmap"): [*_outcomes(0.1), Outcome(error="RuntimeError: no luck")],
        ("small_tensors", "expstate", "", ""): _outcomes(0.5, parts={"take": 0.2, "restore": 0.3}),
    }
    text = table(records(results))
    lines = text.splitlines()
    assert "restore_cold   torch     mmap      failed" in lines
    assert "restore_cold torch: failed: RuntimeError: no luck" in lines
    assert "restore_cold expstate: 3.0 MiB were still in the page cache" in lines
    assert "small_tensors expstate: take 0.2000 s, restore 0.3000 s" in lines
    assert "" == next(line for line in lines[1:] if not line.startswith(("restore", "small")))
