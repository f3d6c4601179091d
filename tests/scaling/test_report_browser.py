"""The page in a real browser: it renders, no error on the console, hover, focus, tap and links work, it fits a phone.

Needs chromium or chrome on PATH; nothing is installed for it.
"""

import json
import re
import shutil
import subprocess
import urllib.parse

import pytest

from recscale.scaling import report
from tests.scaling import reported_study

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is on PATH")
PHONE, DESKTOP = (390, 844), (1280, 900)

# Runs inside the page, injected by the test alone: plays a reader and writes what came of it into the document.
READER = """
<script>
window.problems = [];
window.onerror = (message) => window.problems.push(String(message));
window.addEventListener("unhandledrejection", (event) => window.problems.push(String(event.reason)));
</script>
"""
PLAY = """
<script>
window.addEventListener("load", async () => {
  const seen = {};
  const tip = document.getElementById("tip");
  const panels = [...document.querySelectorAll("svg.points")];
  const points = [...panels[0].querySelectorAll("a")];
  const send = (target, type, more) =>
    target.dispatchEvent(new PointerEvent(type, { bubbles: true, cancelable: true, ...more }));
  const wait = () => new Promise((done) => setTimeout(done, 50));
  const at = (element) => element.getBoundingClientRect();
  seen.panels = panels.length;
  seen.hidden_at_first = tip.hidden;

  points[2].scrollIntoView({ block: "center" });
  send(points[2].querySelector(".hit"), "pointerover", { pointerType: "mouse" });
  seen.hover = tip.hidden ? "" : tip.innerText;
  seen.inside = at(tip).left >= 0 && at(tip).right <= window.innerWidth && at(tip).top >= 0;
  seen.clear_of_point = at(tip).bottom <= at(points[2]).top + 8 || at(tip).top >= at(points[2]).bottom - 8;
  send(document.body, "pointerover", { pointerType: "mouse" });
  seen.hidden_after = tip.hidden;

  const across = (anchor) => Number(anchor.querySelector(".hit").getAttribute("cx"));
  const ordered = [...points].sort((a, b) => across(a) - across(b));
  panels[0].focus();
  const key = (name) =>
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
  key("ArrowRight");
  seen.first_key = document.activeElement === ordered[0] && !tip.hidden;
  key("ArrowRight");
  seen.second_key = document.activeElement === ordered[1];
  key("End");
  seen.last_key = document.activeElement === ordered[ordered.length - 1];
  key("Escape");
  seen.escaped = tip.hidden;

  const touch = points[3];
  send(touch, "pointerdown", { pointerType: "touch" });
  seen.first_tap_stays = !send(touch, "click", { pointerType: "touch" }) && !tip.hidden;
  seen.tip_link = tip.querySelector("a") ? tip.querySelector("a").getAttribute("href") : "";
  seen.second_tap_goes = send(touch, "click", { pointerType: "touch" });
  await wait();
  seen.after_tap = location.hash;

  send(points[4], "pointerdown", { pointerType: "mouse" });
  points[4].dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true }));
  await wait();
  seen.hash = location.hash;
  seen.wanted = points[4].getAttribute("href");
  const row = document.querySelector(":target");
  seen.row = row ? row.innerText : "";
  seen.row_marked = row ? getComputedStyle(row.cells[0]).backgroundColor : "";

  document.querySelectorAll("details").forEach((part) => { part.open = true; });
  seen.page_width = document.documentElement.scrollWidth;
  seen.window_width = window.innerWidth;
  const visible = [...document.querySelectorAll("figure.panel > svg")].filter((svg) => at(svg).width > 0);
  seen.narrowest = Math.min(...visible.map((svg) => at(svg).width));
  seen.widest = Math.max(...visible.map((svg) => at(svg).width));
  seen.wide_tables = [...document.querySelectorAll("table")].filter((table) =>
    at(table).width > window.innerWidth && !table.closest(".scroll")).length;
  seen.cut_texts = visible.filter((svg) => [...svg.querySelectorAll("text")].some((text) =>
    at(text).left < at(svg).left - 2 || at(text).right > at(svg).right + 2)).length;
  seen.problems = window.problems;
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = JSON.stringify(seen);
  document.body.append(told);
  if (window.parent !== window) window.parent.postMessage(JSON.stringify(seen), "*");
});
</script>
"""
FRAME = """<body style="margin:0"><iframe style="width:{width}px;height:{height}px;border:0" src="{source}"></iframe>
<script>window.addEventListener("message", (event) => {{
  const told = document.createElement("pre");
  told.id = "told"; told.textContent = event.data; document.body.append(told);
}});</script></body>"""


