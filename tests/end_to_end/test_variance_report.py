"""`examples/variance_report.py`: a page that stands alone, with the numbers that were computed."""

import base64
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import variance_report as script
from stf_diffusers import EDM, VP, FlowMatching, target_variance
from stf_diffusers.noise_distribution import LogNormal, distribution_from_config
from stf_diffusers.training.data_set import load_digits_dataset

pytest.importorskip("matplotlib")

FEW = ["--num_levels", "5", "--num_samples", "8", "--quiet"]
VOID = {"meta", "link", "img", "br"}
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Tags in order, attributes, and the cells of tables; fails where a tag is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br" and "td" in self.open:
            self.rows[-1][-1] += " "
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "digits"
    script.main(
        ["--output_dir", str(folder), "--max_images", "300", "--reference_batch_sizes", "4", "64", "4096", *FEW]
    )
    return folder


def test_the_page_stands_alone(digits):
    text = (digits / "index.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}] and page.all("title") and page.all("main")
    assert {"charset": "utf-8"} in page.all("meta")
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert not page.all("script") and not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import|https?://", text)
    assert len(page.all("h1")) == 1 and len(page.all("figure")) == len(page.all("figcaption")) == 4
    embedded = []
    for picture in page.all("img"):
        assert len(picture["alt"]) > 20
        kind, content = picture["src"].split(",")
        assert kind == "data:image/png;base64"
        embedded.append(base64.b64decode(content))
    assert all(content.startswith(PNG) for content in embedded)
    assert sorted(embedded) == sorted(path.read_bytes() for path in digits.glob("*.png")) and len(embedded) == 4
    names = {path.name for path in digits.iterdir()}
    assert names == {
        "index.html",
        "variance.json",
        "variance.png",
        "phases.png",
        "remaining.png",
        "noise_levels.png",
        "noise_distribution.json",
        "noise_distribution_variance.json",
    }, "nothing aside is left"


def test_the_table_has_the_numbers_that_are_computed(digits):
    dataset = load_digits_dataset()
    chosen = np.sort(np.random.default_rng(0).choice(len(dataset), 300, replace=False))
    pixels = torch.stack([torch.from_numpy(np.array(dataset[int(row)]["image"]))[None] for row in chosen])
    levels = torch.logspace(-1, math.log10(80), 5, dtype=torch.float64)
    rows = target_variance(
        EDM(), pixels, levels, reference_batch_sizes=(4, 64), num_samples=8, generator=torch.Generator().manual_seed(0)
    )
    head, *body = Page((digits / "index.html").read_text()).rows
    assert head == ["noise level", "t", "effective sources", "D(t)", "V_DSM", "V_STF, n = 4", "V_STF, n = 64"]
    stored = json.loads((digits / "variance.json").read_text())["rows"]
    assert len(body) == len(rows) == len(stored) == 5
    for cells, row, numbers in zip(body, rows, stored, strict=True):
        assert float(cells[0]) == pytest.approx(row.noise_level, rel=1e-3)
        found = [row.effective_sample_size, row.divergence, row.dsm, row.stf[4], row.stf[64]]
        for cell, estimate in zip(cells[2:], found, strict=True):
            value, error = map(float, cell.split(" ± "))
            assert value == pytest.approx(estimate.value, rel=1e-3, abs=1e-9)
            assert error == pytest.approx(estimate.standard_error, rel=0.06, abs=1e-9)
        assert numbers["dsm"] == pytest.approx(list(row.dsm), abs=1e-15)
        assert numbers["stf"]["64"] == pytest.approx(list(row.stf[64]), abs=1e-15)


HALF = torch.tensor(0.5, dtype=torch.float64)


def test_noise_levels_are_recommended(digits):
    """Half of EDM's own, half where the entropy rate of the page's own table is."""
    levels = distribution_from_config(json.loads((digits / "noise_distribution.json").read_text()))
    rows = json.loads((digits / "variance.json").read_text())["rows"]
    logs = np.log([row["sigma"] for row in rows])
    rates = [row["dsm"][0] / row["sigma"] ** 2 for row in rows]
    edges = np.log(levels.levels)
    middles = (edges[1:] + edges[:-1]) / 2
    ahead = np.interp(middles, logs, rates, left=0, right=0)
    own = np.diff(LogNormal(-1.2, 1.2).cdf(torch.from_numpy(edges)).numpy())
    np.testing.assert_allclose(levels.weights, own / 2 + ahead / ahead.sum() / 2, atol=5 * math.sqrt(0.06 / 100_000))
    by_variance = distribution_from_config(json.loads((digits / "noise_distribution_variance.json").read_text()))
    assert by_variance.levels == levels.levels and by_variance.quantile(HALF) > levels.quantile(HALF)
    assert "--noise_distribution noise_distribution.json" in (digits / "index.html").read_text()


def test_the_advice_follows_its_rule(digits):
    advice = json.loads((digits / "variance.json").read_text())["advice"]
    rows = json.loads((digits / "variance.json").read_text())["rows"]
    drawn = EDM().sample_t(100_000, generator=torch.Generator().manual_seed(0)).double()
    logs = np.log([row["sigma"] for row in rows])
    # Karras et al.: F = (x0 - ...) / c_out.
    weight = np.array([1 / (row["sigma"] * 0.5) ** 2 * (row["sigma"] ** 2 + 0.25) for row in rows])
    parts = {
        n: np.interp(drawn.log(), logs, weight * [row["stf"][n][0] for row in rows]).mean() for n in rows[0]["stf"]
    }
    total = np.interp(drawn.log(), logs, weight * [row["dsm"][0] for row in rows]).mean()
    for n, share in advice["removed"].items():
        assert share == pytest.approx(1 - parts[n] / total, rel=1e-6)
    enough = [int(n) for n, share in advice["removed"].items() if share >= 0.9]
    assert advice["n"] == (min(enough) if enough else None)
    inside = ((drawn >= advice["low"] * 0.999999) & (drawn <= advice["high"] * 1.000001)).double().mean().item()
    assert advice["coverage"] == pytest.approx(inside) and 0 < inside < 1
    text = Page((digits / "index.html").read_text()).text
    assert f"{100 * inside:.1f} %" in text and f"from {advice['low']:.3g} to {advice['high']:.3g}" in text
    assert (f"n = {advice['n']:,}" if enough else "all references") in text


@pytest.mark.parametrize("name, process", [("vp", VP()), ("flow", FlowMatching())])
def test_other_processes_have_the_same_noise_levels(name, process, image_folder, tmp_path):
    flags = ["--train_data_dir", str(image_folder), "--noise_process", name, "--class_conditional"]
    script.main([*flags, "--output_dir", str(tmp_path / "a"), "--reference_batch_sizes", "4", *FEW])
    rows = json.loads((tmp_path / "a" / "variance.json").read_text())["rows"]
    levels = np.array([row["sigma"] / row["alpha"] for row in rows])
    assert levels == pytest.approx(np.logspace(-1, np.log10(80), 5), rel=1e-9)
    assert "within classes" in Page((tmp_path / "a" / "index.html").read_text()).text
    # Two classes of 12 images: no posterior has more.
    assert rows[-1]["effective_sample_size"][0] == pytest.approx(12, abs=0.1)


def test_names_are_escaped(image_folder, tmp_path):
    folder = tmp_path / "<b>&data"
    folder.symlink_to(image_folder, target_is_directory=True)
    script.main(
        ["--train_data_dir", str(folder), "--output_dir", str(tmp_path / "a"), "--reference_batch_sizes", "4", *FEW]
    )
    text = (tmp_path / "a" / "index.html").read_text()
    assert "<b>" not in text and "<b>&data" in Page(text).text


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--noise_process", "vp", "--p_mean", "0"], "--p_mean is not a parameter of --noise_process vp"),
        (["--p_std", "0"], "--p_std must be positive"),
        (["--noise_process", "vp", "--max_noise_level", "1000"], "--max_noise_level 1000 is beyond"),
        (["--reference_batch_sizes", "5000"], "--reference_batch_sizes: there are"),
        (["--train_data_dir", "nowhere"], "--train_data_dir nowhere cannot be read"),
        (["--image_column", "picture"], "--image_column picture: the data set has the columns"),
    ],
)
def test_wrong_flags_are_named_and_nothing_is_written(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        script.main(["--output_dir", str(tmp_path / "a"), *FEW, *flags])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_samples", "1"], "--num_samples must be at least 2"),
        (["--num_levels", "1"], "--num_levels must be at least 2"),
        (["--max_images", "1"], "--max_images must be at least 2"),
        (["--reference_batch_sizes", "0"], "--reference_batch_sizes must be at least 1"),
        (["--min_noise_level", "9", "--max_noise_level", "3"], "below --max_noise_level"),
        (["--dataset_name", "a", "--train_data_dir", "b"], "exclude each other"),
    ],
)
def test_flags_out_of_range_are_refused(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--output_dir", str(tmp_path / "a"), *flags])
    assert message in capsys.readouterr().err
