"""The page that shows the inside of a GPT, in a browser: made-up numbers go in, what it draws is read."""

import base64
import json
import math
import shutil
import time
import zlib

import pytest
from conftest import REPO, run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: no browser to drive")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="there is no chromium with its chromedriver on the PATH"
)

# -- the data of a page, made up -----------------------------------------------------------------------------

HOSTILE = "</script><img src=x onerror=alert(1)>"
WORDS = ["The", " cat", " sat", "\n", " ", HOSTILE, "\t", "<|endoftext|>", "\ufffd", "a\n\nb", "&amp;"]
WORDS += ["PAGE_DATA", " on"]
TEMPERATURES = [round(0.1 * k, 1) for k in range(1, 21)]
AT_ONE = 9
LENGTH, PROMPT, LAYERS, HEADS = 40, 5, [1, 2, 3], 3


def attention_row(layer, head, i):
    """Weights of token i on tokens 0 to i, which sum to 1: each head likes another distance, none over 30."""
    far = max(0, i - 30)
    scores = [math.exp(-abs(i - j - head) * (1 + layer) / 4) for j in range(far, i + 1)]
    return [0] * far + [score / sum(scores) for score in scores]


def packed_attention(length):
    """The weights of all layers, heads and tokens, as the page takes them."""
    q = bytearray()
    for layer in range(len(LAYERS)):
        for head in range(HEADS):
            rows = [bytes(round(255 * w**0.5) for w in attention_row(layer, head, i)) for i in range(31)]
            for i in range(length):
                q += rows[i] if i <= 30 else bytes(i - 30) + rows[30]  # all further rows are this one, moved
    return base64.b64encode(zlib.compress(bytes(q))).decode()


def made_up(length):
    """The data of a page of so many tokens, always the same."""
    tokens = [WORDS[i * i % 7 if i > 12 else i] for i in range(length)]
    vocabulary = WORDS + [f"w{k}" for k in range(20)]
    bits, ranks, predictions = [None], [None], []
    for i in range(length):
        logits = {text: -0.3 * ((k + i) % len(vocabulary)) for k, text in enumerate(vocabulary)}
        top = sorted(logits.items(), key=lambda pair: -pair[1])
        norms = [math.log(sum(math.exp(logit / t) for logit in logits.values())) for t in TEMPERATURES]
        predictions.append({"top": top[:10], "norm": norms})
        if i + 1 < length:
            bits.append((norms[AT_ONE] - logits[tokens[i + 1]]) / math.log(2))
            ranks.append(1 + [text for text, _ in top].index(tokens[i + 1]))
    layers = []
    for n, name in enumerate(["embeddings", "block 1", "block 2", "block 3"]):
        top = [[[WORDS[(i + k) % 13], 0.6 / (k + n)] for k in range(1, 4)] for i in range(length)]
        layers.append({"name": name, "top": top})
    for i, entry in enumerate(predictions):  # the last layer is the prediction
        norm = entry["norm"][AT_ONE]
        layers[-1]["top"][i] = [[text, math.exp(logit - norm)] for text, logit in entry["top"][:3]]
    return {
        "source": f"out/{HOSTILE}/best.pt: step 900, best validation loss 1.1420",
        "prompt_tokens": min(PROMPT, length),
        "tokens": tokens,
        "bits": bits,
        "ranks": ranks,
        "predictions": predictions,
        "layers": layers,
        "attention": {"layers": LAYERS, "heads": HEADS, "weights": packed_attention(length)},
    }


DATA = made_up(LENGTH)
TOKENS, BITS, RANKS = DATA["tokens"], DATA["bits"], DATA["ranks"]


def packed(data):
    """The same as sample.py packs it: token IDs for texts, and logarithms of probabilities."""
    texts = {}  # {text: ID}

    def layer(tops):
        ids = [[texts.setdefault(text, len(texts)) for text, _ in top] for top in tops]
        return {"ids": ids, "logprobs": [[number for _, number in top] for top in tops]}

    at_one = [entry["norm"][AT_ONE] for entry in data["predictions"]]
    last = [
        [(text, logit - norm) for text, logit in entry["top"]]
        for entry, norm in zip(data["predictions"], at_one, strict=True)
    ]
    early = [[[(text, math.log(p)) for text, p in top] for top in one["top"]] for one in data["layers"]]
    return {
        "source": data["source"],
        "prompt_tokens": data["prompt_tokens"],
        "ids": [texts.setdefault(text, len(texts)) for text in data["tokens"]],
        "layers": [layer(top) for top in [*early[:-1], last]],
        "texts": {number: text for text, number in texts.items()},
        "logprobs": [-bits * math.log(2) for bits in data["bits"][1:]],
        "ranks": data["ranks"][1:],
        "scales": {
            t: [entry["norm"][k] - one / t for entry, one in zip(data["predictions"], at_one, strict=True)]
            for k, t in enumerate(TEMPERATURES)
        },
        "heads": data["attention"]["heads"],
        "attention": data["attention"]["weights"],
    }


