"""The judge against a local server that is slow, fails, answers garbage and closes connections."""

import asyncio
import base64
import io
import json
import logging
import pickle
import random
import re
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from diffusers_mixgrpo.rewards import remote
from diffusers_mixgrpo.rewards.vlm_judge import QUESTION, VLMJudge, parse_score


KEY = "sk-verySecret-0123456789"


class ChatServer(ThreadingHTTPServer):
    """Handles each request with the next entry of `script`, and with the last entry after that."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.script = [say("Score: 8")]
        self.requests = []
        self.lock = threading.Lock()
        self.over = threading.Event()  # set at the end of the test, for handlers that never answer in time
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that give up are expected in some tests


class ChatHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        self.sent = {"path": self.path, "headers": dict(self.headers), "body": json.loads(content)}
        with server.lock:
            act = server.script[min(len(server.requests), len(server.script) - 1)]
            server.requests.append(self.sent | {"time": time.monotonic()})
        act(self)

    def reply(self, status, content, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def chat(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]})


def say(text):
    return lambda handler: handler.reply(200, chat(text).encode())


def reply(status, content=b"", **headers):
    return lambda handler: handler.reply(status, content, **headers)


def question(request):
    return request["body"]["messages"][0]["content"][1]["text"]


def close_at_once(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def close_midway(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.wfile.flush()
    close_at_once(handler)


def never_answer(handler):
    handler.server.over.wait(60)
    close_at_once(handler)


def drip(handler):
    """Data keeps arriving, but the answer never ends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b" ")


def not_http(handler):
    handler.wfile.write(b"\x00\xff what is HTTP?\r\n\r\n")
    close_at_once(handler)


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def judge(server):
    return lambda **options: VLMJudge(server.url, "some-vlm", **({"backoff": 0.01, "timeout": 60.0} | options))


def make_image(seed=0, size=(12, 9)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def score(judge, prompts=("a cat",), images=None, **columns):
    images = [make_image(i) for i in range(len(prompts))] if images is None else images
    return asyncio.run(judge(prompts=list(prompts), images=images, **columns))


# Requests


def sent_image(request):
    url = request["body"]["messages"][0]["content"][0]["image_url"]["url"]
    kind, _, data = url.partition(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_the_request(server, judge):
    assert score(judge(), ["a red cat"], [make_image(3)], answer=["ignored"]) == [8.0]
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert "Authorization" not in request["headers"]
    body = request["body"]
    assert body.keys() == {"model", "messages", "temperature", "max_tokens"}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some-vlm", 0, 512)
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]
    assert "a red cat" in question(request) and question(request).endswith("Score: N")
    kind, image = sent_image(request)
    assert kind == "data:image/png" and image.format == "PNG"
    assert np.array_equal(np.asarray(image), np.asarray(make_image(3)))


def test_options_of_the_request(server, judge):
    template = 'Is it {prompt}? {"answer": ...}'
    extra = {"seed": 3, "chat_template_kwargs": {"enable_thinking": False}}
    reward = judge(question=template, extra_body=extra, temperature=None, max_tokens=None, image_format="JPEG")
    assert score(reward, ["a {prompt} {x}"]) == [8.0]
    body = server.requests[0]["body"]
    assert body.keys() == {"model", "messages", "seed", "chat_template_kwargs"} and body["seed"] == 3
    assert question(server.requests[0]) == 'Is it a {prompt} {x}? {"answer": ...}'
    kind, image = sent_image(server.requests[0])
    assert kind == "data:image/jpeg" and image.format == "JPEG" and image.size == (12, 9)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1", "I;16"])
def test_images_of_all_modes(mode):
    image = Image.new("I;16", (12, 9)) if mode == "I;16" else make_image().convert(mode)
    image = Image.open(io.BytesIO(base64.b64decode(remote.encode_image(image))))
    assert image.mode == "RGB" and image.size == (12, 9)


def test_no_images_no_requests(server, judge):
    assert score(judge(), []) == [] and server.requests == []


def test_each_image_gets_its_own_score(server, judge):
    def act(handler):
        number = int(re.search(r"image number (\d)", question(handler.sent))[1])
        time.sleep(0.01 * (9 - number))
        say("no idea" if number == 4 else f"It is fine. Score: {number}")(handler)

    server.script = [act]
    prompts = [f"image number {number}" for number in (3, 1, 4, 9, 5, 2)]
    assert score(judge(), prompts) == [3, 1, None, 9, 5, 2]


# Behavior of the server


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_tries_again(server, judge, status):
    server.script = [reply(status, b"busy"), reply(status, b"busy"), say("Score: 3")]
    reward = judge()
    assert score(reward) == [3.0] and len(server.requests) == 3
    assert reward.last_error is None


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 422])
def test_does_not_try_again(server, judge, status):
    server.script = [reply(status, b'{"error": "so it is"}', Location="/v1/elsewhere"), say("Score: 3")]
    reward = judge()
    assert score(reward) == [None] and len(server.requests) == 1
    assert re.search(f"HTTP {status}: .*so it is.*/v1/chat/completions", str(reward.last_error))


