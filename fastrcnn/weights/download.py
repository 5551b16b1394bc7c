"""Weights by address: ``http(s)://``, and ``catalog://`` with maskrcnn-benchmark's names.

Files are kept in ``$FASTRCNN_CACHE`` (default ``~/.cache/fastrcnn``). A file appears there whole or not at all. Where
its name carries the beginning of its SHA-256 (``resnet50-19c8e357.pth``) it must agree; else the sum is noted beside it
when it is fetched, and compared each time it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fastrcnn.files import write_atomically
from fastrcnn.weights.report import WeightsError

logger = logging.getLogger("fastrcnn.weights")

TIMEOUT = 30  # seconds without a byte
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})(?=\.)")
DETECTRON = "https://dl.fbaipublicfiles.com/detectron"
DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2"
IMAGENET = {
    "MSRA/R-50": "ImageNetPretrained/MSRA/R-50.pkl",
    "MSRA/R-50-GN": "ImageNetPretrained/47261647/R-50-GN.pkl",
    "MSRA/R-101": "ImageNetPretrained/MSRA/R-101.pkl",
    "MSRA/R-101-GN": "ImageNetPretrained/47592356/R-101-GN.pkl",
    "FAIR/20171220/X-101-32x8d": "ImageNetPretrained/20171220/X-101-32x8d.pkl",
}
# Names under Caffe2Detectron/COCO/, and the mark that Detectron's training gave the run.
BASELINES = {
    "35857197/e2e_faster_rcnn_R-50-C4_1x": "01_33_49.iAX0mXvW",
    "35857345/e2e_faster_rcnn_R-50-FPN_1x": "01_36_30.cUF7QR7I",
    "35857890/e2e_faster_rcnn_R-101-FPN_1x": "01_38_50.sNxI7sX7",
    "36761737/e2e_faster_rcnn_X-101-32x8d-FPN_1x": "06_31_39.5MIHi1fZ",
    "35858791/e2e_mask_rcnn_R-50-C4_1x": "01_45_57.ZgkA7hPB",
    "35858933/e2e_mask_rcnn_R-50-FPN_1x": "01_48_14.DzEQe4wC",
    "35861795/e2e_mask_rcnn_R-101-FPN_1x": "02_31_37.KqyEK4tT",
    "36761843/e2e_mask_rcnn_X-101-32x8d-FPN_1x": "06_35_59.RZotkLKI",
    "37129812/e2e_mask_rcnn_X-152-32x8d-FPN-IN5k_1.44x": "09_35_36.8pzTQKYK",
    "37697547/e2e_keypoint_rcnn_R-50-FPN_1x": "08_42_54.kdzV35ao",
}


def local_path(source: str | Path) -> Path:
    """The file that ``source`` names; fetched first where it is an address and not in the cache.

    Raises:
        WeightsError: an unknown name of the catalog, no connection, an incomplete or a wrong file.
    """
    text = str(source)
    address = address_of(text)
    return Path(text).expanduser() if address is None else fetch(address, called=text)


def address_of(source: str) -> str | None:
    """The ``http(s)://`` address of a source; None for a path."""
    if source.startswith(("http://", "https://")):
        return source
    if source.startswith("detectron2://"):
        return f"{DETECTRON2}/{source.removeprefix('detectron2://')}"
    if not source.startswith("catalog://"):
        return None
    name = source.removeprefix("catalog://")
    group, _, inside = name.partition("/")
    if group == "ImageNetPretrained" and inside in IMAGENET:
        return f"{DETECTRON}/{IMAGENET[inside]}"
    if group == "Caffe2Detectron" and (model := inside.removeprefix("COCO/")) in BASELINES:
        number, run = model.split("/")
        prefix = "keypoints_" if "keypoint" in run else ""
        sets = f"{prefix}coco_2014_train%3A{prefix}coco_2014_valminusminival"
        return (
            f"{DETECTRON}/{number}/12_2017_baselines/{run}.yaml.{BASELINES[model]}/output/train/{sets}/"
            "generalized_rcnn/model_final.pkl"
        )
    known = [f"ImageNetPretrained/{n}" for n in IMAGENET] + [f"Caffe2Detectron/COCO/{n}" for n in BASELINES]
    raise WeightsError(f"{source}: the catalog has no such model; it has {', '.join(known)}")


def cache_folder() -> Path:
    """``$FASTRCNN_CACHE``, else ``fastrcnn`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    given = os.environ.get("FASTRCNN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given).expanduser() if given else Path(base).expanduser() / "fastrcnn"


def cached_path(address: str) -> Path:
    """Where the file of an address is kept. Names repeat between addresses, so a part of the address' sum is added."""
    name = Path(urllib.parse.unquote(urllib.parse.urlparse(address).path)).name or "weights"
    return cache_folder() / f"{hashlib.sha256(address.encode()).hexdigest()[:10]}_{name}"


def fetch(address: str, *, called: str | None = None) -> Path:
    """The cached file of ``address``, fetched if it is not there.

    Args:
        called: the name to use in messages.
    """
    path, called = cached_path(address), called or address
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.exists():
                _download(address, path, called)
    except OSError as error:
        raise WeightsError(f"{called}: {path} cannot be written ({error.strerror or error})") from None
    _check(address, path, called)
    return path


def _download(address: str, path: Path, called: str) -> None:
    logger.info("Fetching %s to %s", address, path)
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            expected = response.headers.get("Content-Length")
            part = path.with_name(path.name + ".part")
            with open(part, "wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise WeightsError(
            f"{called}: cannot be fetched ({reason}); fetch {address} where there is a connection and pass the file's "
            f"path, or put it at {path}"
        ) from None
    try:
        found, size = _digest(part)
        if expected is not None and size != int(expected):
            raise WeightsError(f"{called}: the transfer ended after {size} of {expected} bytes; try again")
        wanted = hash_in_name(address)
        if wanted and not found.startswith(wanted):
            raise WeightsError(
                f"{called}: what {address} gave has the SHA-256 {found[:12]}..., not {wanted}... as its "
                "name says; it was not kept"
            )
        write_atomically(_sum_file(path), lambda file: file.write(f"{found}  {address}\n".encode()))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _check(address: str, path: Path, called: str) -> None:
    """Compare the file with the sum in its name or beside it; a file put there by hand has neither."""
    wanted = hash_in_name(address)
    if _sum_file(path).exists():
        wanted = _sum_file(path).read_text().split()[0]
    if not wanted:
        return
    found = _digest(path)[0]
    if not found.startswith(wanted):
        raise WeightsError(f"{called}: {path} is not the file that was fetched (SHA-256 {found[:12]}...); delete it")


def hash_in_name(address: str) -> str | None:
    """The beginning of the SHA-256 that the file's name carries, as PyTorch's do; None without."""
    match = HASH_IN_NAME.search(Path(urllib.parse.urlparse(address).path).name)
    return match[1] if match else None


def _digest(path: Path) -> tuple[str, int]:
    """SHA-256 and size of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def _sum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time: the ranks of a run ask for the same file together."""
    try:
        import fcntl
    except ImportError:  # not POSIX
        yield
        return
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
