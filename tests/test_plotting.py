"""The figures show the numbers they are given, and need matplotlib only when they are drawn."""

import io
import subprocess
import sys

import pytest
import torch
from PIL import Image

import stf_diffusers.plotting as plotting
from oracles import images
from stf_diffusers import EDM, target_variance
from stf_diffusers.diagnostics import Estimate

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def rows():
    data = images(60, 1, 4, 4)
    generator = torch.Generator().manual_seed(0)
    return target_variance(EDM(), data, [0.01, 0.5, 1.0, 5.0], reference_batch_sizes=(4, 30), generator=generator)


def curve(axis, label):
    """(x, y, error) of the error bars with this label."""
    (bars,) = [bars for bars in axis.containers if bars.get_label() == label]
    line, _, (errors,) = bars
    error = [(high[1] - low[1]) / 2 for low, high in errors.get_segments()]
    return line.get_xdata().tolist(), line.get_ydata().tolist(), error


def test_variance_is_shown_with_its_standard_errors(rows):
    (axis,) = plotting.plot_variance(rows, prediction_type="epsilon").axes
    x, y, errors = curve(axis, "DSM")
    assert x == [0.01, 0.5, 1.0, 5.0]
    assert y == pytest.approx([row.dsm.value / row.sigma**2 for row in rows])
    assert errors == pytest.approx([row.dsm.standard_error / row.sigma**2 for row in rows])
    _, y, _ = curve(axis, "STF, n = 30")
    assert y == pytest.approx([row.stf[30].value / row.sigma**2 for row in rows])
    assert "noise" in axis.get_ylabel()


def test_phases_are_divided_by_their_largest_values(rows):
    (axis,) = plotting.plot_phases(rows).axes
    _, dsm, _ = curve(axis, "DSM")
    _, stf, _ = curve(axis, "STF, n = 4")
    _, divergence, _ = curve(axis, "D(t)")
    assert max(dsm) == max(divergence) == 1 and divergence[0] == 1
    scale = max(row.dsm.value / row.sigma**4 for row in rows)
    assert stf == pytest.approx([row.stf[4].value / row.sigma**4 / scale for row in rows])


def test_shares_leave_out_what_is_not_known(rows):
    figure = plotting.plot_remaining_share(rows, training_levels=EDM().sample_t(1000))
    above, below, behind = figure.axes
    x, y, _ = curve(above, "STF, n = 4")
    assert x == [0.5, 1.0, 5.0], "at 0.01 there is no variance"
    assert y == pytest.approx([row.stf_share[4].value for row in rows[1:]])
    (bars,) = below.containers
    assert bars[0].get_ydata().tolist() == pytest.approx([row.effective_sample_size.value for row in rows])
    assert sum(bar.get_height() for bar in behind.patches) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["plot_variance", "plot_phases", "plot_remaining_share"])
def test_figures_can_be_saved(rows, name, tmp_path):
    file = io.BytesIO()
    getattr(plotting, name)(rows).savefig(file, format="png")
    assert min(Image.open(file).size) > 300
    with pytest.raises(ValueError, match="two or more noise levels"):
        getattr(plotting, name)(rows[:1])
    with pytest.raises(ValueError, match="ascending"):
        getattr(plotting, name)(rows[::-1])


def test_no_variance_at_all_can_be_drawn():
    rows = target_variance(EDM(), torch.zeros(5, 1, 2, 2), [0.1, 1.0], reference_batch_sizes=(2,), num_samples=4)
    assert rows[0].dsm == Estimate(0.0, 0.0)
    for draw in (plotting.plot_variance, plotting.plot_phases, plotting.plot_remaining_share):
        draw(rows).savefig(io.BytesIO(), format="png")


def test_matplotlib_is_imported_where_it_is_used():
    script = "import sys, stf_diffusers.plotting; assert not any(name.startswith('matplotlib') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
