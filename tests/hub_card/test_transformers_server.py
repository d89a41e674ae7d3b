"""`serve`: transformers' server over HTTP, on the loopback address, with the exported small checkpoint and its code."""

import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer

from kimi_linear.hub_card.cli import main
from kimi_linear.hub_card.exporter import SMALL_CHECKPOINT, ExportRequest, export
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

pytestmark = pytest.mark.processes

QUESTION = [{"role": "user", "content": "Explain the with statement."}]
NEVER_STOP = {"1261": -100.0, "1262": -100.0}  # a bias against the tokens that end an answer


class Server:
    """A running server and requests to it."""

    def __init__(self, process: subprocess.Popen, port: int, folder: str) -> None:
        self.process, self.port, self.folder = process, port, folder

    def open(self, method: str, path: str, body: dict | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def chat(self, **options) -> http.client.HTTPResponse:
        body = {"model": self.folder, "messages": QUESTION, "max_tokens": 24, **options}
        return self.open("POST", "/v1/chat/completions", body)

    def answer(self, **options) -> dict:
        response = self.chat(**options)
        assert response.status == 200, response.read()
        return json.loads(response.read())

    def wait(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.open("GET", "/health").status == 200:
                    return
            except OSError:
                time.sleep(0.1)
        self.process.kill()
        raise AssertionError(f"the server did not come up:\n{self.process.communicate()[0][-3000:]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("serving") / "kimi-small"
    export(ExportRequest(out=out))
    return out


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kimi_linear.hub_card", "serve", str(folder), *options],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    running = Server(process, port, str(folder))
    try:
        running.wait()
        yield running
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def expected():
    """The greedy answer to QUESTION, and the number of tokens of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(SMALL_CHECKPOINT)
    model = KimiLinearForCausalLM.from_pretrained(SMALL_CHECKPOINT, dtype="auto").eval()
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]
    generated = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, prompt:]
    assert model.dtype == torch.bfloat16
    return tokenizer.decode(generated, skip_special_tokens=True), prompt


def pieces(response: http.client.HTTPResponse) -> list[dict]:
    """The events of a stream."""
    lines = response.read().decode().splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_a_chat_request_is_answered_with_what_generate_writes(server, expected):
    text, prompt = expected
    answer = server.answer()
    (choice,) = answer["choices"]
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", text)
    assert choice["finish_reason"] == "length"
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (prompt, 24)


def test_a_streamed_answer_is_the_same_in_pieces(server, expected):
    response = server.chat(stream=True)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    choices = [event["choices"][0] for event in pieces(response)]
    texts = [choice["delta"].get("content") or "" for choice in choices]
    assert "".join(texts) == expected[0]
    assert sum(map(bool, texts)) > 10
    assert choices[0]["delta"]["role"] == "assistant"
    assert choices[-1]["finish_reason"] == "length"


def test_a_client_that_goes_away_frees_the_model(server, expected):
    """The abandoned answer would take many minutes, and requests are answered one after another."""
    assert server.answer(max_tokens=100, logit_bias=NEVER_STOP)["usage"]["completion_tokens"] == 100
    for _ in range(2):
        response = server.chat(stream=True, max_tokens=200_000, logit_bias=NEVER_STOP)
        assert b"content" in response.read(2000)
        response.close()
    start = time.monotonic()
    assert server.answer()["choices"][0]["message"]["content"] == expected[0]
    assert time.monotonic() - start < 20


def test_wrong_requests_are_refused_and_the_next_is_answered(server, expected):
    assert server.chat(no_such_option=1).status == 422
    assert server.open("POST", "/v1/nothing", {}).status == 404
    assert server.answer()["choices"][0]["message"]["content"] == expected[0]


CALL = {"id": "functions.clock:0", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


def test_the_second_turn_of_a_tool_is_answered(server):
    asked = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": CALL["id"], "content": "noon"},
    ]
    tool = {"type": "function", "function": {"name": "clock", "description": "time", "parameters": {"type": "object"}}}
    assert server.answer(messages=asked, tools=[tool])["choices"][0]["message"]["content"]


def test_what_the_template_refuses_is_a_400_that_says_why(server):
    for messages in (
        [{**QUESTION[0], "tool_calls": [CALL]}],
        [{"role": "assistant", "content": "", "tool_calls": [{}]}],
    ):
        response = server.chat(messages=messages)
        assert response.status == 400
        assert "the messages cannot be made a prompt: " in json.loads(response.read())["error"]["message"]


def test_two_clients_at_once_get_the_same_answer(server, expected):
    first, second = server.chat(stream=True), server.chat(stream=True)
    for response in (second, first):
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in pieces(response))
        assert text == expected[0]


def test_the_code_of_the_folder_serves_until_interrupted(server, folder):
    server.process.send_signal(signal.SIGINT)
    output, _ = server.process.communicate(timeout=20)
    assert f"serving {folder} with transformers_modules." in output
    assert ".modeling_kimi_linear.KimiLinearForCausalLM" in output


def test_what_cannot_be_served_is_refused_in_one_line(folder, monkeypatch, capsys):
    assert main(["serve", str(SMALL_CHECKPOINT)]) == 1
    assert "no code of its own (no auto_map in config.json): export it first" in capsys.readouterr().err
    assert main(["serve", str(folder), "--continuous-batching"]) == 1
    assert "--continuous-batching keeps keys and values in pages" in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert main(["serve", str(folder)]) == 1
    assert "serving needs uvicorn: pip install 'kimi-linear[serving]'" in capsys.readouterr().err
