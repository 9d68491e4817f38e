"""`transformers serve` answers about an image with what `vlm export` wrote, as our model does."""

import base64
import json
import socket
import urllib.request

import pytest
from transformers.cli.serve import Serve

from tests.counterparts import EXPRESSIBLE, PHOTO, PROMPTED, export
from tests.tiny import encode, user

QUESTION = "what is it ?"


@pytest.fixture(scope="module")
def complete():
    """Asks a server on loopback, which loads the model that a request names, and gives its answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(host="127.0.0.1", port=port, device="cpu", non_blocking=True)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(**request):
        body = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            data=json.dumps(request).encode(),
            headers={"Content-Type": "application/json"},
        )
        with direct.open(body) as response:
            return json.load(response)["choices"][0]["message"]["content"]

    yield ask
    server.kill_server()


@pytest.mark.few(4)
@pytest.mark.parametrize("target", sorted(EXPRESSIBLE.keys() - PROMPTED))
def test_served_on_loopback_it_answers_as_ours_does(complete, tmp_path, target):
    model, processor = EXPRESSIBLE[target]()
    export(model, processor, target, tmp_path)
    png = base64.b64encode((tmp_path / "photo.png").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
        {"type": "text", "text": QUESTION},
    ]
    answer = complete(
        model=str(tmp_path / "out"),
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=6,
        stream=False,
    )
    inputs = encode(processor, [[user(PHOTO, QUESTION)]])
    said = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    expected = processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected
    assert answer == expected