def write_page(path, data):
    """As sample.py writes it; returns its address."""
    data = packed(data)
    template = (REPO / "assets" / "look.html").read_text(encoding="utf-8")
    assert template.count("PAGE_DATA") == 1
    path.write_text(template.replace("PAGE_DATA", json.dumps(data).replace("<", "\\u003c")), encoding="utf-8")
    return path.as_uri()


# -- what the page should say of it --------------------------------------------------------------------------


def shown(text):
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")


def percent(p):
    return "<0.01%" if 0 < p < 0.0001 else f"{100 * p:.{2 if p < 0.001 else 1}f}%"


def probability(i, text, k=AT_ONE):
    """That of a token after token i, at the k-th temperature."""
    entry = DATA["predictions"][i]
    return math.exp(dict(entry["top"])[text] / TEMPERATURES[k] - entry["norm"][k])


def top_bars(i, k=AT_ONE):
    """The bars of the ten likeliest tokens after token i."""
    came = TOKENS[i + 1] if i + 1 < LENGTH else None
    top = [text for text, _ in DATA["predictions"][i]["top"]]
    return [[shown(text), percent(probability(i, text, k)), "came" if text == came else ""] for text in top]


def contrast(one, other):
    """Of two colours, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# -- the browser ---------------------------------------------------------------------------------------------


class Browser:
    """Chromium without a window, and what the tests ask of it."""

    def __init__(self):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
        self.js = self.driver.execute_script

    def open(self, uri):
        for log in ("browser", "performance"):
            self.driver.get_log(log)  # forgets that of the page before
        self.driver.get(uri)
        WebDriverWait(self.driver, 10).until(lambda _: not self.all("#unpacking"))

    def screen(self, width=1280, height=1000, scheme="light"):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def find(self, css):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, css):
        return self.js("return document.querySelector(arguments[0]).textContent", css)

    def point(self, element):
        ActionChains(self.driver).move_to_element(element).perform()

    def press(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def choose(self, i):
        self.js("boxes[arguments[0]].focus()", i)

    def mode(self, mode):
        self.js("document.querySelector(`[name=mode][value=${arguments[0]}]`).click()", mode)

    def chosen(self):
        return self.js("return Number(document.querySelector('[aria-current]').dataset.i)")

    def bars(self, name):
        """[what it is, percent, whether it came] of each bar in a list."""
        return self.js(
            "return [...document.querySelectorAll(arguments[0] + ' li')].map((li) => [li.className,"
            "(li.querySelector('.chip') ?? li.children[0]).textContent, li.children[2].textContent])"
            ".map(([came, name, number]) => [name, number, came])",
            f"#{name}",
        )

    def levels(self):
        """How strongly each token is coloured."""
        return self.js("return boxes.map((box) => Number(box.style.getPropertyValue('--level')))")

    def pixels(self, css="#map", channel=3):
        """The opacity of all pixels of a canvas, row by row."""
        return self.js(
            "const shown = document.querySelector(arguments[0]); const n = shown.width;"
            "const copy = Object.assign(document.createElement('canvas'), { width: n, height: n });"
            "copy.getContext('2d').drawImage(shown, 0, 0);"
            "const { data } = copy.getContext('2d').getImageData(0, 0, n, n);"
            "const row = (i) => Array.from(data.slice(4 * i * n, 4 * (i + 1) * n));"
            "const rows = Array.from({ length: n }, (_, i) => row(i));"
            "return rows.map((row) => row.filter((_, at) => at % 4 === arguments[1]));",
            css,
            channel,
        )

    def colours(self, css):
        """Text and background of an element, [r, g, b] each, in whatever way its style writes them."""
        return self.js(
            "const style = getComputedStyle(document.querySelector(arguments[0]));"
            "return [style.color, style.backgroundColor].map((colour) => {"
            "const context = document.createElement('canvas').getContext('2d');"
            "context.fillStyle = colour; context.fillRect(0, 0, 1, 1);"
            "return Array.from(context.getImageData(0, 0, 1, 1).data.slice(0, 3)); })",
            css,
        )


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("look") / "look.html", DATA)


@pytest.fixture
def page(browser, uri):
    """A fresh page on a wide, light screen; the test ends with no complaint and no request."""
    browser.screen()
    browser.open(uri)
    yield browser
    assert browser.driver.get_log("browser") == []
    assert browser.js("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [uri]


# -- the tests -----------------------------------------------------------------------------------------------


def test_every_token_is_a_box_and_stays_text(page):
    """Hostile tokens too: they are shown, and nothing of them runs or becomes part of the page."""
    assert page.js("return boxes.map((box) => box.textContent)") == [shown(text) for text in TOKENS]
    assert page.js("return document.querySelector('.text').querySelectorAll('.token').length") == LENGTH
    assert len(page.all("img, script")) == 2  # the data and the program
    assert HOSTILE in page.text("#source")
    assert "40 tokens: 5 were given, 35 the model wrote" in page.text("#source")
    assert len(page.all(".token.given")) == PROMPT
    assert len(page.all(".text br")) == "".join(TOKENS).count("\n")
    first = "return document.querySelector('.start').nextElementSibling.querySelector('.token').dataset.i"
    assert page.js(first) == str(PROMPT)
    assert page.levels() == pytest.approx([min(1, (bits or 0) / 8) for bits in BITS], abs=0.001)


@pytest.mark.parametrize("how", ["under the mouse", "with the focus"])
def test_a_token_tells_its_probability_and_the_alternatives(page, how):
    assert RANKS[2] <= 10 < RANKS[8]  # of the two below, one is not among the ten
    for i in (2, 8):
        page.point(page.all(".token")[i]) if how == "under the mouse" else page.choose(i)
        known = f"probability {percent(2 ** -BITS[i])}, rank {RANKS[i]}, {BITS[i]:.1f} bits"
        known += ", given" if i < PROMPT else ""
        assert page.text("#readout") == f"{shown(TOKENS[i])} {known}"
        assert page.all(".token")[i].get_attribute("aria-label").endswith(known)
        rest = [[shown(TOKENS[i]), percent(2 ** -BITS[i]), "came"]] if RANKS[i] > 10 else []
        assert page.bars("before") == top_bars(i - 1) + rest


def test_the_mouse_looks_and_the_focus_chooses(page):
    page.choose(8)
    assert page.text("#live").startswith(
        f"Chosen: token 9 of 40, \ufffd, probability {percent(2 ** -BITS[8])}"
    )
    page.point(page.all(".token")[2])
    assert page.chosen() == 8 and page.text("#readout").startswith(shown(TOKENS[2]))
    page.point(page.find("h1"))
    assert page.text("#readout").startswith(shown(TOKENS[8]))
    page.choose(0)
    assert page.bars("before") == [] and "first token" in page.text("#readout")


def test_the_temperature_redraws_what_could_come_next(page):
    page.choose(7)
    slider = page.find("#temperature")
    assert slider.get_attribute("max") == "19"
    for keys, k in (("", AT_ONE), (Keys.ARROW_LEFT * 5, 4), (Keys.END, 19), (Keys.HOME, 0)):
        slider.send_keys(keys)
        assert page.text("#degrees") == f"{TEMPERATURES[k]:.1f}" == slider.get_attribute("aria-valuetext")
        others = 1 - sum(probability(7, text, k) for text, _ in DATA["predictions"][7]["top"])
        assert page.bars("after") == [*top_bars(7, k), ["all others", percent(max(0, others)), ""]]
    assert page.bars("before")[:10] == top_bars(6)  # what it had expected stays at 1


def test_where_it_looks(page):
    """Layer and head, or the mean of heads, show in the text's colours, the bars and the matrix."""
    i = 20
    page.choose(i)
    seen = []
    for layer, head in ((1, 0), (1, 2), (1, None), (0, 2), (0, None)):
        Select(page.find("#layer")).select_by_visible_text(f"block {LAYERS[layer]}")
        page.js("document.querySelectorAll('.head')[arguments[0]].click()", 0 if head is None else head + 1)
        heads = range(HEADS) if head is None else [head]
        rows = [attention_row(layer, h, i) for h in heads]
        weights = [sum(column) / len(heads) for column in zip(*rows, strict=True)]
        assert sum(weights) == pytest.approx(1)
        shades = [(w / max(weights)) ** 0.5 for w in weights]
        levels, pixels = page.levels(), page.pixels()
        assert page.text("#legend").startswith("not looked at")
        assert levels == pytest.approx(shades + [0] * (LENGTH - i - 1), abs=0.01)
        assert pixels[i][: i + 1] == pytest.approx([255 * shade for shade in shades], abs=3)
        assert not any(pixels[r][c] for r in range(LENGTH) for c in range(r + 1, LENGTH))  # none looks ahead
        back = weights[::-1].index(max(weights))
        place = f"{back} back" if back else "itself"
        assert page.text("#looks li .name") == f"{shown(TOKENS[i - back])} {place}"
        assert float(page.bars("looks")[0][1][:-1]) == pytest.approx(100 * max(weights), abs=0.5)
        seen.append((levels, pixels))
    assert all(seen[a] != seen[b] for a in range(5) for b in range(a))
    thumbnails = [page.pixels(f".head:nth-of-type({k + 1}) canvas") for k in range(HEADS + 1)]
    assert thumbnails[0] == seen[4][1] and thumbnails[3] == seen[3][1]
    page.mode("surprise")
    assert page.levels()[i] == pytest.approx(min(1, BITS[i] / 8), abs=0.001)


