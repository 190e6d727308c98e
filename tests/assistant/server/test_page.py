"""The page in a real browser: a question is typed, its answer streams in as text, and the page's policy holds."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server: pip install 'moec[serve]'")
pytest.importorskip("uvicorn", reason="the server: pip install 'moec[serve]'")
aiohttp = pytest.importorskip("aiohttp", reason="speaks with the browser: pip install 'moec[eval]'")

from tests.assistant.server.running import running  # noqa: E402
from tests.assistant.speaking import Speaking  # noqa: E402

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


#: The page's script with the least of a browser around it: New is clicked while an answer comes, and a question asked.
SCRIPT = """
const fs = require("fs"), vm = require("vm");
const page = fs.readFileSync(process.argv[1], "utf-8");
const made = {}, listeners = {};
function element(id) {
  return made[id] ??= {value: "", hidden: false, textContent: "", append() {}, replaceChildren() {}, focus() {},
    scrollIntoView() {}, addEventListener: (kind, act) => { listeners[id + " " + kind] = act; }};
}
const replies = [];
function fetch(address, options) {
  if (address === "health") return Promise.resolve({json: async () => ({model: "small"})});
  return new Promise((resolve, reject) => {
    const gone = () => reject(Object.assign(new Error("gone"), {name: "AbortError"}));
    options.signal.addEventListener("abort", gone);
    replies.push({body: JSON.parse(options.body), say(text) {
      const usage = {choices: [], usage: {dropped_messages: 2, dropped_tokens: 0}};
      const events = [{choices: [{delta: {content: text}}]}, usage];
      const line = events.map(e => "data: " + JSON.stringify(e) + "\\n").join("");
      const parts = [{value: line, done: false}, {value: undefined, done: true}];
      const reader = {read: async () => parts.shift()};
      resolve({ok: true, body: {pipeThrough: () => ({getReader: () => reader})}});
    }});
  });
}
const document = {scrollingElement: {}, getElementById: element, createElement: () => element(Symbol())};
const context = vm.createContext({document, fetch, AbortController, TextDecoderStream: class {}, console});
vm.runInContext(/<script[^>]*>([^]*?)<\\/script>/.exec(page)[1], context);
const tick = () => new Promise(resolve => setTimeout(resolve, 5));
const ask = text => { element("text").value = text; listeners["form submit"]({preventDefault() {}}); };
(async () => {
  ask("old"); await tick();
  listeners["clear click"](); ask("new"); await tick();
  replies[1].say("New."); await tick();
  console.log(vm.runInContext("JSON.stringify([messages.map(m => m.content), running])", context), replies.length,
              JSON.stringify(replies[1].body.messages), element("send").hidden);
  console.log(Object.getOwnPropertySymbols(made).map(s => made[s].textContent).at(-1));
})();
"""


class Tab:
    """One page of the browser, over its debugging protocol. `complaints`: errors and warnings of console and policy."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._count = socket, 0
        self.complaints: list[str] = []

    async def call(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": parameters})
        while True:
            found = json.loads((await self._socket.receive(60)).data)
            mild = found.get("params", {}).get("entry", {}).get("level") in ("verbose", "info")
            if found.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown") and not mild:
                self.complaints.append(json.dumps(found["params"]))
            if found.get("id") == self._count:
                return found["result"]

    async def value(self, expression: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, wanted: Any) -> None:
        end = time.monotonic() + 60
        while (found := await self.value(expression)) != wanted:
            assert time.monotonic() < end, (expression, found, self.complaints)
            await asyncio.sleep(0.05)


async def talk(debugging: str, url: str) -> list[str]:
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{debugging}/json/new?{url}") as reply:
            address = (await reply.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(address, max_msg_size=0) as socket:
            tab = Tab(socket)
            await tab.call("Log.enable")
            await tab.call("Runtime.enable")
            await tab.until("document.getElementById('title')?.textContent", "small")

            async def ask(text: str) -> None:
                await tab.value(f"document.getElementById('text').value = {json.dumps(text)}")
                await tab.value("document.getElementById('form').requestSubmit()")

            said = "[...document.querySelectorAll('.assistant')].map(e => e.textContent)"
            await ask("Hi <b>there</b>")
            await tab.until(said, ["<img src=x onerror=alert(1)> & more"])
            assert await tab.value("document.querySelectorAll('#log img, #log b').length") == 0  # text, not markup
            await tab.until("document.getElementById('send').hidden", False)
            await ask("more")
            await tab.until(said, ["<img src=x onerror=alert(1)> & more", "Second."])
            await tab.until("document.getElementById('send').hidden", False)
            # in a low window: the answer is followed as it grows, above the form, unless the reader scrolled up
            await tab.call(
                "Emulation.setDeviceMetricsOverride", width=400, height=300, deviceScaleFactor=1, mobile=False
            )
            await ask("long")
            await tab.until(f"({said}).length", 3)
            await tab.until("[...document.querySelectorAll('.assistant')].at(-1).textContent.length > 100", True)
            assert await tab.value(
                "[...document.querySelectorAll('.assistant')].at(-1).getBoundingClientRect().bottom"
                " <= document.getElementById('form').getBoundingClientRect().top + 1"
            )
            assert await tab.value("page.scrollTop") > 0
            await tab.value("page.scrollTop = 0; said = document.querySelectorAll('.assistant')[2].textContent.length")
            await tab.until("document.querySelectorAll('.assistant')[2].textContent.length > said + 20", True)
            assert await tab.value("page.scrollTop") == 0
            await tab.value("document.getElementById('stop').click()")
            await tab.until("document.getElementById('send').hidden", False)
            await tab.value("document.getElementById('clear').click()")
            assert await tab.value(said) == []
            # New while an answer comes: nothing of it comes back
            await ask("another long one")
            await tab.until(f"({said}).length", 1)
            await tab.value("document.getElementById('clear').click()")
            await ask("new")
            await tab.until(said, ["New."])
            await tab.until("document.getElementById('send').hidden", False)
            assert await tab.value("messages.map(m => m.content)") == ["new", "New."]
            # the policy holds: a script that somebody adds does not run
            await tab.value(
                "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))"
            )
            assert await tab.value("window.ran") is None
            return tab.complaints


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script: install node")
def test_new_forgets_an_answer_that_still_comes_and_what_was_dropped_is_said() -> None:
    page = Path(__file__).parents[3] / "assistant" / "server" / "page.html"
    found = subprocess.run(["node", "-e", SCRIPT, str(page)], capture_output=True, text=True, timeout=60, check=True)
    asked = json.dumps([{"role": "user", "content": "new"}], separators=(",", ":"))
    log, dropped, _ = found.stdout.split("\n")
    assert log == f'[["new","New."],null] 2 {asked} false'
    assert dropped == "The context was full: the oldest 2 messages were dropped."


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: install chromium")
def test_a_conversation_in_a_browser(tmp_path: Path) -> None:
    slow = iter([0.0] * 60)
    session = Speaking(
        ["<img src=x onerror=alert(1)> & more", "Second.", "x" * 300, "y" * 300, "New."],
        slow=lambda: time.sleep(next(slow, 0.05)),
    )
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={tmp_path / 'b'}",
    ]
    with running(tmp_path, session) as at:
        browser = subprocess.Popen([str(BROWSER), *options], stderr=subprocess.PIPE, text=True)
        try:
            assert browser.stderr is not None
            line = next(line for line in browser.stderr if "DevTools listening on" in line)
            port = re.search(r"ws://127\.0\.0\.1:(\d+)/", line)
            assert port is not None
            complaints = asyncio.run(talk(f"http://127.0.0.1:{port[1]}", at.url + "/"))
        finally:
            browser.kill()
            browser.wait()
        at.idle(5)  # Stop ended the long answer
        # the added script is all that was complained about
        assert len(complaints) == 1, complaints
        assert "Content Security Policy" in complaints[0]
