"""What charts are made of."""

from ringrl.study.report_cells import gather
from ringrl.study.report_draw import SOLID, styles
from ringrl.study.report_svg import SERIES


def test_every_method_has_its_own_line(make_rollouts):
    """More methods than colours: the rest are dashed; without a context they are grey."""
    records = [record for index in range(9) for record in make_rollouts(1, 0, 1.0, method=f"method-{index}")]
    for name in ("bc", "td3", "random"):
        records += make_rollouts(1, 0, 1.0, method=name, train_trajectories=None)
    found = list(styles(gather(records)).values())
    assert len({(key.colour, key.dash) for key in found}) == 12
    assert [key.dash for key in found[: len(SERIES)]] == [SOLID] * len(SERIES)
    assert {key.colour for key in found[9:]} == {"muted"}
