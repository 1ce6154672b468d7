"""The table of traps in CONTRIBUTING.md, against the tests."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[3]
TRAPS = range(1, 32)


def test_every_trap_is_in_the_table_and_has_a_test_or_a_reason() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE))
    assert [int(number) for number in rows] == list(TRAPS)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tested = {int(number) for number in re.findall(r"^def test_trap_(\d\d)_", tests, re.MULTILINE)}
    reasoned = {int(number) for number, action in rows.items() if "cannot arise" in action}
    assert tested | reasoned == set(TRAPS) and not tested & reasoned


def test_tests_named_in_the_table_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Traps of")[2].partition("\n## ")[0]
    names = set(re.findall(r"[\w/]+\.py", text))
    assert names
    for name in names:
        assert any((ROOT / folder / name).is_file() for folder in ("", "tests/training", "chatreid_plugin")), name
