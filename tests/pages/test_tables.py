"""Marks of columns are understood in one place."""

from vitarium.pages.tables import TableData


def test_headers_lose_their_marks_and_keep_their_alignment():
    table = TableData("costs", ["model", ">latency", "~note", "~>size"], [["a", "1", "", "2"]])
    assert table.headers == [("model", False), ("latency", True), ("note", False), ("size", False)]
    assert table.values() == dict(kind="table", title="costs", columns=table.headers, rows=table.rows)
