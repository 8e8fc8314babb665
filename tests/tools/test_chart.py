from fxstream.tools.chart import memory_chart

MIB = 2**20


def cells(chart):
    """The columns of a chart's plot, from the bottom up."""
    rows = [line[line.index(mark) + 1 :] for line in chart.splitlines() for mark in "┤│" if mark in line]
    width = max(map(len, rows))
    return ["".join(column)[::-1].rstrip() for column in zip(*(row.ljust(width) for row in rows), strict=True)]


def test_a_column_for_each_operator():
    assert memory_chart([MIB, 4 * MIB, 2 * MIB, 0], width=14, height=4) == "\n".join(
        [
            "4.00 MiB ┤ █",
            "         │ █",
            "         │ ██",
            "1.00 MiB ┤███",
            "       0 └────",
            "          1  4",
        ]
    )


def test_a_column_shows_the_most_of_its_part():
    live = [1] * 1000
    live[500] = 8
    columns = cells(memory_chart(live, height=1))
    assert columns.count("█") == 1
    assert set(columns) == {"▁", "█"}


def test_few_operators_are_stretched():
    columns = cells(memory_chart([3, 6], height=2))
    half = len(columns) // 2
    assert columns == ["█"] * half + ["██"] * half


def test_lines_keep_the_width():
    for live in ([5], list(range(7)), list(range(9999)), [10**12] * 50):
        assert max(map(len, memory_chart(live, width=60).splitlines())) == 60


def test_one_scale_for_two_charts():
    before, after = [4 * 2**30, 2**30], [2**30, 2**30]
    charts = [memory_chart(live, height=8, top_bytes=max(before)) for live in (before, after)]
    assert [chart.splitlines()[0].split(" ┤")[0].strip() for chart in charts] == ["4.00 GiB"] * 2
    assert [max(map(len, cells(chart))) for chart in charts] == [8, 2]


def test_little_is_not_nothing():
    assert cells(memory_chart([10**9, 1], height=3))[-1] == "▁"


def test_units():
    for top, label in ((3 * 2**30, "3.00 GiB"), (5 * MIB, "5.00 MiB"), (2048, "2.00 KiB"), (7, "7.00 B")):
        assert memory_chart([top]).split(" ┤")[0] == label


def test_nothing_live():
    assert set(cells(memory_chart([0, 0]))) == set()
    assert memory_chart([]).splitlines()[-1].endswith("0")
