from mlx_blockskip.engine.names import Names


def test_names_under_a_prefix_come_in_their_order():
    names = ["2.b", "2.a", "10.b", "2", "2.a.x", "1.a", "20.a", "2.Z\u00fc", "2.\U0001f600"]
    for prefix in ("", "2", "2.", "2.a", "2.a.", "1", "3", "2.Z", "2.\U0001f600"):
        assert Names(names).under(prefix) == [name for name in names if name.startswith(prefix)], prefix


def test_the_others_are_not_looked_at():
    class Counted(str):
        seen = 0

        def __lt__(self, other):
            Counted.seen += 1
            return str.__lt__(self, other)

    names = Names(Counted(f"{i}.a") for i in range(4096))
    Counted.seen = 0
    assert names.under("77.") == ["77.a"]
    assert Counted.seen <= 26, "twice the binary logarithm"
