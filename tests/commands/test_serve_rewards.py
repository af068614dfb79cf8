"""The reward server as any HTTP client sees it, and as a process of its own."""

import base64
import http.client
import io
import json
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import pytest
from PIL import Image

from diffusers_mixgrpo.commands import serve_rewards


def png(color="red", size=(4, 3), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def redness(prompts, images, **columns):
    return [image.getpixel((0, 0))[0] / 255 for image in images]


def broken(prompts, images):
    raise RuntimeError("the model is\nnot there")


def too_few(prompts, images):
    return [0.5]


def texts(prompts, images):
    return ["good"] * len(images)


@pytest.fixture
def start():
    servers = []

    def start(rewards, api_key="", max_bytes=2**20, **limits):
        server = serve_rewards.RewardServer(("127.0.0.1", 0), rewards, api_key, max_bytes, **limits)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return server.server_address[1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def connect(start):
    connections = []

    def connect(port):
        connections.append(http.client.HTTPConnection("127.0.0.1", port, timeout=60))
        return connections[-1]

    yield connect
    for connection in connections:
        connection.close()


def ask(connection, method, path, body=None, **headers):
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, content, headers)
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(response.read())


def batch(count=1, **changes):
    return {"prompts": ["a cat"] * count, "images": [png()] * count} | changes


def test_scores(start, connect):
    connection = connect(start({"redness": redness, "my_module:length": lambda prompts, images: map(len, prompts)}))
    images = [png("red"), png("blue", kind="JPEG"), png((51, 0, 0), kind="WEBP")]
    status, answer = ask(connection, "POST", "/redness", {"prompts": ["a"] * 3, "images": images, "columns": {}})
    assert status == 200 and answer["scores"] == pytest.approx([1, 0, 0.2], abs=0.02)
    status, answer = ask(connection, "POST", "/my_module%3Alength", batch(prompts=["four"]))
    assert (status, answer) == (200, {"scores": [4.0]})
    assert ask(connection, "POST", "/redness", {"prompts": [], "images": []}) == (200, {"scores": []})
    assert ask(connection, "GET", "/health") == (
        200,
        {"status": "ok", "rewards": ["redness", "my_module:length"]},
    )


WRONG = [
    (b"", None, "the request is not JSON"),
    (b"{", None, "the request is not JSON"),
    (b"\xff\xfe\x00", None, "the request is not JSON"),
    (b"[" * 100_000, None, "the request is not JSON"),
    ([1], None, "not a JSON object"),
    ({"images": []}, "prompts", "must be a list of strings"),
    ({"prompts": "a", "images": [png()]}, "prompts", "must be a list of strings"),
    ({"prompts": [1], "images": [png()]}, "prompts", "must be a list of strings"),
    ({"prompts": ["a"]}, "images", "must be a list of 1 images"),
    (batch(images=[]), "images", "must be a list of 1 images"),
    (batch(2, images=[png(), None]), "images[1]", "it is a NoneType"),
    (batch(2, images=[png(), "ä"]), "images[1]", "must be a PNG, JPEG or WebP image in base64"),
    (batch(images=["!!!!"]), "images[0]", "must be a PNG, JPEG or WebP image in base64"),
    (batch(images=[base64.b64encode(b"hello").decode()]), "images[0]", "must be a PNG, JPEG or WebP"),
    (batch(images=[png(size=(300, 300))[:200]]), "images[0]", "must be a PNG, JPEG or WebP"),
    (batch(images=[png(kind="GIF")]), "images[0]", "must be a PNG, JPEG or WebP"),
    (batch(columns=[]), "columns", "must be an object of lists"),
    (batch(columns={"answer": 3}), "columns.answer", "must be a list of 1 values"),
    (batch(columns={"answer": [1, 2]}), "columns.answer", "must be a list of 1 values"),
    (batch(columns={"images": [1]}), "columns.images", "is a reserved name"),
]


def test_wrong_requests(start, connect):
    connection = connect(start({"redness": redness}))
    for body, field, message in WRONG:
        status, answer = ask(connection, "POST", "/redness", body)
        assert status == 400 and answer["error"]["field"] == field, body
        assert message in answer["error"]["message"] and (field or "") in answer["error"]["message"]
    # All requests used one connection, which still works.
    assert ask(connection, "POST", "/redness", batch()) == (200, {"scores": [1.0]})


def bomb(side):
    """A small PNG of many pixels: one bit each, all alike."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(bytes((side // 8 + 1) * side), 1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(content).decode()


@pytest.mark.parametrize("side", [4104, 20_000])  # just above our limit, and above PIL's
def test_images_of_too_many_pixels(start, connect, side):
    connection = connect(start({"redness": redness}))
    status, answer = ask(connection, "POST", "/redness", batch(2, images=[png(), bomb(side)]))
    assert status == 413 and answer["error"]["field"] == "images[1]"
    assert "at most 16777216 pixels" in answer["error"]["message"]
    assert "raise `--max_image_pixels`" in answer["error"]["message"]
    assert ask(connection, "POST", "/redness", batch()) == (200, {"scores": [1.0]})


def test_requests_of_too_many_pixels(start, connect):
    connection = connect(start({"redness": redness}, max_pixels=12))
    assert ask(connection, "POST", "/redness", batch(8))[0] == 200
    status, answer = ask(connection, "POST", "/redness", batch(9))
    assert status == 413 and answer["error"]["field"] == "images[8]"


MEASURE = """
import json, resource, sys
from diffusers_mixgrpo.commands import serve_rewards
content = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    serve_rewards.read_batch(content)
    status = 200
except serve_rewards.RequestError as error:
    status = int(error.status)
print(json.dumps([status, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
@pytest.mark.parametrize("side, status, limit", [(13_000, 413, 30), (4088, 413, 650)])
def test_memory_of_a_request(side, status, limit):
    """In MiB. Decoded, these eight images of 13000x13000 would take 4.1 GB, and nine of 4088x4088 430 MB."""
    images = [bomb(side)] * (8 if side > 4096 else 9)
    content = json.dumps({"prompts": ["a"] * len(images), "images": images}).encode()
    done = subprocess.run([sys.executable, "-c", MEASURE], input=content, capture_output=True, timeout=60, check=True)
    measured = json.loads(done.stdout)
    assert measured[0] == status and measured[1] < limit


@pytest.mark.parametrize(
    "name, message",
    [
        ("broken", "the reward raised RuntimeError: the model is\nnot there"),
        ("too_few", "the reward returned 1 scores for 2 images"),
        ("texts", "the reward raised ValueError: could not convert string to float: 'good'"),
    ],
)
def test_rewards_that_do_not_work(start, connect, name, message):
    connection = connect(start({name: globals()[name], "redness": redness}))
    assert ask(connection, "POST", f"/{name}", batch(2)) == (500, {"error": {"message": message, "field": None}})
    assert ask(connection, "POST", "/redness", batch())[0] == 200


def test_other_paths_and_methods(start, connect):
    port = start({"redness": redness})
    connection = connect(port)
    for method, path in (("POST", "/"), ("POST", "/greenness"), ("POST", "/redness/more"), ("POST", "/health")):
        status, answer = ask(connection, method, path, batch())
        assert status == 404 and "there is no reward" in answer["error"]["message"], path
    assert ask(connection, "GET", "/redness")[0] == 404
    assert ask(connect(port), "PUT", "/redness", batch())[0] == 501


def test_the_key(start, connect):
    port = start({"redness": redness}, api_key="secret")
    connection = connect(port)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "ü"}):
        status, answer = ask(connection, "POST", "/redness", batch(), **headers)
        assert status == 401 and "secret" not in str(answer)
    assert ask(connection, "POST", "/greenness", batch())[0] == 401  # names are not revealed without the key
    assert ask(connection, "POST", "/redness", batch(), Authorization="Bearer secret") == (200, {"scores": [1.0]})
    assert ask(connection, "GET", "/health")[0] == 200


def test_limit_on_requests(start, connect):
    port = start({"redness": redness}, max_bytes=1000)
    connection = connect(port)
    for _ in range(2):  # the rest of a moderate request is read, so the connection stays open
        status, answer = ask(connection, "POST", "/redness", b"x" * 3000)
        assert status == 413 and "must have at most 1000 bytes, got 3000" in answer["error"]["message"]
    assert ask(connection, "POST", "/redness", batch()) == (200, {"scores": [1.0]})


def raw(port, request):
    """The answer to a raw request, until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(4096), b""))


def test_lengths_that_are_none(start, connect):
    port = start({"redness": redness}, max_bytes=1000)
    for length in (
        b"",
        b"Content-Length: -1\r\n",
        b"Content-Length: 1e3\r\n",
        b"Content-Length: " + b"9" * 5000 + b"\r\n",
    ):
        answer = raw(port, b"POST /redness HTTP/1.1\r\nHost: a\r\n" + length + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 411 ") and b"no Content-Length" in answer
    assert raw(port, b"nonsense\r\n\r\n").endswith(b'"field": null}}')
    assert ask(connect(port), "GET", "/health")[0] == 200


def test_a_client_that_disconnects(start, connect, capfd, caplog):
    caplog.set_level(logging.INFO, logger="serve_rewards")
    port = start({"redness": redness})
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /redness HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc")
    assert ask(connect(port), "POST", "/redness", batch()) == (200, {"scores": [1.0]})
    deadline = time.monotonic() + 60
    while "disconnected: 3 of 100 bytes arrived" not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.01)
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_one_batch_at_a_time(start, connect):
    busy = []
    counts = []
    entered = threading.Event()
    release = threading.Event()

    def reward(prompts, images):
        busy.append(1)
        counts.append(len(busy))
        entered.set()
        assert release.wait(60)
        time.sleep(0.02)
        busy.pop()
        return [1.0]

    port = start({"a": reward, "b": reward})
    threads = [threading.Thread(target=ask, args=(connect(port), "POST", f"/{name}", batch())) for name in "abab"]
    for thread in threads:
        thread.start()
    assert entered.wait(60)
    for _ in range(3):
        assert ask(connect(port), "GET", "/health")[0] == 200  # answered while a reward is busy
    release.set()
    for thread in threads:
        thread.join()
    assert counts == [1, 1, 1, 1]


def test_two_rewards_of_one_name(tmp_path, monkeypatch):
    (tmp_path / "serve_a.py").write_text("def one(prompts, images): return [1.0]\n")
    (tmp_path / "serve_b.py").write_text("from serve_a import one\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(serve_rewards.load_rewards(["serve_a:one"], "cpu")) == ["one"]
    with pytest.raises(ValueError, match="`reward_funcs` must have distinct names, got 'one' twice"):
        serve_rewards.load_rewards(["serve_a:one", "serve_b:one"], "cpu")


def test_rewards_are_moved_to_the_device(tmp_path, monkeypatch):
    (tmp_path / "serve_c.py").write_text(
        "class Model:\n"
        "    __name__ = 'model'\n"
        "    def to(self, device):\n"
        "        self.device = device\n"
        "        return self\n"
        "    def __call__(self, prompts, images):\n"
        "        return [1.0] * len(images)\n"
        "model = Model()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert serve_rewards.load_rewards(["serve_c:model"], "meta")["model"].device == "meta"


def test_the_command(tmp_path, connect):
    (tmp_path / "my_rewards.py").write_text(
        "def redness(prompts, images, **columns):\n    return [image.getpixel((0, 0))[0] / 255 for image in images]\n"
    )
    command = [
        sys.executable,
        "-m",
        "diffusers_mixgrpo",
        "serve-rewards",
        "--reward_funcs",
        "my_rewards:redness",
        "--port",
        "0",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MY_KEY": "secret", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--api_key_env", "MY_KEY"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"Serving redness at http://127\.0\.0\.1:(\d+), API key required", line):
                break
        assert found, "".join(lines)
        connection = connect(int(found[1]))
        assert ask(connection, "POST", "/redness", batch())[0] == 401
        assert ask(connection, "POST", "/redness", batch(), Authorization="Bearer secret") == (200, {"scores": [1.0]})
    finally:
        process.terminate()
        rest = process.communicate(timeout=60)[1]
    assert "secret" not in "".join(lines) + rest


def test_a_key_that_is_not_set(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve_rewards.py", "--reward_funcs", "a:b", "--api_key_env", "NO_SUCH_KEY"])
    with pytest.raises(ValueError, match="`api_key_env` must name .*got 'NO_SUCH_KEY', which is not set"):
        serve_rewards.main()
