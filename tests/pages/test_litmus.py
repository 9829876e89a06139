"""The litmus tests: the documents name each of them, and no fence stands in one without a twin that lacks it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import MODEL, table

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture
def litmus():
    spec = importlib.util.spec_from_file_location("litmus_runner", MODELS / "litmus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def text_of(name: str) -> str:
    return (MODELS / "litmus" / f"{name}.litmus").read_text()


def test_every_fence_of_the_table_names_its_litmus_tests_and_none_is_left_out(litmus):
    *_, header = next(line for line in MODEL.splitlines() if line.startswith("| fence |")).strip("| ").split("|")
    assert header.strip() == "litmus test"
    named = [re.findall(r"[a-z0-9-]+", row[-1]) for row in table(MODEL, "fence", "where")]
    assert all(named)
    argued = MODEL.partition("## Fences")[2].partition("## Machines")[0]
    assert {name for names in named for name in names} <= set(litmus.names())
    assert {name for name in litmus.names() if f"`{name}`" not in argued} == set()


def test_every_fence_of_a_litmus_test_has_a_twin_without_it(litmus):
    for name in litmus.names():
        text = text_of(name)
        twins = litmus.twins_of(text)
        assert text.split()[:2] == ["AArch64", name]
        assert (name, litmus.unproved(text)) == (name, [])
        assert len(twins) == text.count("   twin ") > 0
        for twin in twins:
            weak = litmus.weakened(text, twin)
            [(before, after)] = [
                (before, after)
                for former, row in zip(litmus.cells(text), litmus.cells(weak), strict=True)
                for before, after in zip(former, row, strict=True)
                if before != after
            ]
            assert (before, after) == (twin.instruction, twin.instead)


def test_a_fence_without_a_twin_is_found(litmus):
    text = text_of("owner")
    assert litmus.unproved(text.replace("twin LOOK_AGAIN", "LOOK_AGAIN")) == ["P1: DMB ISH/2"]


def test_the_steps_of_a_litmus_test_are_on_the_page_that_it_names():
    for path in (MODELS / "litmus").glob("*.litmus"):
        for page, said in re.findall(r"(docs/[a-z/-]+\.md): ([A-Z][^.;]*)[.;]", path.read_text()):
            there = (MODELS.parent / page).read_text()
            for step in re.findall(r"\b[A-Z]\d\b", said):
                assert re.search(rf"\b{step}\b", there), f"{path.name}: {page} has no step {step}"


@pytest.mark.skipif(shutil.which("herd7") is None, reason="herd7 is not installed")
@pytest.mark.once
def test_a_wrong_litmus_test_fails(tmp_path, litmus, monkeypatch, capsys):
    """One that holds for no reason, since its twin holds as well; and one that does not hold."""
    text = text_of("gate-stop")
    (tmp_path / "needless.litmus").write_text(text.replace("gate-stop", "needless").replace("1:X3=1", "1:X3=3"))
    (tmp_path / "broken.litmus").write_text(text.replace("gate-stop", "broken").replace("DMB ISH ", "NOP     "))
    monkeypatch.setattr(litmus, "HERE", tmp_path)
    assert litmus.main(["needless"]) == 1
    assert capsys.readouterr().out.count("BAD ") == 2
    with pytest.raises(SystemExit, match="broken: there is no"):
        litmus.main(["broken"])
    assert "BAD  broken" in capsys.readouterr().out


def test_the_runner_says_that_herd7_is_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(MODELS / "litmus.py")],
        env={**os.environ, "PATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "herd7 is not installed" in done.stderr
