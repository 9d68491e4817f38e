"""`transformers serve` answers about an image with what `vlm export` wrote, as our model does."""

import base64
import socket

import pytest
from openai import InternalServerError, OpenAI
from transformers.cli.serve import Serve

from tests.counterparts import EXPRESSIBLE, PHOTO, PROMPTED, export
from tests.tiny import encode, tiny, user

QUESTION = "what is it ?"


@pytest.fixture(scope="module")
def client():
    """The official client of a server on loopback, which loads the model that a request names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(host="127.0.0.1", port=port, device="cpu", trust_remote_code=True, non_blocking=True)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("NO_PROXY", "127.0.0.1")
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    server.kill_server()


def ask(client, folder):
    png = base64.b64encode((folder / "photo.png").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
        {"type": "text", "text": QUESTION},
    ]
    messages = [{"role": "user", "content": content}]
    done = client.chat.completions.create(model=str(folder / "out"), messages=messages, temperature=0, max_tokens=6)
    return done.choices[0].message.content


@pytest.mark.few(4)
@pytest.mark.parametrize("target", sorted(EXPRESSIBLE.keys() - PROMPTED))
def test_served_on_loopback_it_answers_as_ours_does(client, tmp_path, target):
    model, processor = EXPRESSIBLE[target]()
    export(model, processor, target, tmp_path)
    answer = ask(client, tmp_path)
    inputs = encode(processor, [[user(PHOTO, QUESTION)]])
    said = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    expected = processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected
    assert answer == expected


def test_a_folder_with_code_is_refused_by_the_server(client, tmp_path):
    """The docs say so: the server looks for the class in transformers, whatever it may trust."""
    model, processor = tiny()
    export(model, processor, "remote_code", tmp_path)
    with pytest.raises(InternalServerError):
        ask(client, tmp_path)
