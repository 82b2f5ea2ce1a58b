from .test_widget import *
from .test_widget import browsing
import pytest
def test_tmp(browsing, open_notebook):
    page = browsing(app="notebooks", theme="light")
    page.page.on("console", lambda m: print("console", m.text[:200]))
    rows(page).first.click()
    part(page, "tab-objects").click()
    tree = part(page, "tree-row"); tree.first.wait_for()
    page.page.wait_for_timeout(800)
    tree.first.focus()
    js="(document.activeElement.className+'|'+document.activeElement.textContent).slice(0,90)"
    print("start", page.script(js))
    for k in ("ArrowRight","ArrowDown","Enter"):
        page.page.keyboard.press(k); page.page.wait_for_timeout(400)
        print(k, page.script(js), part(page,"card").count())
    page.page.screenshot(path="/tmp/nb.png")
    assert 0
