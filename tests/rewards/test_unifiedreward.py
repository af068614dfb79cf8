"""UnifiedReward: its question, its scale, and one round trip over loopback."""

import asyncio
import base64
import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from diffusers_mixgrpo.rewards.unifiedreward import QUESTION, UnifiedReward, parse_final_score


# In the format of the examples of the model's authors.
ANSWER = """ocean (location): 0
clouds (object): 1
day time (attribute): 1
Final Score: 2.33"""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        caption = body["messages"][0]["content"][1]["text"].rpartition("[")[2]
        answer = ANSWER if "ocean" in caption else "I cannot see it."
        content = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.bodies = []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_round_trip(server):
    reward = UnifiedReward(f"http://127.0.0.1:{server.server_address[1]}/v1")
    images = [Image.new("RGB", (64, 48), "red"), Image.new("RGBA", (64, 48), "blue")]
    assert asyncio.run(reward(["the ocean", "a {cat}"], images, seed=[1, 2])) == [2.33, None]
    assert reward.__name__ == "unifiedreward"
    assert "no score in the model's answer that ends with 'I cannot see it.'" in str(reward.last_error)
    for body in server.bodies:
        assert body["model"] == "CodeGoat24/UnifiedReward-qwen-7b" and body["temperature"] == 0
        image_part, text = body["messages"][0]["content"]
        kind, _, data = image_part["image_url"]["url"].partition(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == "data:image/jpeg" and image.format == "JPEG" and image.size == (64, 48)
        color, caption = ("red", "the ocean") if image.getpixel((5, 5))[0] > 200 else ("blue", "a {cat}")
        assert text["text"].endswith(f"\nText Caption: [{caption}]"), color


def test_the_question_is_that_of_the_training():
    # Hash of the text in qwen_point_score_image_generation.py in CodeGoat24/UnifiedReward, inference_qwen
    expected = "f56f919ce3bc6aab3c173a5f836defe195e17e9614753e8b4c3dc2405bd4975b"
    assert hashlib.sha256(QUESTION.encode()).hexdigest() == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (ANSWER, 2.33),
        ("Final Score: 5", 5),
        ("**Final Score:** 4/5", 4),
        ("Final Score: 2\nno: Final Score: 3.5.", 3.5),
        ("Final Score: 6", None),
        ("Final Score: 0.5", None),
        ("Final Score: 4/10", None),
        ("Score: 3", None),
        ("ocean (location): 0", None),
    ],
)
def test_parse_final_score(text, expected):
    assert parse_final_score(text) == expected


def test_options_of_the_judge():
    reward = UnifiedReward(model="UnifiedReward", name="ur", image_format="PNG", max_concurrency=4)
    assert reward.__name__ == "ur"
    assert reward.model == "UnifiedReward"
    assert reward.image_format == "PNG"
    assert reward.max_concurrency == 4
