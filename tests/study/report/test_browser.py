"""The page in a real browser, from disk and offline: no errors on its console, tables that sort, live figures."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from studies import without_plotly, write_study
from test_residuals import made

from lab import report
from lab.study import results

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
PROBE = """<script>
const heading = [...document.querySelectorAll(".sortable th")].find(each => each.textContent === "%s");
const seen = [];
const enter = new KeyboardEvent("keydown", {key: "Enter"});
for (const press of [() => heading.click(), () => heading.dispatchEvent(enter)]) {
  press();
  const rows = [...heading.closest("table").tBodies[0].rows];
  seen.push([heading.getAttribute("aria-sort"), rows.map(row => row.cells[heading.cellIndex].textContent)]);
}
document.body.dataset.seen = JSON.stringify(seen);
</script></body>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium here: looked for {', '.join(NAMES)}"),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    directory = tmp_path_factory.mktemp("study")
    generator = np.random.default_rng(0)
    settings = {
        "baseline": (("rope_ratio", 0.0),),
        "contrasts": (("c", (("rope_ratio", 1.0),), (("rope_ratio", 0.5),)),),
    }
    write_study(directory, counts=(1, 16), seeds=4, study=settings, noise=lambda *_: generator.normal(0, 0.01))
    report.rebuild(directory)
    return directory


def browse(path, profile):
    """The page's final HTML, and what it wrote on the console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += ["--virtual-time-budget=5000", "--window-size=1400,2400"]
    flags += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=180, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def sorted_by(study, tmp_path, heading):
    """How a column reads after a click on its heading, and after Enter."""
    page = tmp_path / "probed.html"
    page.write_text((study / "report.html").read_text().replace("</body>", PROBE % heading))
    text, console = browse(page, tmp_path / "profile")
    assert not console
    return json.loads(re.search(r'data-seen="(.*?)"', text)[1].replace("&quot;", '"'))


def test_page_opens_from_disk_without_errors(study, tmp_path):
    text, console = browse(study / "report.html", tmp_path / "profile")
    assert not console and 'tabindex="0"' in text  # the script ran
    assert 'id="verdicts"' in text and text.count('class="live drawn"') == 6


def test_errors_of_a_page_would_show(study, tmp_path):
    broken = tmp_path / "broken.html"
    text = without_plotly((study / "report.html").read_text())
    broken.write_text(text.replace('"use strict";', "undefinedFunction();"))
    text, console = browse(broken, tmp_path / "profile")
    assert any("undefinedFunction" in line for line in console) and 'tabindex="0">rope_ratio' not in text


def test_numbers_sort_as_numbers_with_dashes_last(study, tmp_path):
    (up, rising), (down, falling) = sorted_by(study, tmp_path, "difference")
    assert (up, down) == ("ascending", "descending")
    numbers = [float(text) for text in rising if text != "—"]
    assert numbers == sorted(numbers) and len(numbers) == 8 and rising[8:] == falling[8:] == ["—", "—"]
    assert falling[:8] == rising[:8][::-1] and numbers[0] < 0 < numbers[-1]


def test_sizes_sort_by_what_their_prefixes_say(tmp_path):
    directory = made(tmp_path / "study")
    report.rebuild(directory)
    (_, rising), (_, falling) = sorted_by(directory, tmp_path, "training FLOPs")
    assert [text.split(" (")[0] for text in rising] == ["988 G"] * 2 + ["1.24 T"] * 2 + ["1.98 T"] * 2
    assert falling == rising[::-1]


def test_words_sort_by_the_alphabet(study, tmp_path):
    (_, rising), (_, falling) = sorted_by(study, tmp_path, "verdict")
    assert rising == sorted(rising) and falling == rising[::-1] and len(set(rising)) > 1


LOOKED_INTO = """<script>
addEventListener("load", async () => {
  const wait = () => new Promise(done => setTimeout(done, 600));
  const figure = document.querySelector('img[src][alt^="Training loss"]').closest("figure");
  const box = figure.querySelector(".js-plotly-plot"), seen = {wide: document.documentElement.scrollWidth};
  Plotly.Fx.hover(box, [{curveNumber: 1, pointNumber: 3}]);
  await wait();
  seen.told = box.querySelector(".hoverlayer").textContent;
  box.querySelector(".legendtoggle").dispatchEvent(new MouseEvent("mousedown", {bubbles: true}));
  box.querySelector(".legendtoggle").dispatchEvent(new MouseEvent("mouseup", {bubbles: true}));
  await wait();
  seen.switched = box.data.map(line => line.visible ?? true);
  const button = figure.querySelector(".scale"), range = [...box.layout.yaxis.range];
  seen.scales = [box.layout.yaxis.type ?? "linear"];
  for (const press of [1, 2]) { button.click(); await wait(); seen.scales.push(box.layout.yaxis.type); }
  seen.back = JSON.stringify(box.layout.yaxis.range) === JSON.stringify(range);
  document.body.dataset.seen = JSON.stringify(seen);
});
</script></body>"""


def test_a_line_has_values_under_the_pointer_and_can_be_switched_off(study, tmp_path):
    path = tmp_path / "probed.html"
    path.write_text((study / "report.html").read_text().replace("</body>", LOOKED_INTO))
    text, console = browse(path, tmp_path / "profile")
    assert not console
    seen = json.loads(re.search(r'data-seen="(.*?)"', text)[1].replace("&quot;", '"'))
    told = re.match(r"0, step (\d+): (\d\.\d{4})", seen["told"])
    lines = [line for line in results.collect(study).runs[0].metrics if line["step"] == int(told[1])]
    assert lines and abs(float(told[2]) - lines[0]["loss"]) < 1
    assert seen["switched"].count("legendonly") == 2 and True in seen["switched"]  # a line and what is behind it
    assert seen["scales"][1:] == ["log", "linear"] and seen["back"]


@pytest.mark.parametrize("width", [420, 1300])
def test_only_tables_scroll_sideways(study, tmp_path, width):
    """Figures fit a narrow window, and no page is wider than its window."""
    probe = """<script>addEventListener("load", () => setTimeout(() => parent.postMessage(JSON.stringify([
      innerWidth, document.documentElement.scrollWidth,
      ...[...document.querySelectorAll(".js-plotly-plot .main-svg")].map(one => one.getBoundingClientRect().right)
    ]), "*"), 500));</script></body>"""
    (tmp_path / "inner.html").write_text((study / "report.html").read_text().replace("</body>", probe))
    path = tmp_path / "outer.html"  # a window has a least width, a frame has none
    listen = 'addEventListener("message", event => { document.body.dataset.seen = event.data; });'
    path.write_text(f'<body><script>{listen}</script><iframe src="inner.html" width="{width}" height="900"></iframe>')
    text, console = browse(path, tmp_path / "profile")
    seen, scrolled, *rights = json.loads(re.search(r'data-seen="(.*?)"', text)[1])
    assert not console and len(rights) > 6 and max(scrolled, *rights) <= seen <= width
