"""The page in Chromium, from file:// and without a network: what it draws, sorts, finds, and how it looks.

Screenshots are kept in build/screenshots, or in the folder that WANDA_SCREENSHOTS names.
"""

import pytest

from tests.wanda_fast.report.browser import browser
from tests.wanda_fast.report.reports import NASTY, full
from wanda_fast.report.page import page

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS, SCHEMES = (400, 1600), ("light", "dark")
READ_COLUMN = """
const heads = [...document.querySelectorAll("#rows-table th button")].map((button) => button.textContent);
const at = heads.indexOf(arguments[0]);
return [...document.querySelectorAll("#rows-table tbody tr")].map((tr) => tr.children[at].textContent);
"""
CLICK_COLUMN = """
[...document.querySelectorAll("#rows-table th button")].find((b) => b.textContent === arguments[0]).click();
"""
SEARCH = """
const field = document.querySelector("#search");
field.value = arguments[0];
field.dispatchEvent(new Event("input"));
"""
CHOOSE = """
const [list, text] = arguments, select = document.querySelector(list);
select.value = [...select.options].find((option) => option.text === text).value;
select.dispatchEvent(new Event("change"));
"""
# The share of a chart's pixels that have the colour of its first series.
INK = """
return [...document.querySelectorAll("canvas")].map((canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  const pixels = copy.getImageData(0, 0, canvas.width, canvas.height).data;
  const own = getComputedStyle(document.documentElement).getPropertyValue("--s0").trim();
  const wanted = [1, 3, 5].map((at) => parseInt(own.slice(at, at + 2), 16));
  let found = 0;
  for (let at = 0; at < pixels.length; at += 4) found += wanted.every((part, i) => pixels[at + i] === part);
  return found / (pixels.length / 4);
});
"""


def errors_of(linears):
    """As the table shows them: a page holds five digits."""
    return [f"{float(format(linear['relative_error'], '.5g')):.5f}" for linear in linears]


def rounded(value):
    """A page holds five digits."""
    return float(f"{value:.5g}")


@pytest.fixture(scope="module")
def tab():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Content and file: of a full report, of several runs, of many weights, of hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    several = {f"run {at}": full(blocks=24, seed=at) for at in range(4)}
    for at, content in enumerate(several.values()):
        content["sparsity"] = 0.4 + 0.1 * at
        content["perplexity"] |= {"pruned": 15.0 * 2.5**at, "kl": 0.1 * 2**at}
        content["recipe"]["sparsity_ratio"] = content["sparsity"]
    nasty = full() | {"warnings": [NASTY]}
    nasty["linears"] = {f"{NASTY}.{name}": linear for name, linear in nasty["linears"].items()}
    contents = {"full": {"": full(blocks=30)}, "compare": several}
    contents |= {"many": {"": full(blocks=48, experts=384)}, "nasty": {NASTY: nasty, "b": full()}}
    made = {}
    for name, each in contents.items():
        file = folder / f"{name}.html"
        file.write_text(page(each), encoding="utf-8")
        made[name] = (list(each.values())[0], file)
    return made


@pytest.fixture
def opened(tab, pages):
    """Open a page in a window of 1600 pixels; returns the tab and the first report."""

    def open(name):
        tab.look(1600, "light")
        tab.open(pages[name][1])
        return tab, pages[name][0]

    yield open
    assert tab.logs() == []
    assert {url.partition(":")[0] for url in tab.requests()} == {"file"}


@pytest.mark.parametrize("name", ["full", "compare", "nasty"])
def test_it_is_drawn_at_every_width_and_in_both_schemes(name, opened):
    tab, _ = opened(name)
    backgrounds = {}
    for width in WIDTHS:
        for scheme in SCHEMES:
            tab.look(width, scheme)
            tab.next_frame()
            assert tab.js("return document.documentElement.scrollWidth") == width
            labels = "return [...document.querySelectorAll('#map b')].filter((b) => b.textContent).length"
            assert tab.js(labels) <= 1 + (16 if width == 400 else 32)
            ink = tab.js(INK)
            assert len(ink) >= 3 and min(ink) > 1e-4, (width, scheme, ink)
            backgrounds[scheme] = tab.js("return getComputedStyle(document.body).backgroundColor")
            tab.screenshot(f"{name}-{width}-{scheme}")
    light, dark = (sum(map(int, backgrounds[scheme][4:-1].split(","))) for scheme in SCHEMES)
    assert light > 3 * 200 and dark < 3 * 50


def test_the_table_is_sorted_by_any_column(opened):
    tab, content = opened("full")
    linears = content["linears"]
    assert tab.js(READ_COLUMN, "weight") == list(linears)
    by_error = sorted(linears, key=lambda name: linears[name]["relative_error"])
    for expected in (by_error[::-1], by_error):
        tab.js(CLICK_COLUMN, "relative error")
        assert tab.js(READ_COLUMN, "weight") == expected
    assert tab.js(READ_COLUMN, "relative error") == errors_of(map(linears.get, by_error))
    assert tab.js("return document.querySelector('th[aria-sort]').ariaSort") == "ascending"
    # Weights without tokens are last, in both directions.
    known = {n: x["tokens"] for n, x in linears.items() if x["tokens"] is not None}
    for direction in (-1, 1):
        tab.js(CLICK_COLUMN, "tokens")
        expected = sorted(known, key=lambda name: direction * known[name])
        assert tab.js(READ_COLUMN, "weight")[: len(known)] == expected
    tab.js(CLICK_COLUMN, "weight")
    # Numbers in names are compared as numbers: block 2 comes before block 10.
    blocks = [int(name.split(".")[2]) for name in tab.js(READ_COLUMN, "weight")]
    assert blocks == sorted(blocks) and max(blocks) == 29


