"""The demo command, and its page in a real browser."""

import asyncio
import gc
import os
import re
import socket
import subprocess
import sys
import warnings

import pytest
import torch
from support.browser import chromium, skip_without_browser
from support.command_lines import refused
from support.model_folders import scratch  # noqa: F401 - a fixture
from support.paths import ROOT

from gpt2_scratch.demo import main
from gpt2_scratch.generate import load
from gpt2_scratch.inspection import prompt_ids, sample_tokens

WAIT_SECONDS = 40


def refusal(capsys, *arguments):
    return refused(main, capsys, *arguments)


def test_missing_gradio_is_reported_with_the_command_that_installs_it(scratch, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = refusal(capsys, "--model", scratch)
    assert "the demo needs the package gradio: pip install -c constraints.txt -e '.[demo]'" in message


@pytest.mark.parametrize("port", [0, 70_000])
def test_impossible_port_is_refused(capsys, port):
    assert f"expected --port to be from 1 to 65535, found {port}" in refusal(capsys, "--model", "x", "--port", port)


def test_port_in_use_is_refused(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refusal(capsys, "--model", "x", "--port", port)
    assert f"cannot listen on 127.0.0.1, port {port} (Address already in use); choose another" in message


def test_host_of_another_machine_is_refused(capsys):
    assert "cannot listen on 192.0.2.1 (" in refusal(capsys, "--model", "x", "--host", "192.0.2.1")


@pytest.fixture
def gradio(monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    yield pytest.importorskip("gradio", reason="needs gradio: pip install -c constraints.txt -e '.[test-demo]'")
    # It opens event loops and never closes them: no later test gets their warnings.
    asyncio.set_event_loop(None)
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()


# gradio's own packages are deprecated, and its event loops stay open.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:unclosed:ResourceWarning")
class TestWithGradio:
    def test_missing_folder_is_refused(self, gradio, tmp_path, capsys):
        assert "there is no folder" in refusal(capsys, "--model", tmp_path / "nothing")

    def test_page_without_a_gpt2_is_refused(self, gradio, scratch, capsys, monkeypatch):
        model, tokenizer = load(str(scratch), "cpu")
        model.config.model_type = "llama"
        capsys.readouterr()  # the progress bar of loading
        monkeypatch.setattr("gpt2_scratch.demo.load", lambda *_: (model, tokenizer))
        assert "the demo shows GPT-2 language models" in refusal(capsys, "--model", scratch)

    def test_page_answers_without_a_browser(self, gradio, scratch):
        from gpt2_scratch.demo_page import build_page

        page = build_page(*load(str(scratch), "cpu"), "tiny")
        answers = {function.name: function.fn for function in page.fns.values()}
        texts = list(answers["complete"]("one two", 4, 0.8, 50, 1.0, 0))
        assert len(texts) == 5
        text, shown, *panels = answers["finish"](texts[-1][0], 1, 1)
        assert shown.count("data-index") == 11
        assert answers["select"](text, 2, 3, 5)[1:] != tuple(panels)
        with pytest.raises(gradio.Error, match="select a token"):
            answers["select"](text, 2, 3, 11)
        with pytest.raises(gradio.Error, match="shorten it"):
            next(answers["complete"]("a" * 40, 4, 0.8, 50, 1.0, 0))


@pytest.fixture(scope="module")
def url(scratch):
    """The page of a running demo command."""
    pytest.importorskip("gradio", reason="needs gradio: pip install -c constraints.txt -e '.[test-demo]'")
    skip_without_browser()
    command = [sys.executable, "-m", "gpt2_scratch.demo", "--model", str(scratch), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield re.search(r"http://127.0.0.1:\d+/", process.stdout.readline())[0]
        process.terminate()


@pytest.fixture(scope="module")
def browser(url, tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(browser, url):
    first = browser.current_window_handle
    page = Page(browser, url)
    yield page
    browser.close()
    browser.switch_to.window(first)


class Page:
    """A tab of the browser with the demo in it."""

    def __init__(self, browser, url):
        from selenium.webdriver.support.wait import WebDriverWait

        self.browser = browser
        browser.switch_to.new_window("tab")
        self.tab = browser.current_window_handle
        browser.get_log("browser")  # of earlier tests
        browser.get(url)
        self.wait = WebDriverWait(browser, WAIT_SECONDS, poll_frequency=0.05)
        self.wait.until(lambda _: self.all("#complete") and self.all("#prompt textarea"))

    def all(self, css):
        return self.browser.find_elements("css selector", css)

    def one(self, css):
        return self.wait.until(lambda _: self.all(css))[0]

    def text(self, css):
        return self.browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", css)

    def write(self, css, text):
        from selenium.webdriver.common.keys import Keys

        field = self.one(css)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE)
        field.send_keys(text, Keys.TAB)

    def switch(self):
        self.browser.switch_to.window(self.tab)

    def start(self, prompt, *, new_tokens=8, seed=0):
        self.write("#prompt textarea", prompt)
        self.write("#new-tokens input[type=number]", str(new_tokens))
        self.write("#seed input", str(seed))
        self.one("#complete").click()

    def finish(self):
        self.wait.until(lambda _: self.text("#text .g-legend") and self.text("#alternatives .g-facts"))

    def select(self, number):
        self.all("#text .g-token")[number].click()

    def open_tab(self, name):
        next(tab for tab in self.all("button[role=tab]") if tab.text == name).click()


def shown(model, tokenizer, prompt, **settings):
    """The tokens of a completion, as the page shows them."""
    from gpt2_scratch.demo_views import token_texts

    ids = prompt_ids(tokenizer, prompt, 32, 257)
    new = sample_tokens(model, ids, temperature=0.8, top_k=50, top_p=1.0, **settings)
    return token_texts(tokenizer, [*ids[0].tolist(), *new])


@pytest.fixture(scope="module")
def local(scratch):
    """The model and the tokenizer of the page."""
    return load(str(scratch), "cpu")


def test_completion_streams_and_is_that_of_its_seed(page, local):
    page.browser.execute_script("""
        window.lengths = [];
        new MutationObserver(() => window.lengths.push(document.querySelectorAll('#text .g-token').length))
          .observe(document.querySelector('#text'), {subtree: true, childList: true});
    """)
    page.start("one two", new_tokens=20, seed=4)
    page.finish()
    tokens = [token.get_property("textContent") for token in page.all("#text .g-token")]
    assert tokens == shown(*local, "one two", max_new_tokens=20, seed=4)
    lengths = page.browser.execute_script("return window.lengths")
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 5, "the text appeared at once"


def test_probabilities_are_the_models_and_sum_to_one_with_the_rest(page, local):
    model, tokenizer = local
    page.start("abc", new_tokens=5)
    page.finish()
    page.select(2)
    page.wait.until(lambda _: page.text("#alternatives .g-facts").startswith("c has probability"))
    with torch.no_grad():
        expected = model(torch.tensor([tokenizer("abc")["input_ids"]])).logits[0, 1].softmax(-1)
    table = page.text("#alternatives .g-bars")
    found = [float(value) / 100 for value in re.findall(r"([\d.]+)%", table)]
    assert found == pytest.approx(expected.topk(10).values.tolist(), abs=6e-5)
    others = expected.sort(descending=True).values[10:].sum()
    assert sum(found) + float(others) == pytest.approx(1, abs=1e-3)


def test_arrow_keys_move_the_selection(page):
    from selenium.webdriver.common.keys import Keys

    page.start("abcdef", new_tokens=2)
    page.finish()
    page.select(1)
    text = page.one("#text .g-text")
    text.send_keys(Keys.ARROW_RIGHT)
    page.wait.until(lambda _: page.text("#alternatives .g-facts").startswith("c has probability"))
    text.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    page.wait.until(lambda _: page.text("#alternatives .g-facts").startswith("d has probability"))
    assert page.text("#text .g-selected") == "d"


def test_attention_follows_layer_and_head(page, local):
    model, tokenizer = local
    page.start("abcdef", new_tokens=1)
    page.finish()
    page.select(4)
    page.open_tab("Attention")
    page.wait.until(lambda _: page.text("#attention .g-facts") == "Head 1: e attends to")
    page.all("#attention .g-head")[2].click()
    page.wait.until(lambda _: page.text("#attention .g-facts") == "Head 3: e attends to")
    page.one("#layer input").click()
    next(option for option in page.all("[role=option]") if option.text.strip("✓ \n") == "2").click()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.tensor([tokenizer("abcdef")["input_ids"]])
        row = model(ids, output_attentions=True).attentions[1][0, 2, 4, :5]
    strongest = f"{100 * float(row.max()):.2f}%"
    page.wait.until(lambda _: strongest in page.text("#attention .g-bars tr"))


def test_stop_keeps_the_text_so_far(page):
    page.start("a", new_tokens=31)
    page.wait.until(lambda _: len(page.all("#text .g-token")) > 2)
    page.one("#stop").click()
    page.finish()
    assert 2 < len(page.all("#text .g-token")) <= 32


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("a" * 40, {}, "shorten it"),
        ("a", {"seed": ""}, "Seed must be from 0 to 9,223,372,036,854,775,807; found nothing"),
    ],
)
def test_bad_input_gives_a_message(page, prompt, settings, message):
    page.start("ok", new_tokens=2)
    page.finish()
    page.start(prompt, **settings)
    toast = page.wait.until(lambda _: page.text(".toast-body"))
    assert message in toast
    assert "Traceback" not in page.text("body")
    assert page.text("#text .g-text").startswith("ok"), "the last text stays"
    assert page.one("#complete").is_enabled()


def test_two_pages_at_once_do_not_mix_their_text(browser, url, local):
    first, second = Page(browser, url), Page(browser, url)
    first.switch()
    first.start("first:", new_tokens=24, seed=1)
    second.switch()
    second.start("second:", new_tokens=24, seed=2)
    second.finish()
    second.select(2)
    first.switch()
    first.finish()
    first.select(3)
    for page, prompt, seed, index in ((first, "first:", 1, 3), (second, "second:", 2, 2)):
        page.switch()
        page.wait.until(lambda _, page=page, start=prompt[index]: page.text("#alternatives .g-facts").startswith(start))
        tokens = [token.get_property("textContent") for token in page.all("#text .g-token")]
        assert tokens == shown(*local, prompt, max_new_tokens=24, seed=seed)


def test_text_of_the_user_is_shown_as_it_is(page):
    prompt = "<b>${1+1}</b> {{value}}&lt;"
    page.start(prompt, new_tokens=1)
    page.finish()
    assert page.text("#text .g-text").startswith(prompt)


def test_page_has_no_errors_and_needs_no_other_host(page, url):
    page.start("abc", new_tokens=2)
    page.finish()
    assert [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    hosts = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin)"
    )
    assert set(hosts) <= {url.rstrip("/")}
    assert page.one("footer").text == "Settings"
