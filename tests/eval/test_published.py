"""The paper's figures once more, typed from its tables, so that a slip in ``published.yaml`` cannot go unseen."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from chatreid_plugin.eval.comparison import read_published


# As printed: mAP and Rank-1 of each benchmark in turn; a dash where the paper has one.
MAP_AND_RANK_1 = {
    "Table 1. Standard person Re-ID": """
        TransReID   86.8 94.4  61.0 81.8  -    -
        SAN         88.0 96.1  -    -     76.4 80.1
        HumanBench  89.5 -     69.1 -     77.7 -
        PASS        93.0 96.8  71.8 88.2  -    -
        IRM         93.5 96.5  72.4 86.9  85.4 86.5
        ChatReID    96.4 97.2  87.5 90.1  91.3 92.7
    """,
    "Table 2. Cloth-changing Re-ID": """
        HACNN       26.7 60.2  -    21.8
        RGA-SC      27.5 65.0  -    42.3
        PCB         30.6 65.1  38.7 41.8
        IANet       31.0 63.7  45.9 46.3
        CAL         40.8 74.2  -    -
        TransReID   -    -     44.2 -
        IRM         52.0 75.8  52.3 54.2
        ChatReID    76.3 82.7  75.6 80.2
    """,
    "Table 3. Visible-infrared Re-ID": """
        DART        66.3 68.7  75.7 83.6
        CAL         66.9 69.6  79.1 85.0
        MPANet      68.2 70.6  80.7 82.8
        MMN         66.9 70.6  84.1 91.6
        DCLNet      65.3 70.8  74.3 81.2
        MAUM        68.8 71.7  85.1 87.9
        DEEN        71.8 74.7  85.1 91.1
        ChatReID    83.6 86.8  95.8 96.5
    """,
    "Table 5. Text-to-image Re-ID": """
        IRRA        66.1 73.4  38.1 63.5  -    60.2
        RDE         67.6 75.9  40.1 67.7  50.9 65.4
        WoRA        67.2 76.4  42.6 87.5  52.5 66.9
        RaSa        69.4 76.5  41.3 65.3  52.3 67.0
        APTM        66.9 76.5  41.2 68.5  -    67.5
        MARS        71.7 77.6  44.9 67.6  52.9 67.6
        IRM         66.5 74.2  -    -     -    -
        ChatReID    80.1 83.8  70.5 72.9  73.1 75.0
    """,
}
# mAP alone, the average last.
ABLATION = {
    "Stage 3": (59.2, 41.5, 60.3, 31.2, 35.4, 11.4, 12.7, 65.1, 49.9, 43.5, 41.0),
    "Stage 2 + Stage 3": (92.1, 79.5, 85.7, 60.2, 55.1, 76.2, 74.7, 77.8, 62.5, 71.4, 73.5),
    "ChatReID": (96.4, 87.5, 91.3, 76.3, 75.6, 83.6, 95.8, 80.1, 70.5, 73.1, 83.0),
}
# Rank-1 alone.
SIZES = {"0.5 B": (38.1, 27.4, 4.3, 55.1), "2 B": (90.1, 82.7, 96.5, 83.8), "7 B": (91.3, 82.5, 96.3, 87.7)}
BENCHMARKS = {
    "Table 1.": ["market1501", "msmt17", "cuhk03"],
    "Table 2.": ["ltcc", "prcc"],
    "Table 3.": ["sysumm01", "regdb"],
    "Table 4.": "market1501 msmt17 cuhk03 prcc ltcc sysumm01 regdb cuhkpedes icfgpedes rstpreid".split(),
    "Table 5.": ["cuhkpedes", "icfgpedes", "rstpreid"],
    "Table 6.": ["msmt17", "ltcc", "regdb", "cuhkpedes"],
}


def find_table(start: str) -> Mapping[str, Any]:
    """Return the one table of ``published.yaml`` whose title begins so."""
    (table,) = [table for table in read_published()["tables"] if table["title"].startswith(start)]
    return table


def iterate_cells(table: Mapping[str, Any]) -> Iterator[tuple[str, list[float | None]]]:
    """Yield each row's name and its figures one after another, two for each benchmark."""
    for name, cells in table["rows"].items():
        yield name, [figure for cell in cells for figure in (cell or (None, None))]


@pytest.mark.parametrize("title", list(MAP_AND_RANK_1))
def test_figures_are_those_of_the_paper(title: str) -> None:
    lines = [line.split() for line in MAP_AND_RANK_1[title].strip().splitlines()]
    wanted = [(name, [None if word == "-" else float(word) for word in words]) for name, *words in lines]
    assert list(iterate_cells(find_table(title))) == wanted


def test_ablation_is_that_of_the_paper() -> None:
    table = find_table("Table 4.")
    found = {name: (*figures[::2], table["averages"][name]) for name, figures in iterate_cells(table)}
    assert found == ABLATION
    assert not any(figure for _, figures in iterate_cells(table) for figure in figures[1::2])


def test_model_sizes_are_those_of_the_paper() -> None:
    rows = dict(iterate_cells(find_table("Table 6.")))
    assert {name: tuple(figures[1::2]) for name, figures in rows.items()} == SIZES
    assert not any(figure for figures in rows.values() for figure in figures[::2])


def test_columns_are_those_of_the_paper() -> None:
    found = {table["title"][:8]: table["benchmarks"] for table in read_published()["tables"]}
    assert found == BENCHMARKS
