"""Snapshots in a bucket as people use them in a notebook: taken by the magic, looked into and put back in the browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.objects.servers import ENVIRONMENT, KEY, SECRET, S3Server, started

from .pages import NotebookPage
from .test_widget import open_tensor, part, rows, widget

_SETUP = """
import os
os.environ |= {environment!r}
%load_ext expstate
import torch
from expstate import StateDict
weights = StateDict(first=torch.full((8, 8), 1.0), second=torch.full((8, 8), 2.0))
"""
_TAKE = """
%snapshot use s3://lab/runs --option endpoint_url={url}
%snapshot take weights --name far --metric loss=0.5 --wait
for value in weights.values():
    value.zero_()
"""


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with started(S3Server, tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket("lab")
        yield server


def test_a_snapshot_in_a_bucket_is_taken_looked_into_and_put_back(open_notebook: Callable[..., NotebookPage], s3_server: S3Server) -> None:
    """Of its two entries only the one that is ticked."""
    keys = ENVIRONMENT | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    page = open_notebook([_SETUP.format(environment=keys), _TAKE.format(url=s3_server.url), "%snapshot browse"])
    page.run_all()
    page.until(lambda: rows(page).count() == 1)
    assert "far" in rows(page).first.inner_text()

    rows(page).first.click()
    page.until(lambda: "s3://lab/runs/" in part(page, "pane").inner_text())
    part(page, "tab-objects").click()
    open_tensor(page)
    assert "weights/first" in part(page, "card").inner_text()

    part(page, "restore").click()
    key, second = (part(page, "tree-row").filter(has_text=name) for name in ("weights", "second"))
    key.click()
    page.page.keyboard.press("ArrowRight")
    second.get_by_role("checkbox").click()
    page.until(lambda: not second.get_by_role("checkbox").is_checked() and part(page, "restore-run").is_enabled())
    page.screenshot("bucket-restore", widget(page))
    part(page, "restore-run").click()
    page.until(lambda: page.value("[float(value.sum()) for value in weights.values()]") == [64.0, 0.0])