def test_gives_up(server, judge):
    server.script = [reply(503, b"still loading")]
    reward = judge(max_retries=2)
    assert score(reward) == [None] and len(server.requests) == 3
    assert re.search(r"HTTP 503: still loading \(.*, tried 3 times\)", str(reward.last_error))
    server.script = [say("Score: 3")]
    assert score(reward) == [3.0]


def test_waits_longer_each_time(server, judge):
    server.script = [reply(500), reply(500), reply(500), say("Score: 3")]
    assert score(judge(backoff=0.1)) == [3.0]
    times = [request["time"] for request in server.requests]
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    # The pauses are doubled each time and reduced at random by at most a half. Load can only lengthen the gaps.
    assert gaps[0] >= 0.05 and gaps[1] >= 0.1 and gaps[2] >= 0.2


def test_retry_after_seconds(server, judge):
    server.script = [reply(429, Retry_After="0.4"), say("Score: 3")]
    assert score(judge(backoff=0.001)) == [3.0]
    assert server.requests[1]["time"] - server.requests[0]["time"] >= 0.4


def test_retry_after_a_date(server, judge):
    def until_soon(handler):
        handler.reply(503, b"", Retry_After=format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True))

    server.script = [until_soon, say("Score: 3")]
    assert score(judge(backoff=0.001)) == [3.0]
    assert server.requests[1]["time"] - server.requests[0]["time"] >= 0.9  # dates have no fractions of a second


@pytest.mark.parametrize("value", ["3600", "inf", "nan", "-5", "tomorrow", "Xyz, 99 Abc 2020 GMT", ""])
def test_retry_after_has_a_limit(server, judge, value, monkeypatch):
    monkeypatch.setattr(remote, "MAX_WAIT", 0.05)
    server.script = [reply(429, Retry_After=value), say("Score: 3")]
    start = time.monotonic()
    assert score(judge()) == [3.0]
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("act", [never_answer, drip], ids=["late", "in drops"])
def test_timeout_is_for_the_whole_request(server, judge, act):
    server.script = [act]
    reward = judge(timeout=0.2, max_retries=1)
    assert score(reward) == [None]
    assert re.search(r"no answer within timeout=0\.2 seconds \(.*, tried 2 times\)", str(reward.last_error))


def test_a_late_answer_costs_one_image(server, judge):
    """The short timeout begins only when the other images have their answers, so a slow machine cannot reach it."""
    answered = threading.Semaphore(0)

    def act(handler):
        if "slow" not in question(handler.sent):
            say("Score: 8")(handler)
            answered.release()
        elif reward.timeout == 60:
            assert answered.acquire(timeout=60) and answered.acquire(timeout=60)
            reward.timeout = 0.2
            close_at_once(handler)
        else:
            never_answer(handler)

    server.script = [act]
    reward = judge(timeout=60, max_retries=1)
    assert score(reward, ["slow", "quick", "quick"]) == [None, 8.0, 8.0]
    assert "no answer within timeout=0.2 seconds" in str(reward.last_error)


@pytest.mark.parametrize("act", [close_at_once, close_midway, not_http])
def test_closed_connections(server, judge, act):
    server.script = [act, say("Score: 3")]
    assert score(judge()) == [3.0] and len(server.requests) == 2
    server.script = [act]
    reward = judge(max_retries=1)
    assert score(reward) == [None] and len(server.requests) == 4
    assert "tried 2 times" in str(reward.last_error)


def test_no_server(judge):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but not listening
        reward = VLMJudge(f"http://127.0.0.1:{unused.getsockname()[1]}/v1", max_retries=1, backoff=0.01)
        assert score(reward) == [None]
    assert re.search("ConnectError: .*tried 2 times", str(reward.last_error))


