"""Addresses, the catalog and the cache. A server on this machine stands for the network."""

from __future__ import annotations

import hashlib
import http.server
import threading

import pytest
import torch

from fastrcnn.weights import WeightsError, download, load_weights
from fastrcnn.weights.download import address_of, cached_path, fetch, hash_in_name, local_path
from tests.models.inputs import small_model

CONTENT = b"0123456789" * 1000
SUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(address, list of the paths asked for); ``cut`` promises more bytes than it sends."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if "missing" in self.path:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT) * (2 if "cut" in self.path else 1)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("FASTRCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_a_file_is_fetched_once(server):
    address, asked = server
    path = fetch(f"{address}/a/model_final.pkl")
    assert path.read_bytes() == CONTENT
    assert fetch(f"{address}/a/model_final.pkl") == path
    assert asked == ["/a/model_final.pkl"]
    assert fetch(f"{address}/b/model_final.pkl") != path  # another file of the same name
    assert path.with_name(path.name + ".sha256").read_text().startswith(SUM)


def test_ranks_that_ask_together_fetch_once(server):
    address, asked = server
    threads = [threading.Thread(target=fetch, args=(f"{address}/a.pth",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == ["/a.pth"]


def test_the_sum_in_the_name_must_agree(server):
    address, _ = server
    assert fetch(f"{address}/resnet-{SUM[:8]}.pth").read_bytes() == CONTENT
    with pytest.raises(WeightsError, match=r"has the SHA-256 .* not 0123abcd\.\.\. as its name says"):
        fetch(f"{address}/resnet-0123abcd.pth")
    assert not cached_path(f"{address}/resnet-0123abcd.pth").exists()


def test_a_transfer_that_ends_early_leaves_nothing(server):
    address, _ = server
    with pytest.raises(WeightsError, match=r"cannot be fetched|the transfer ended after 10000 of 20000 bytes"):
        fetch(f"{address}/cut.pth")
    left = [p.name for p in cached_path("x").parent.iterdir() if not p.name.endswith(".lock")]
    assert left == []


def test_a_file_that_changed_in_the_cache_is_refused(server):
    address, _ = server
    path = fetch(f"{address}/a.pth")
    path.write_bytes(b"else")
    with pytest.raises(WeightsError, match="is not the file that was fetched"):
        fetch(f"{address}/a.pth")


def test_without_a_connection_the_message_says_what_to_do(server, monkeypatch):
    address, _ = server
    with pytest.raises(WeightsError, match=r"cannot be fetched \(Not Found"):
        fetch(f"{address}/missing.pth")
    monkeypatch.setattr(download, "DETECTRON", "http://127.0.0.1:9")  # where nobody listens
    name = "catalog://ImageNetPretrained/MSRA/R-50"
    with pytest.raises(WeightsError) as caught:
        local_path(name)
    message = str(caught.value)
    assert message.startswith(f"{name}: cannot be fetched (")
    assert "pass the file's path, or put it at" in message
    put = message.rpartition(" put it at ")[2]
    torch.save(small_model(seed=1).state_dict(), put)
    assert len(load_weights(small_model(), name).loaded) > 50  # a file put there by hand is taken


def test_the_catalog():
    base = "https://dl.fbaipublicfiles.com/detectron"
    assert address_of("catalog://ImageNetPretrained/MSRA/R-50") == f"{base}/ImageNetPretrained/MSRA/R-50.pkl"
    assert (
        address_of("catalog://ImageNetPretrained/FAIR/20171220/X-101-32x8d")
        == f"{base}/ImageNetPretrained/20171220/X-101-32x8d.pkl"
    )
    assert address_of("catalog://Caffe2Detectron/COCO/37697547/e2e_keypoint_rcnn_R-50-FPN_1x") == (
        f"{base}/37697547/12_2017_baselines/e2e_keypoint_rcnn_R-50-FPN_1x.yaml.08_42_54.kdzV35ao/output/train/"
        "keypoints_coco_2014_train%3Akeypoints_coco_2014_valminusminival/generalized_rcnn/model_final.pkl"
    )
    assert len(download.IMAGENET) + len(download.BASELINES) == 15
    with pytest.raises(WeightsError, match=r"no such model; it has ImageNetPretrained/MSRA/R-50, "):
        address_of("catalog://ImageNetPretrained/MSRA/R-5000")
    assert address_of("output/model_final.pth") is None


def test_sums_in_names():
    assert hash_in_name("https://x/resnet50-19c8e357.pth?a=b") == "19c8e357"
    assert hash_in_name("https://x/model-final.pth") is None
    assert hash_in_name("https://x/12345678-20200101/weights.pth") is None
