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
    names = {row["contract"] for row in ROWS}
    assert {(row["contract"], row["mode"]) for row in ROWS} == {(name, mode) for name in names for mode in TABLE.MODES}


def test_every_link_leads_to_the_test_that_it_names():
    tests = {row["contract"]: row["test"].partition("::")[2] for row in ROWS}
    links = re.findall(r"^\| \[(.+?)\]\(\.\./(.+?)#L(\d+)\)", TABLE.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(links) == len(tests)
    for name, path, line in links:
        text = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert text.startswith(f"def {tests[name]}("), name