GARBAGE = {
    "nothing": b"",
    "a page": b"<html>Welcome to nginx</html>",
    "bytes": bytes(range(256)),
    "too deep": b"[" * 100_000,
    "a list": b"[1, 2]",
    "no choices": b'{"choices": []}',
    "no message": b'{"choices": [{"text": "Score: 8"}]}',
    "a choice that is null": b'{"choices": [null]}',
    "no text": chat(None).encode(),
    "a number for a text": chat(8).encode(),
    "another text": chat("What a nice image!").encode(),
    "out of the scale": chat("Score: 11").encode(),
    "an empty text": chat("").encode(),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage(server, judge, content, caplog):
    def act(handler):
        handler.reply(200, content if "bad" in question(handler.sent) else chat("Score: 7").encode())

    server.script = [act]
    reward = judge()
    assert score(reward, ["good", "bad", "good"]) == [7.0, None, 7.0]
    assert len(server.requests) == 3  # no retries, because the answer would be the same
    assert isinstance(reward.last_error, remote.RemoteRewardError)
    assert len(str(reward.last_error)) < 500


def test_says_when_an_answer_was_cut_off(server, judge):
    answer = json.loads(chat("I see a cat and"))
    answer["choices"][0]["finish_reason"] = "length"
    server.script = [reply(200, json.dumps(answer).encode())]
    reward = judge(max_tokens=5)
    assert score(reward) == [None]
    assert "'I see a cat and', cut off at max_tokens=5" in str(reward.last_error)


@pytest.mark.parametrize("calls", [1, 2])
def test_the_number_of_concurrent_requests_is_limited(server, judge, calls):
    barrier = threading.Barrier(3, timeout=60)
    active = []
    counts = []

    def act(handler):
        with server.lock:
            active.append(handler)
            counts.append(len(active))
        barrier.wait()  # passes when three requests are active at the same time
        time.sleep(0.02)  # time for a fourth one to arrive, if there were one
        with server.lock:
            active.remove(handler)
        say("Score: 8")(handler)

    server.script = [act]
    reward = judge(max_concurrency=3, max_retries=0)

    async def call():
        count = 12 // calls
        parts = await asyncio.gather(*(reward(["a cat"] * count, [make_image()] * count) for _ in range(calls)))
        return [score for part in parts for score in part]

    assert asyncio.run(call()) == [8.0] * 12
    assert max(counts) == 3


# The judge as a reward


def test_one_object_on_several_event_loops(server, judge):
    reward = judge(max_concurrency=1)
    assert score(reward, ["a cat"] * 3) == score(reward, ["a cat"] * 3) == [8.0] * 3
    copy = pickle.loads(pickle.dumps(reward))
    assert score(copy, ["a cat"]) == [8.0] and copy.__name__ == "vlm_judge"

    async def both():
        return await asyncio.gather(reward(["a cat"], [make_image()]), copy(["a dog"], [make_image()]))

    assert asyncio.run(both()) == [[8.0], [8.0]]


def test_own_parser(server, judge):
    server.script = [say("Yes, it is")]
    assert score(judge(parse=lambda text: float("Yes" in text))) == [1.0]
    reward = judge(parse=lambda text: float(text))
    assert score(reward) == [None]
    assert "ValueError: could not convert string to float: 'Yes, it is'" in str(reward.last_error)
    for answer in (float("nan"), "8", True):
        assert score(judge(parse=lambda text, answer=answer: answer)) == [None]


def test_images_that_cannot_be_read(server, judge, caplog):
    buffer = io.BytesIO()
    make_image(size=(200, 200)).save(buffer, "PNG")
    broken = Image.open(io.BytesIO(buffer.getvalue()[:2000]))
    reward = judge()
    assert score(reward, ["a", "b", "c"], [broken, make_image(), None]) == [None, 8.0, None]
    assert len(server.requests) == 1
    assert re.search("image [02] cannot be read", str(reward.last_error))


def test_one_warning_for_a_call(server, judge, caplog):
    reward = judge(max_retries=0)
    score(reward, ["a cat"] * 3)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    server.script = [reply(418, b"a teapot")]
    score(reward, ["a cat"] * 3)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith(
        "vlm_judge could not score 3 of 3 images. The last error: HTTP 418: a teapot"
    )


def test_the_random_state_of_the_training_is_unchanged(server, judge):
    server.script = [reply(500), reply(500), say("Score: 8")]
    random.seed(0)
    np.random.seed(0)
    state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    assert score(judge()) == [8.0]
    assert random.getstate() == state and np.random.get_state()[1].tolist() == numpy_state


# The API key


def everything_of(error):
    """All that a debugger shows of an exception."""
    seen = []
    while error is not None:
        frames, traceback = [], error.__traceback__
        while traceback is not None:
            frames.append(repr(traceback.tb_frame.f_locals))
            traceback = traceback.tb_next
        seen.append(f"{error!r} {vars(error)!r} {frames}")
        error = error.__cause__ or error.__context__
    return " ".join(seen)


@pytest.mark.parametrize("kind", ["answered", "echoed", "closed", "late"])
def test_the_key_is_sent_and_nowhere_else(server, judge, monkeypatch, caplog, kind):
    def echo(handler):
        image_url = handler.sent["body"]["messages"][0]["content"][0]["image_url"]["url"]
        padding = "no. " * 45  # puts the key where the text is cut off
        handler.reply(401, f"{padding} {handler.sent['headers']['Authorization']} of {image_url}".encode())

    def close_and_hurry(handler):  # a short timeout from the start might end before the request has arrived
        reward.timeout = 0.2
        close_at_once(handler)

    scripts = {
        "answered": [say("Score: 8")],
        "echoed": [echo],
        "closed": [close_midway],
        "late": [close_and_hurry, never_answer],
    }
    server.script = scripts[kind]
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    reward = judge(api_key_env="JUDGE_KEY", max_retries=1)
    with caplog.at_level(logging.DEBUG):
        assert score(reward) == [8.0 if kind == "answered" else None]
    assert server.requests[-1]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert (reward.last_error is None) == (kind == "answered")
    assert ("no answer within" in str(reward.last_error)) == (kind == "late")
    places = [caplog.text, repr(reward), repr(vars(reward)), everything_of(reward.last_error)]
    places.append(pickle.dumps(reward).decode("latin-1"))
    for place in places:
        assert KEY[:8] not in place
        assert not re.search(r"[A-Za-z0-9+/]{80}", place)  # no images either


def test_the_key_is_read_at_each_call(server, judge, monkeypatch):
    reward = judge()
    score(reward)
    monkeypatch.setenv("OPENAI_API_KEY", "first")
    score(reward)
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    score(reward)
    score(judge(api_key_env=None))
    sent = [request["headers"].get("Authorization") for request in server.requests]
    assert sent == [None, "Bearer first", "Bearer second", None]


def test_a_key_that_cannot_be_sent(server, judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(ValueError, match="`api_key_env` must name .*got 'OPENAI_API_KEY'") as info:
        score(judge())
    assert KEY[:8] not in str(info.value) and server.requests == []


# Arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({"url": "localhost:8000/v1"}, "`url` must be an HTTP URL such as .*got 'localhost:8000/v1/chat"),
        ({"url": "ftp://a/b"}, "`url` must be an HTTP URL"),
        ({"url": "http://host:port"}, "`url` must be an HTTP URL"),
        ({"url": "http:///v1"}, "`url` must be an HTTP URL"),
        ({"url": "http://me:secret@host/v1"}, "`url` must not contain a user and password"),
        ({"question": "Is it good?"}, "`question` must contain {prompt}, got 'Is it good"),
        ({"max_concurrency": 0}, "`max_concurrency` must be at least 1, got 0"),
        ({"max_retries": -1}, "`max_retries` must be at least 0, got -1"),
        ({"backoff": -0.1}, "`backoff` must be at least 0, got -0.1"),
        ({"timeout": 0}, "`timeout` must be more than 0 seconds, got 0"),
        ({"image_format": "GIF"}, "`image_format` must be 'PNG' or 'JPEG', got 'GIF'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message) as info:
        VLMJudge(**options)
    assert "secret" not in str(info.value)


def test_extra_body_must_be_serializable():
    with pytest.raises(TypeError, match="`extra_body` must be serializable to JSON"):
        VLMJudge(extra_body={"seed": object()})


def test_as_many_prompts_as_images(judge):
    with pytest.raises(ValueError, match="must have the same length, got 2 prompts and 1 images"):
        score(judge(), ["a", "b"], [make_image()])


# The parser


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Score: 8", 8),
        ("The cat is there.\n\n**Score:** 7.5/10.", 7.5),
        ("**Score**: 8", 8),
        ("score = 3", 3),
        ("Score (1-10): 9", 9),
        ("Score: 8 out of 10", 8),
        ('{"score": 6.5}', 6.5),
        ("Score: [9]", 9),
        ("Score: 10</s>", 10),
        ("First I thought Score: 3. Then Score: 8. 3 cats", 8),
        ("Score: 2\nScore: N", 2),
        ("Score: 3\nScore: 11", None),
        ("Score: 0", None),
        ("Score: -3", None),
        ("Score: 85", None),
        ("Score: 80%", None),
        ("Score: 8/100", None),
        ("Score: 8 out of 100", None),
        ("Score: 7-8", None),
        ("Score: 8,5", None),
        ("Score: 1e1", None),
        ("Score: N", None),
        ("Underscore: 5", None),
        ("8", None),
        ("", None),
    ],
)
def test_parse_score(text, expected):
    assert parse_score(text) == expected


def test_parse_score_on_other_scales():
    assert parse_score("Alignment Score (1-5): 2.69\nStyle Score (1-5): 4", "Alignment Score", 1, 5) == 2.69
    assert parse_score("Score: 0/1", low=0, high=1) == 0


def test_parse_score_of_long_garbage_is_quick():
    start = time.monotonic()
    for text in ("score" + " " * 200_000, "score (" * 50_000, "score: 8" + " " * 200_000, "score:" * 50_000):
        parse_score(text)
    assert time.monotonic() - start < 60  # milliseconds, unless the pattern backtracks


def test_the_question_asks_for_what_the_parser_reads():
    assert QUESTION.endswith("Score: N")
    assert parse_score(QUESTION.replace("Score: N", "Score: 4")) == 4
