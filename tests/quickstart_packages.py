"""The packages of the quickstart, tiny and made here: a wheel, a Debian package, stamps in it, weights in ONNX."""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from vlm.quickstart import datasets

VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 8,
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, with `files` in it."""
    dist = name.replace("-", "_")
    path = folder / f"{dist}-{version}-py3-none-any.whl"
    info = f"{dist}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    return path


def make_deb(path: Path, files: dict[str, bytes]) -> Path:
    """A Debian package: an ar archive of `debian-binary`, `control.tar.xz` and `data.tar.xz`."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo(f"./{datasets.STAMPS_PREFIX}animals/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        for name, content in (
            ("debian-binary", b"2.0\n"),
            ("control.tar.xz", b"odd"),
            ("data.tar.xz", data.getvalue()),
        ):
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    return path


def png(color: tuple[int, ...], size: tuple[int, int] = (8, 8), mode: str = "RGBA") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def svg(color: str, width: str = "20pt", height: str = "10pt", inside: str = "") -> bytes:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f'<rect width="100%" height="100%" fill="{color}"/>{inside}</svg>'
    ).encode()


def stamp_files() -> dict[str, bytes]:
    """A few stamps, good and bad, in the package's layout."""
    german = "\nde.utf8=Ein Frosch.\nfr.utf8=A frog.\n"
    files = {
        "animals/frog.png": png((0, 255, 0, 255), (8, 4)),
        "animals/frog.txt": ("A frog." + german).encode(),
        "animals/frog2.png": png((0, 128, 0, 255)),
        "animals/frog2.txt": b"a  FROG\n",
        "animals/big.png": png((0, 0, 255, 255), (1000, 500)),
        "animals/big.txt": b"A whale.\n",
        "shapes/twice.png": png((255, 0, 0, 255)),
        "shapes/twice.svg": svg("blue"),
        "shapes/twice.txt": b"A square.\n",
        "shapes/letter.png": png((255, 0, 0, 255)),
        "shapes/letter.svg": svg("blue", inside="<text>A</text>"),
        "shapes/letter.txt": b"A letter.\n",
        "shapes/frog_mirror.png": png((0, 255, 0, 255)),
        "shapes/white.png": png((255, 255, 255, 255)),
        "shapes/white.txt": b"A flash.\n",
        "shapes/clear.png": png((0, 0, 0, 0)),
        "shapes/clear.txt": b"Nothing.\n",
        "shapes/broken.svg": b"<svg",
        "shapes/broken.txt": b"Broken.\n",
        "shapes/square_desc_fr.ogg": b"sound",
    }
    return {datasets.STAMPS_PREFIX + name: content for name, content in files.items()}


def onnx_file(model: CLIPVisionModelWithProjection, quantized: set[str]) -> bytes:
    """`model` as an exporter and a dynamic quantiser write it: linear weights int8 by column, the rest as they are."""
    from onnx import TensorProto, helper, numpy_helper

    initializers, nodes = [], []
    state = model.state_dict()
    for number, (key, tensor) in enumerate(state.items()):
        array = tensor.numpy()
        name = key if key.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{key}"
        if key not in quantized:
            if array.dtype.kind == "f":
                initializers.append(numpy_helper.from_array(array, name))
            continue
        columns = array.T  # MatMul stores [in, out]
        scale = (np.abs(columns).max(axis=0) / 127).astype(np.float32)
        whole = np.round(columns / scale).astype(np.int8)
        base = f"onnx::MatMul_{number}"
        initializers += [
            numpy_helper.from_array(whole, f"{base}_quantized"),
            numpy_helper.from_array(scale, f"{base}_scale"),
            numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{base}_zero_point"),
        ]
        module = "/" + name.removesuffix(".weight").replace(".", "/").replace("layers/", "layers.")
        inputs = ["x", f"{base}_quantized", "x_zero_point", f"{base}_zero_point"]
        nodes.append(helper.make_node("MatMulInteger", inputs, [f"y{number}"], name=f"{module}/MatMul_quant"))
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 1])
    graph = helper.make_graph(nodes, "clip", [x], [], initializers)
    return helper.make_model(graph).SerializeToString()


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