@pytest.mark.parametrize("row", [3, 30])
def test_the_matrix_marks_and_chooses_a_row(page, row):
    page.js("document.getElementById('map').scrollIntoView({ block: 'center' })")
    place = "const { x, y, width } = document.getElementById(arguments[0]).getBoundingClientRect();"
    place += "return [x, y, width]"
    left, top, width = page.js(place, "map")
    cell = width / LENGTH
    from_middle = int(2.5 * cell - width / 2), int((row + 0.5) * cell - width / 2)
    ActionChains(page.driver).move_to_element_with_offset(page.find("#map"), *from_middle).click().perform()
    assert page.chosen() == row and page.text("#legend").startswith("not looked at")
    assert page.js(place, "map") == pytest.approx([left, top, width], abs=1)  # it stays under the mouse
    assert page.js(place, "row") == pytest.approx([left, top + row * cell, (row + 1) * cell], abs=1)
    on_token_2 = (
        sum(attention_row(len(LAYERS) - 1, head, row)[2] for head in range(HEADS)) / HEADS
    )  # the mean of heads
    start, said = page.text("#cell").split(": ")
    assert start == f"Token {row + 1}, {shown(TOKENS[row])}, looks at {shown(TOKENS[2])}, {row - 2} back"
    assert float(said.strip("<%")) == pytest.approx(100 * on_token_2, abs=0.5)