def browse(url, folder, *options):
    """(stdout, console lines) of one visit."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-extensions"]
    command += ["--no-first-run", "--disable-background-networking", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def played(html, folder, size):
    """What the reader saw in a window of this size, and the console. A frame, because a window has a least width."""
    page = html.replace("<head>", "<head>" + READER).replace("</body>", PLAY + "</body>")
    inner, path = folder / f"played-{size[0]}.html", folder / f"frame-{size[0]}.html"
    inner.write_text(page)
    path.write_text(FRAME.format(width=size[0], height=size[1], source=inner.as_uri()))
    dom, console = browse(path.as_uri(), folder, "--dump-dom", f"--window-size={size[0]},{size[1]}")
    found = re.findall(r'<pre id="told">(.*?)</pre>', dom, re.S)
    assert found, f"the page never told what it saw; console: {console}"
    told = found[-1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(told), console


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report of a study whose fit is quick."""
    folder = tmp_path_factory.mktemp("browser")
    study = reported_study.write(folder / "made_up", plan=reported_study.PLAN.replace("[pow_floor, log]", "[log]"))
    report.write(study, out=folder, draws=200)
    return folder


@pytest.fixture(scope="module", params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def seen(request, folder):
    told, console = played((folder / "report.html").read_text(), folder, request.param)
    return told, console, request.param


def test_nothing_on_the_console(seen):
    told, console, _ = seen
    assert told["problems"] == [] and console == []


def test_hover_shows_the_run_beside_its_point(seen):
    told, _, _ = seen
    assert told["hidden_at_first"] and told["hidden_after"]
    assert told["inside"] and told["clear_of_point"]
    assert re.search(r"grid-\d+-s(\d)\n.*nats/event\nencoder [\d.]+k? parameters\nseed \1, fitted", told["hover"])


def test_arrow_keys_walk_the_points(seen):
    told, _, _ = seen
    assert told["first_key"] and told["second_key"] and told["last_key"] and told["escaped"]


def test_taps_show_first_and_go_second(seen):
    told, _, _ = seen
    assert told["first_tap_stays"] and told["second_tap_goes"]
    assert told["tip_link"] == told["after_tap"] != ""


def test_a_click_leads_to_the_record(seen):
    told, _, _ = seen
    assert told["hash"] == told["wanted"] != told["after_tap"]
    assert "grid-" in told["row"] and told["row_marked"] == "rgb(255, 243, 196)"


def test_the_page_fits_the_window(seen):
    told, _, (width, _) = seen
    assert told["window_width"] == width and told["page_width"] <= width, "nothing scrolls sideways but tables in a box"
    assert told["wide_tables"] == 0 and told["cut_texts"] == 0
    assert 280 <= told["narrowest"] <= told["widest"] <= 500, "panels are neither cramped nor blown up"


def test_it_opens_from_disk_as_it_is(folder):
    path = folder / "report.html"
    dom, console = browse("file://" + urllib.parse.quote(str(path)), folder, "--dump-dom", "--window-size=1280,900")
    assert console == [] and dom.count("<svg") == path.read_text().count("<svg")
    picture = folder / "page.png"
    browse(path.as_uri(), folder, f"--screenshot={picture}", "--window-size=1280,900")
    assert picture.stat().st_size > 20_000, "a blank page makes a small picture"


def test_the_reader_finds_broken_pages(folder):
    """The checks above see a broken page: an error is told, and a wide block scrolls."""
    html = (folder / "report.html").read_text()
    broken = html.replace("<body>", '<body><div style="width:3000px">wide</div><script>missing();</script>', 1)
    told, console = played(broken, folder, PHONE)
    assert any("missing" in problem for problem in told["problems"]) and console
    assert told["page_width"] > PHONE[0]
