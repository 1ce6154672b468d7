"""Whatever a stranger's file holds, its reader returns or raises one of our errors: nothing else, and soon.

Each reader gets a file that it can read, damaged in places that hypothesis chooses, and files made to harm.
"""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from chatreid_plugin import archives
from chatreid_plugin.archives import map_array, open_archive
from chatreid_plugin.config import BuildSettings, SourceSettings, load_settings
from chatreid_plugin.datasets.cuhk03 import extract_images, read_new_protocol, read_test_people
from chatreid_plugin.datasets.label_files import read_lines, read_matlab
from chatreid_plugin.datasets.registry import list_source
from chatreid_plugin.engine.captions.requests import encode_image
from chatreid_plugin.engine.image_facts import inspect_image
from chatreid_plugin.engine.manifests import attach_annotations
from chatreid_plugin.errors import ChatReIDError
from chatreid_plugin.pixels import encode_thumbnail, open_crop
from chatreid_plugin.records import IMAGE_RECORD_SCHEMA, ImageRecord
from chatreid_plugin.search.gallery import list_gallery
from chatreid_plugin.search.session import Asked, read_turns
from chatreid_plugin.search.turns import Turn
from chatreid_plugin.shards import (
    check_shard,
    make_manifest_table,
    read_json,
    read_json_lines,
    read_manifest,
    read_shard,
)
from chatreid_plugin.training.recipe import read_values


SESSION = {
    "version": 1,
    "at": 0,
    "turns": [asdict(Turn(text="a man", weight=0.5, same=("ab",))) | asdict(Asked(Turn(), -1, ["ab"]))],
}
RECORD = ImageRecord("own/1.png", "own", "train", "1.png", "own:1", "c", 4, 8, captions=("a man",))


@dataclass(frozen=True)
class Reader:
    """A reader of strangers' bytes: the file's name, a sound one, and what reads it."""

    name: str
    content: bytes
    read: Callable[[Path], Any]


