"""`difference` describes in one line how two lists of names differ, however long they are."""

import pytest

from resnet_fast.common.checks import difference, shown

NAMES = [f"c{i}" for i in range(1000)]
LISTS = {
    "equal": (NAMES, NAMES, ""),
    "the last": (NAMES, [*NAMES[:-1], "d"], "only A has 'c999'; only B has 'd'"),
    "many more": (NAMES, NAMES[:10], "only A has 'c10', 'c11', 'c12' and 987 more"),
    "order": (NAMES, [*NAMES[:-2], "c999", "c998"], "the order differs from number 999 on: A has 'c998', B 'c999'"),
    "twice": (NAMES, [*NAMES, "c0"], "one has names twice: A has None, B 'c0'"),
    "control characters": (["a"], ["\x1b[2J"], r"only A has 'a'; only B has '\x1b[2J'"),
}


@pytest.mark.parametrize("case", LISTS)
def test_the_difference_is_named(case: str):
    ours, theirs, expected = LISTS[case]
    assert difference(ours, theirs, "A", "B") == expected


@pytest.mark.parametrize(
    "value", [10**5000, "x" * 5000, "\ud800\n", [[[]]] * 3, [10**400] * 4, {"a": 1}, b"x" * 500], ids=range(7)
)
def test_any_value_of_a_file_is_shown_on_a_short_line(value: object):
    assert len(shown(value)) <= 60 and shown(value).isprintable()
