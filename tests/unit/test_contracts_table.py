"""The table of contracts is what the suite recorded, no contract fails in it, and every link leads to a test."""

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("contracts_table", ROOT / "benchmarks" / "contracts_table.py")
TABLE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TABLE)
ROWS = json.loads(TABLE.RESULTS.read_text(encoding="utf-8"))


def test_page_is_rendered_from_the_record():
    assert TABLE.PAGE.read_text(encoding="utf-8") == TABLE.render(ROWS), "run python benchmarks/contracts_table.py"


def test_every_contract_holds_in_every_mode():
    assert {row["ours"] for row in ROWS} == {"holds"}
    on_cpu = [row for row in ROWS if row["mode"] in TABLE.MODES]
    assert {row["mode"] for row in ROWS} <= {*TABLE.MODES, *TABLE.GPU_MODES}
    names = {row["contract"] for row in on_cpu}
    assert {(row["contract"], row["mode"]) for row in on_cpu} == {(name, mode) for name in names for mode in TABLE.MODES}


def test_every_link_leads_to_the_test_that_it_names():
    tests = {row["contract"]: row["test"].partition("::")[2] for row in ROWS}
    links = re.findall(r"^\| \[(.+?)\]\(\.\./(.+?)#L(\d+)\)", TABLE.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    tables = [{row["contract"] for row in ROWS if row["mode"] in modes} for modes in (TABLE.MODES, TABLE.GPU_MODES)]
    assert len(links) == sum(map(len, tables))
    for name, path, line in links:
        text = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert text.startswith(f"def {tests[name]}("), name


def test_gpu_has_a_table_of_its_own_and_what_was_not_tried_is_left_empty():
    known = {"contract": "a", "comfyui": "1", "utc": "2026-01-01", "test": "tests/unit/test_contracts_table.py::test", "ours_error": 0.01}
    cpu = [{**known, "mode": mode, "ours": "holds", "native": "holds", "native_error": 0.02} for mode in TABLE.MODES]
    gpu = {**known, "contract": "b", "mode": "gpu-graph", "ours": "holds", "native": "not tried", "native_error": None, "device": "H100"}
    page = TABLE.render([*cpu, gpu])
    assert "## On a GPU" in page and "on an H100" in page and "of the 0 tried with it" in page
    assert re.search(r"^\| \[b\]\(.*\) \|  \|  \| holds, 1.0 % \|  \|  \|$", page, re.MULTILINE)