def write_image(format: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((12, 24), 60).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def write_with(write: Callable[[Any], Any]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def write_hdf5(buffer: Any) -> None:
    with h5py.File(buffer, "w") as file:
        cells = file.create_dataset("cells", data=np.zeros((3, 4, 2), np.uint8))
        people = file.create_dataset("people", data=np.array([[cells.ref]], h5py.ref_dtype))
        file["detected"] = np.array([[people.ref]], h5py.ref_dtype)
        rows = file.create_dataset("rows", data=np.ones((2, 1)))
        file["testsets"] = np.array([[rows.ref]], h5py.ref_dtype)


def read_picture(path: Path) -> None:
    """Look at an image in each way that we have; a page shows nothing where there is nothing to show."""
    encode_thumbnail(path)
    faults: list[ChatReIDError] = []
    for read in (open_crop, inspect_image, encode_image):
        try:
            read(path)
        except ChatReIDError as error:
            faults.append(error)
    if faults:
        raise faults[0]


def read_labels(name: str, **changes: Any) -> Callable[[Path], Any]:
    return lambda path: list_source(
        SourceSettings(name=name, root=path.parent, labels=path, allow_count_mismatch=True, **changes)
    )


def read_raw_set(path: Path) -> None:
    read_test_people(path, 1)
    extract_images(path, "detected", path.parent / "images_detected")


DESCRIBED = {"split": "train", "captions": ["a man"], "id": 1, "file_path": "1.png"}
CELLS = np.array([["1.png"]], object)
READERS = {
    "png": Reader("1.png", write_image("PNG"), read_picture),
    "png16": Reader("1.png", write_image("PNG", "I;16"), read_picture),
    "gif": Reader("1.gif", write_image("GIF", "P"), read_picture),
    "jpeg": Reader("1.jpg", write_image("JPEG"), read_picture),
    "tiff": Reader("1.tif", write_image("TIFF", compression="tiff_lzw"), read_picture),
    "webp": Reader("1.webp", write_image("WEBP"), read_picture),
    "json": Reader("a.json", b'{"a": [1, "b", null, 1.5e3]}', read_json),
    "lines": Reader("a.jsonl", b'{"a": 1}\n{"b": "c"}\n', lambda path: list(read_json_lines(path))),
    "list": Reader("a.txt", b"0001/a.jpg 1\n2, 3\n", lambda path: list(read_lines(path))),
    "captions": Reader(
        "c.jsonl",
        b'{"path": "1.png", "captions": ["x"], "attributes": {"hat": "cap"}}\n',
        lambda path: attach_annotations([RECORD], path),
    ),
    "text set": Reader("reid_raw.json", json.dumps([DESCRIBED]).encode(), read_labels("cuhkpedes")),
    "own csv": Reader(
        "own.csv", b"path,person,camera,split,caption\n1.png,1,a,train,x\n", read_labels("own", parser="list")
    ),
    "gallery": Reader("own.csv", b"path,camera,time,hat\n1.png,a,2026-03-01T10:00+01:00,cap\n", list_gallery),
    "session": Reader("case.json", json.dumps(SESSION).encode(), read_turns),
    "own lines": Reader(
        "own.jsonl", b'{"path": "1.png", "person": 1.0, "split": "val"}', read_labels("own", parser="list")
    ),
    "yaml": Reader(
        "a.yaml",
        b'sources:\n  - {name: own, parser: pattern, root: x, pattern: "{person}.png"}\nrecords: {stage1: 3}\n',
        lambda path: load_settings(path, [], BuildSettings),
    ),
    "recipe": Reader("a.yaml", b"learning_rate: 1.0e-5\nfreeze: {a: [1, b]}\n", lambda path: read_values(path, [])),
    "mat": Reader("a.mat", write_with(lambda file: savemat(file, {"a": {"b": CELLS, "c": np.eye(3)}})), read_matlab),
    "packed mat": Reader(
        "a.mat",
        write_with(
            lambda file: savemat(
                file,
                {"filelist": CELLS, **{f"{part}_idx": np.array([[1]]) for part in ("train", "query", "gallery")}},
                do_compression=True,
            )
        ),
        read_new_protocol,
    ),
    "hdf5": Reader("cuhk-03.mat", write_with(write_hdf5), read_raw_set),
    "parquet": Reader(
        "a.parquet",
        write_with(lambda file: pq.write_table(make_manifest_table([RECORD] * 3), file)),
        lambda path: (check_shard(path), read_shard(path, IMAGE_RECORD_SCHEMA)),
    ),
    "manifest": Reader(
        "a.parquet.json",
        b'{"image_root": "."}',
        lambda path: (
            pq.write_table(make_manifest_table([RECORD]), path.with_suffix("")),
            read_manifest(path.with_suffix("")),
        ),
    ),
    "npz": Reader(
        "a.npz",
        write_with(
            lambda file: np.savez_compressed(file, features=np.ones((2, 3), np.float32), paths=np.array(["a", "b"]))
        ),
        lambda path: open_archive(path, ["features", "paths"]),
    ),
    "npy": Reader("a.npy", write_with(lambda file: np.save(file, np.ones((2, 3)))), map_array),
}


def read(path: Path, reader: Reader, content: bytes) -> ChatReIDError | None:
    """Write a file and read it; return our error, if there is one."""
    file = path / reader.name
    file.write_bytes(content)
    if not (path / "1.png").exists():
        (path / "1.png").touch()
    try:
        reader.read(file)
    except ChatReIDError as error:
        assert str(error).strip()
        return error
    return None


@pytest.mark.parametrize("kind", READERS)
def test_sound_files_are_read(tmp_path: Path, kind: str) -> None:
    assert read(tmp_path, READERS[kind], READERS[kind].content) is None


# Where to damage, as a share of the length; how: a byte there, a cut, or some bytes more.
DAMAGES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["byte", "cut", "insert"]),
        st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(damages=DAMAGES)
def test_damaged_files_are_read_or_refused(tmp_path: Path, kind: str, damages: list[tuple[float, str, bytes]]) -> None:
    reader = READERS[kind]
    content = reader.content
    for share, how, other in damages:
        place = int(share * len(content))
        content = content[:place] + (b"" if how == "cut" else other + content[place + (how == "byte") * len(other) :])
    read(tmp_path, reader, content)


DEEP, LONG = 100_000, 5_000
HOSTILE: dict[str, tuple[str, bytes]] = {
    "deep JSON": ("json", b"[" * DEEP),
    "deep JSON objects": ("json", b'{"a":' * DEEP),
    "long number": ("json", b"1" * LONG),
    "deep line": ("lines", b'{"a":' + b"[" * DEEP + b"\n"),
    "long number in a line": ("captions", b'{"path": ' + b"1" * LONG + b"}"),
    "huge number": ("captions", b'{"person": 1e999}'),
    "surrogate": ("text set", json.dumps([{**DESCRIBED, "file_path": "\ud800.png"}]).encode()),
    "zero byte": ("text set", json.dumps([{**DESCRIBED, "file_path": "a\0.png"}]).encode()),
    "way out": ("text set", json.dumps([{**DESCRIBED, "file_path": "a/../../1.png"}]).encode()),
    "a number alone": ("yaml", b"3"),
    "a text alone": ("yaml", b"abc"),
    "a list": ("yaml", b"- 1"),
    "deep YAML": ("yaml", b"a: " + b"[" * 700),
    "billion laughs": (
        "yaml",
        b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n + 1, n + 1, n, n) for n in range(40)),
    ),
    "YAML in itself": ("yaml", b"a: &a [*a]\n"),
    "not UTF-8": ("yaml", b"\xff\xfe"),
    "zero bytes": ("yaml", b"\0"),
    "large YAML": ("yaml", b"#" * (2**20 + 1)),
    "no TIFF": ("tiff", b"II*\0\x08\0\0\0\x01\0\x00\x01\x03\0\xff\xff\xff\x7f\0\0\0\0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_refused(tmp_path: Path, name: str) -> None:
    kind, content = HOSTILE[name]
    assert read(tmp_path, READERS[kind], content) is not None


@pytest.mark.parametrize(
    "override", ["a=" + "[" * 700, "a=" + "1" * LONG, "sources.x.y=1", ".=1", "a..b=2", "a=${b", "a=${a}"]
)
def test_hostile_overrides_are_refused(tmp_path: Path, override: str) -> None:
    (tmp_path / "a.yaml").write_bytes(READERS["yaml"].content)
    with pytest.raises(ChatReIDError, match="cannot be read as YAML|fault"):
        load_settings(tmp_path / "a.yaml", [override], BuildSettings)


@pytest.mark.parametrize("size", [(600_000, 1), (1, 40_000)])
def test_pictures_of_nobody_are_refused_before_they_cost(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("L", size).save(tmp_path / "thin.png")
    for look in (open_crop, inspect_image, encode_image):
        with pytest.raises(ChatReIDError, match="pixels are no crop of a person"):
            look(tmp_path / "thin.png")
    assert encode_thumbnail(tmp_path / "thin.png") == ""


def test_parquet_of_nulls_is_refused_by_its_footer(tmp_path: Path) -> None:
    nulls = pa.table({name: pa.nulls(1_000_000, pa.string()) for name in ("image_id", "path")})
    pq.write_table(nulls, tmp_path / "a.parquet", compression="zstd")
    for look in (check_shard, lambda path: read_shard(path, IMAGE_RECORD_SCHEMA)):
        with pytest.raises(ChatReIDError, match=r"promises 1,000,000 rows in [\d,]+ bytes"):
            look(tmp_path / "a.parquet")


def write_header(shape: tuple[int, ...]) -> bytes:
    """Return an .npy file whose header promises a shape, and that ends there."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(10**12,), (2**31, 2**31, 2**31), (5,)])
def test_array_that_promises_more_than_the_file_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("features.npy", write_header(shape))
    with pytest.raises(ChatReIDError, match=r"`features` says that it has [\d,]+ bytes, but the file has [\d,]+\."):
        open_archive(tmp_path / "a.npz", ["features"])
    (tmp_path / "a.npy").write_bytes(write_header(shape))
    with pytest.raises(ChatReIDError, match=r"no readable \.npy file"):
        map_array(tmp_path / "a.npy")


def test_array_of_zeros_that_unpacks_to_far_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST_UNPACKED", 2**20)
    np.savez_compressed(tmp_path / "a.npz", features=np.zeros(2**20, np.float32), small=np.zeros(2**17, np.float32))
    assert list(open_archive(tmp_path / "a.npz", ["small"])) == ["small"]
    with pytest.raises(ChatReIDError, match="`features` says that it has 4,194,304 bytes"):
        open_archive(tmp_path / "a.npz", ["features"])