def test_what_each_layer_would_say(page):
    for i in (4, LENGTH - 1):
        page.choose(i)
        rows = page.js(
            "return [...document.querySelectorAll('#layers tr')]"
            ".map((row) => [...row.children].map((cell) => cell.textContent))"
        )
        expected = [
            [layer["name"], *(f"{shown(text)} {percent(p)}" for text, p in layer["top"][i])]
            for layer in DATA["layers"]
        ]
        assert rows == expected
    assert "the text ends" in page.text("#layers-caption") and "the text ends" in page.text("#next")


def test_arrow_keys_move_and_tab_stops_once(page):
    page.choose(0)
    focused = "return document.activeElement.dataset.i ?? document.activeElement.id"
    left, right = Keys.ARROW_LEFT, Keys.ARROW_RIGHT
    for keys, i in ((left, 0), (right * 3, 3), (left, 2), (Keys.END, LENGTH - 1), (right, LENGTH - 1)):
        page.press(*keys)
        assert page.chosen() == i and page.js(focused) == str(i)
        assert page.js("return boxes.filter((box) => box.tabIndex === 0).map((box) => box.dataset.i)") == [
            str(i)
        ]
    page.press(Keys.HOME, Keys.ARROW_DOWN)
    top, height = page.js(
        "const [a, b] = [0, chosen.token].map((i) => boxes[i].getBoundingClientRect());"
        "return [b.top - a.top, a.height]"
    )
    assert 0.5 * height < top < 2 * height  # one line below
    page.press(Keys.ARROW_UP)
    assert page.js("return boxes[chosen.token].offsetTop === boxes[0].offsetTop")
    page.press(Keys.TAB)
    assert page.js(focused) == "temperature"  # the next control, not the next token
    assert page.js(
        "return [...document.querySelectorAll('input, select')].every((c) => c.labels.length === 1)"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(page, scheme):
    """It has a contrast of at least 4.5 to 1, even on the strongest colours."""
    page.screen(scheme=scheme)
    paper = page.colours("body")[1]
    assert (sum(paper) < 150) == (scheme == "dark")
    for css in (".lead", ".small", "#readout", "footer", ".start"):
        assert contrast(page.colours(css)[0], paper) >= 4.5, css
    page.choose(LENGTH - 1)
    for mode in ("surprise", "attention"):
        page.mode(mode)
        for css in (".token", "td"):
            page.js("document.querySelector(arguments[0]).style.setProperty('--level', 1)", css)
            assert contrast(*page.colours(css)) >= 4.5, (css, mode)
    page.choose(0)
    ink, card = page.colours(".token.future")  # half transparent
    opacity = float(page.find(".token.future").value_of_css_property("opacity"))
    assert contrast([opacity * a + (1 - opacity) * b for a, b in zip(ink, card, strict=True)], card) >= 4.5
    blue = [*page.colours("#map")[0], 255]
    assert (sum(blue[:3]) > 380) == (scheme == "dark")

    def painted(_):  # anew when the scheme has changed, of which the page hears a moment later
        return [page.pixels("#map", channel)[0][0] for channel in range(4)] == pytest.approx(blue, abs=2)

    WebDriverWait(page.driver, 5).until(painted)


def test_on_a_phone(page):
    """Nothing is wider than the screen, and the text stays in sight while one reads on."""
    page.screen(360, 740)
    for i in (6, 9, LENGTH - 1):  # after the first, the hostile one came, which is long
        page.choose(i)
        assert page.js("return document.documentElement.scrollWidth") <= 360
        assert page.js("return document.getElementById('text').scrollWidth") < 360  # its boxes break
    page.js("document.getElementById('layers').scrollIntoView()")
    page.js("document.getElementById('text').scrollTop = 0")
    bottom = page.js("return document.getElementById('readout').getBoundingClientRect().bottom")
    assert 0 < bottom < 0.6 * 740
    page.all(".token")[1].click()
    assert page.chosen() == 1


def test_a_thousand_tokens_are_fast(browser, tmp_path):
    uri = write_page(tmp_path / "long.html", made_up(1024))
    browser.screen()
    start = time.perf_counter()
    browser.open(uri)
    assert time.perf_counter() - start < 3
    assert browser.js("return [boxes.length, document.getElementById('map').width]") == [1024, 1024]
    milliseconds = browser.js(
        "chooseMode('attention'); const start = performance.now();"
        "for (let i = 1000; i < 1010; i++) { chooseToken(i); document.body.getBoundingClientRect(); }"
        "return (performance.now() - start) / 10"
    )
    assert milliseconds < 150
    assert browser.driver.get_log("browser") == []


@pytest.mark.parametrize(
    "what, said",
    [
        ("no blocks", "No block of this model looks"),
        ("broken weights", "cannot unpack the weights: 5 weights instead of 324"),
        ("one token", "it looks most at"),
    ],
)
def test_data_at_the_borders(browser, tmp_path, what, said):
    data = made_up(1 if what == "one token" else 8)
    if what == "no blocks":
        data["layers"], data["attention"]["weights"] = data["layers"][:1], ""
    if what == "broken weights":
        data["attention"]["weights"] = base64.b64encode(zlib.compress(b"short")).decode()
    browser.screen()
    browser.driver.get_log("browser")
    browser.driver.get(write_page(tmp_path / "page.html", data))
    WebDriverWait(browser.driver, 5).until(lambda _: said in browser.text("#attention"))
    assert len(browser.all(".token")) == len(data["tokens"]) and browser.bars("after")
    assert browser.driver.get_log("browser") == []


def test_of_two_tokens_with_one_text_the_rank_tells_which_came(browser, tmp_path):
    """Tokens that are parts of a letter are all shown as the same sign."""
    data = made_up(8)
    data["tokens"][4], data["ranks"][4] = "\ufffd", 3
    data["predictions"][3]["top"] = [["\ufffd", 0], ["a", -1], ["\ufffd", -2], ["\ufffd", -3]]
    browser.open(write_page(tmp_path / "page.html", data))
    browser.choose(4)
    assert [came for _, _, came in browser.bars("before")] == ["", "", "came", ""]


def test_a_page_of_a_trained_model(browser, trained, workdir):
    """The whole way: sample.py writes it of a run, and the browser shows its text."""
    done = run(
        "sample.py",
        "--out_dir=out/trained",
        "--start=The for statement",
        "--max_new_tokens=40",
        "--device=cpu",
        "--page=look.html",
        cwd=workdir,
    )
    assert "look.html" in done.stderr and (workdir / "look.html").stat().st_size < 200_000
    browser.screen()
    browser.open((workdir / "look.html").as_uri())
    written = ("The for statement" + done.stdout[:-1])[-32:]  # the context of this model
    assert "".join(box.text for box in browser.all(".token")) == shown(written)
    assert browser.driver.get_log("browser") == []
