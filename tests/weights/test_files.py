"""Files that are refused, with one line and nothing executed; and the two readers written here."""

from __future__ import annotations

import collections
import io
import pickle
import struct

import numpy as np
import pytest
import torch

from fastrcnn.weights import WeightsError, load_weights, read_weights
from fastrcnn.weights.__main__ import main
from fastrcnn.weights.pickles import read_pickle
from fastrcnn.weights.read import read_file
from fastrcnn.weights.safetensors import DTYPES, read_safetensors, write_safetensors
from tests.models.inputs import small_model


class Attack:
    """Executes code when it is unpickled."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


class Sneaky:
    """Calls an allowed name to reach another one."""

    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('executed').touch()",))


def truncated(path, content):
    torch.save(content, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def damaged(path):
    torch.save({"model": {"rpn.head.conv.bias": torch.zeros(1000)}}, path)
    data = bytearray(path.read_bytes())
    at = data.index(bytes(2000)) + 1000
    data[at] = 1
    path.write_bytes(bytes(data))


MALFORMED = {
    "nothing": (lambda path: None, "no such file"),
    "an empty file": (lambda path: path.write_bytes(b""), "it is empty"),
    "a text file": (lambda path: path.write_bytes(b"<html>not found</html>"), "not a file of weights"),
    "a picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "not a file of weights"),
    "no tensors": (lambda path: torch.save({"model": {}}, path), "holds no tensors"),
    "a list": (lambda path: torch.save([1, 2], path), "holds a list"),
    "another model": (lambda path: torch.save({"nothing.fits": torch.zeros(1)}, path), "none of its 1 tensors fits"),
    "code in a pickle": (lambda path: path.write_bytes(pickle.dumps({"model": Attack()})), "could run code"),
    "eval in a pickle": (lambda path: path.write_bytes(pickle.dumps({"conv1_w": Sneaky()}, 2)), r"builtin\w*\.eval"),
    "code in torch.save": (lambda path: torch.save({"model": Attack()}, path), "could run code"),
    "code in old torch.save": (
        lambda path: torch.save({"model": Attack()}, path, _use_new_zipfile_serialization=False),
        "could run code",
    ),
    "cut off": (lambda path: truncated(path, {"model": {"a.b": torch.zeros(5000)}}), "not a readable file of weights"),
    "a flipped byte": (damaged, "the checksum of .* is wrong"),
    "half a pickle": (
        lambda path: path.write_bytes(pickle.dumps({"conv1_w": np.zeros(500)}, 2)[:900]),
        "not a readable file|is damaged",
    ),
    "half a safetensors": (
        lambda path: path.write_bytes(safetensors_bytes({"rpn.head.conv.bias": torch.zeros(40)})[:-8]),
        "cut off",
    ),
}


def safetensors_bytes(tensors, metadata=None):
    file = io.BytesIO()
    write_safetensors(file, tensors, metadata or {})
    return file.getvalue()


@pytest.mark.parametrize(("write", "message"), MALFORMED.values(), ids=MALFORMED)
def test_files_that_are_refused(tmp_path, monkeypatch, capsys, write, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(small_model(), path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert "never be printed" not in capsys.readouterr().out
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", [name for name in MALFORMED if name not in ("another model",)])
def test_the_command_exits_with_2(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    MALFORMED[name][0](tmp_path / "weights.pth")
    assert main(["weights.pth", "out.pth", "--to", "detectron2"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: weights.pth")
    assert said.err.count("\n") == 1
    assert "never be printed" not in said.out
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out.pth").exists()


def test_a_pickle_can_hold_what_caffe2_writes():
    content = {
        "blobs": collections.OrderedDict(a=np.arange(6, dtype="f4").reshape(2, 3), b=np.asfortranarray(np.eye(3)[:2])),
        "big endian": np.arange(3, dtype=">i4"),
        "cfg": "TRAIN: {}",
        "numbers": [1, 2.5, None, True, np.float32(0.5), np.int64(7)],
    }
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        found = read_pickle(pickle.dumps(content, protocol))
        for key in ("a", "b"):
            assert np.array_equal(found["blobs"][key], content["blobs"][key])
            assert found["blobs"][key].dtype == content["blobs"][key].dtype
        assert np.array_equal(found["big endian"], content["big endian"])
        assert found["cfg"] == "TRAIN: {}"
        assert found["numbers"] == [1, 2.5, None, True, 0.5, 7]


def test_a_pickle_of_python_2():
    """Strings are latin1 there, and so is the content of arrays."""
    data = (
        b"\x80\x02}q\x00U\x07conv1_wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85"
        b"U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff"
        b"\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00\xc0tbs."
    )
    found = read_pickle(data)
    assert found["conv1_w"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    "value",
    [np.array([Attack()], dtype=object), np.array([{}], dtype=object), np.array(["text"]), np.array([1j])],
    ids=["objects that run code", "objects", "text", "complex"],
)
def test_arrays_of_anything_but_numbers_are_refused(value, capsys):
    with pytest.raises(pickle.UnpicklingError):
        read_pickle(pickle.dumps({"a": value}, 2))
    assert "never be printed" not in capsys.readouterr().out


def test_a_shape_that_the_data_does_not_have_is_refused():
    data = pickle.dumps({"a": np.zeros(7, "f4")}, 2).replace(b"K\x07\x85", b"K\x7f\x85")
    with pytest.raises(pickle.UnpicklingError, match="damaged array"):
        read_pickle(data)


def test_safetensors_of_every_type():
    tensors = {name: torch.ones(2, 3, dtype=dtype) for name, dtype in DTYPES.items()}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "view": torch.arange(6.0).view(2, 3).t()}
    found, metadata = read_safetensors(safetensors_bytes(tensors, {"format": "pt"}))
    assert metadata == {"format": "pt"}
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_safetensors_agree_with_the_package(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="the package safetensors is not installed")
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(5)}
    (tmp_path / "ours").write_bytes(safetensors_bytes(tensors))
    assert {n: v.tolist() for n, v in package.load_file(tmp_path / "ours").items()} == {
        n: v.tolist() for n, v in tensors.items()
    }
    found, _ = read_safetensors(package.save(tensors))
    assert torch.equal(found["a"], tensors["a"])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,80]}}', "cut off"),
        (b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', "cut off"),
        (b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', "another size"),
        (b'{"a":{"dtype":"PYOBJ","shape":[2],"data_offsets":[0,8]}}', "unknown type"),
        (b'{"a":3}', "damaged"),
        (b"[1, 2]", "not an object"),
    ],
)
def test_safetensors_with_an_impossible_header(header, message):
    with pytest.raises(ValueError, match=message):
        read_safetensors(struct.pack("<Q", len(header)) + header + bytes(8))


def test_names_of_wrapped_models(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"module.module.rpn.head.conv.bias": torch.ones(3)}}, path)
    assert set(read_file(path).tensors) == {"rpn.head.conv.bias"}
    torch.save({"model": {"rpn.head.conv.bias": torch.ones(3)}}, path, _use_new_zipfile_serialization=False)
    assert read_weights(path).kind == "maskrcnn_benchmark"