def test_the_table_is_searched_by_words(opened):
    tab, content = opened("full")
    tab.js(SEARCH, "layers.1. EXPERTS")
    expected = [f"model.layers.1.mlp.experts.{at}.up_proj" for at in range(3)]
    assert tab.js(READ_COLUMN, "weight") == expected
    assert tab.js("return document.querySelector('#count').textContent") == "3 of 150 weights"
    tab.js(SEARCH, "magnitude")
    fallen = [name for name, linear in content["linears"].items() if linear["fallback"]]
    assert 0 < len(fallen) < 150 and tab.js(READ_COLUMN, "weight") == fallen
    tab.js(SEARCH, "no such weight")
    assert tab.js(READ_COLUMN, "weight") == []


def test_twenty_thousand_weights_are_shown_in_parts(opened):
    tab, content = opened("many")
    rows = "return document.querySelectorAll('#rows-table tbody tr').length"
    assert tab.js(rows) == 200
    tab.js("document.querySelector('#more').click()")
    assert tab.js(rows) == 1200
    tab.js(SEARCH, "layers.47.mlp.experts.383.")
    assert tab.js(READ_COLUMN, "weight") == ["model.layers.47.mlp.experts.383.up_proj"]
    tab.js(SEARCH, "")
    tab.js(CLICK_COLUMN, "error")
    first = max(content["linears"], key=lambda name: content["linears"][name]["error"])
    assert tab.js(READ_COLUMN, "weight")[0] == first
    tab.js(CHOOSE, "#rows", "mlp.experts.*.up_proj")
    assert tab.js("return document.querySelectorAll('#map i').length") == 48 * 384
    tab.screenshot("many-1600-light")


def test_the_heat_map_has_a_cell_for_each_block_and_kind(opened):
    tab, content = opened("full")
    cells = "return document.querySelectorAll('#map i').length"
    assert tab.js(cells) == 30 * 3  # two kinds, and the experts as one
    point = """
    const cell = document.querySelectorAll('#map i')[arguments[0]];
    cell.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
    return [document.querySelector('#readout').textContent, Number(cell.style.getPropertyValue('--v'))];
    """
    linears, experts = content["linears"], [f"model.layers.7.mlp.experts.{at}.up_proj" for at in range(3)]
    mean = sum(linears[name]["relative_error"] for name in experts) / 3
    said, _ = tab.js(point, 2 * 30 + 7)
    assert said == f"model.layers.7.mlp.experts.*.up_proj: relative error mean of 3 weights {mean:.5f}"
    tab.js("document.querySelectorAll('#map i')[arguments[0]].click()", 2 * 30 + 7)
    assert tab.js(READ_COLUMN, "weight") == experts
    tab.js(CHOOSE, "#rows", "mlp.experts.*.up_proj")
    tab.js(CHOOSE, "#measure", "tokens")
    of = [linear["tokens"] for name, linear in linears.items() if "experts" in name]
    name = "model.layers.7.mlp.experts.2.up_proj"
    said, shade = tab.js(point, 2 * 30 + 7)
    assert tab.js(cells) == 30 * 3 and said == f"{name}: tokens {linears[name]['tokens']:,}"
    assert shade == pytest.approx(100 * (linears[name]["tokens"] - min(of)) / (max(of) - min(of)))


def test_a_run_is_chosen_for_map_and_table(opened):
    tab, _ = opened("compare")
    other = full(blocks=24, seed=2)["linears"]
    tab.js(CHOOSE, "#heat select.run", "run 2")
    assert tab.js("return document.querySelector('#table select.run').selectedOptions[0].text") == "run 2"
    assert tab.js(READ_COLUMN, "relative error") == errors_of(other.values())


def test_charts_have_the_runs_figures(opened):
    tab, content = opened("full")
    shown = tab.js("return Chart.getChart(document.querySelector('#chart-tasks canvas')).data")
    assert shown["labels"] == ["arc_easy", "piqa"]
    assert [(line["label"], line["data"]) for line in shown["datasets"]] == [
        ("dense", [0.54, 0.68]),
        ("pruned", [0.41, 0.60]),
    ]
    tab, _ = opened("compare")
    axis = "return Chart.getChart(document.querySelector('#chart-pruned canvas')).scales.y.type"
    assert tab.js(axis) == "logarithmic"


def test_hostile_names_are_shown_as_they_are(opened):
    tab, content = opened("nasty")
    assert tab.js(READ_COLUMN, "weight") == list(content["linears"])
    assert tab.js("return document.querySelector('.warnings li').textContent") == NASTY
    injected = "return document.querySelectorAll('b[title=y], script').length"
    assert tab.js(injected) == 3


def test_the_page_itself_refuses_the_network(tab, pages):
    tab.open(pages["full"][1])
    refused = """
    const done = arguments[0];
    addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
    fetch("https://example.org/").catch(() => {});
    """
    assert tab.driver.execute_async_script(refused) == "connect-src"
    tab.logs(), tab.requests()
