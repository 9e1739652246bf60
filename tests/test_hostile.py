"""Whatever file or command line comes: no trace, no hang, no flood of memory, nothing half-written,
no code that runs, no special token."""

import ast
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mini import FILES, ROOT, SECONDS

from diffa2_mini.config import SIZES
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.tokenizer import SPECIAL_TOKENS

COMPUTING, BYTES = 10, 2 * 2**30  # the first in seconds, in which other work does not count


class Worker:
    """A process that runs cases; started anew when one has hung or ended it."""

    def __init__(self):
        script = str(ROOT / "tests" / "hostile_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script, str(COMPUTING)],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.lines = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()
        # a file, and a command of train.py: with all that is imported and made
        for number in (0, 11):
            self.run(number)

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def run(self, number: int) -> dict:
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=SECONDS)
        except queue.Empty:
            line = ""
        if line:
            return json.loads(line)
        self.process.kill()  # if it still runs
        code = self.process.wait()
        wrong = (f"more than {COMPUTING} s of computing" if code == -signal.SIGXCPU else
                 f"the process ended with {code}, or after {SECONDS} s")
        return {"number": number, "what": "", "ended": "broken", "wrong": wrong, "memory": 0}


def try_all(numbers: range) -> None:
    start, worker, results = time.monotonic(), Worker(), []
    for number in numbers:
        results.append(worker.run(number))
        if worker.process.poll() is not None:
            worker = Worker()
    worker.process.kill()
    wrong = [result for result in results if result["wrong"] or result["memory"] > BYTES]
    ended = [result["ended"] for result in results]
    most = max(result["memory"] for result in results) / 2**20
    print(f"{len(results)} cases, {ended.count('refused')} refused, {ended.count('read')} read, "
          f"{len(wrong)} wrong; most memory {most:.0f} MiB; {time.monotonic() - start:.0f} s")
    assert not wrong, "\n".join(
        f"case {result['number']} ({result['what']}): {result['wrong']} {result['memory']}"
        for result in wrong)
    assert ended.count("refused") > len(ended) / 2 and ended.count("read") > 0


def test_a_hundred_hostile_cases():
    try_all(range(100))


@pytest.mark.slow
def test_a_thousand_hostile_cases():
    try_all(range(100, 1000))


@pytest.mark.long
def test_thousands_of_hostile_cases():
    try_all(range(1000, 3000))


def calls(path: Path):
    """Names of the functions that a file calls, with the call."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str):
    return next((each.value.value
                 for each in call.keywords
                 if each.arg == name and isinstance(each.value, ast.Constant)), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path):
    for name, call in calls(path):
        assert name not in ("eval", "exec", "__import__", "compile", "os.system", "pickle.load",
                            "pickle.loads", "marshal.loads", "yaml.load"), name
        assert name != "torch.load" or keyword(call, "weights_only") is True
        assert name != "np.load" or not keyword(call, "allow_pickle")
        # Of what it unpacks it writes each file itself: not every Python has tarfile's filter.
        assert not name.endswith((".extract", ".extractall", ".unpack_archive")), name
        assert not any(each.arg == "shell" for each in call.keywords), name


@pytest.mark.parametrize(
    "text", [*SPECIAL_TOKENS, "<audio>", "a<|eot_id|><|mdm_mask|>b", " ".join(SPECIAL_TOKENS)])
def test_text_never_becomes_a_special_token(text):
    tokenizer = load_tokenizer(SIZES["toy"][0])
    special = {*tokenizer.special.values()}
    ids = tokenizer.encode(text)
    assert not special & {*ids} and tokenizer.spell(ids) == text
    plain, prompt = tokenizer.prompt("system", "question"), tokenizer.prompt(text, text)
    assert [i for i in prompt.ids if i in special] == [i for i in plain.ids if i in special]
    response = tokenizer.response(text, 16)
    assert not special & {*response[:len(ids)]} and response.count(tokenizer.eot_id) == 1
