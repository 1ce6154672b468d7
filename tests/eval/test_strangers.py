"""Files and answers of strangers that the evaluator reads: whatever is in them, one clear error or the right value."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from chatreid_plugin.archives import map_array, open_archive
from chatreid_plugin.config import BaseUrl
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.backends.http import read_logprobs
from chatreid_plugin.eval.comparison import draw_cmc_curves
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.html import encode_png
from chatreid_plugin.openai_answers import BrokenAnswer, parse_answer
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import make_manifest_table, write_text


MakeSettings = Callable[..., EvalSettings]


def write_header(path: Path, shape: tuple[int, ...], kind: str = "<f8") -> Path:
    """Write an .npz of a few hundred bytes whose array ``features`` promises this shape."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("features.npy", stream.getvalue() + bytes(64))
    return path


@pytest.mark.parametrize(
    ("shape", "kind"), [((10**12,), "<f8"), ((10**6, 10**6), "<f4"), ((10**30,), "<f8"), ((10**13,), "<U0")]
)
def test_archive_that_promises_terabytes_is_refused_before_memory_is_taken(
    shape: tuple[int, ...], kind: str, tmp_path: Path
) -> None:
    file = write_header(tmp_path / "f.npz", shape, kind)
    assert file.stat().st_size < 1000
    with pytest.raises(DataError, match=r"f\.npz: `features` says that it has [\d,]{15,} bytes, but the file has"):
        open_archive(file, ["features"])


def test_archives_that_compress_well_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "f.npz", features=np.zeros((1000, 1000)), paths=np.array([""] * 1000))
    found = open_archive(tmp_path / "f.npz", ["features", "paths"])
    assert found["features"].shape == (1000, 1000) and found["paths"].shape == (1000,)


def test_archive_that_lies_of_its_sizes_is_refused(tmp_path: Path) -> None:
    file = write_header(tmp_path / "f.npz", (2**31 - 20,), "|u1")
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # its sizes in the table of contents: packed, unpacked
    content[entry + 20 : entry + 28] = (2**31).to_bytes(4, "little") + (2**31 + 200).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"2,147,483,628 bytes, but the file has|no readable"):
        open_archive(file, ["features"])


@pytest.mark.parametrize("read", [lambda path: open_archive(path, ["features"]), map_array])
def test_pipes_and_folders_are_not_waited_for(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    for path in (tmp_path / "pipe.npz", tmp_path):
        with pytest.raises(DataError, match="regular|is a folder|no readable"):
            read(path)


@pytest.mark.parametrize("number", ["1e999", 1e300, float("nan"), float("inf")])
def test_log_probabilities_that_are_no_number_are_a_broken_answer(number: Any) -> None:
    with pytest.raises(BrokenAnswer, match="a log-probability is no number"):
        read_logprobs(reply(number))


def reply(number: Any) -> Any:
    top = [{"token": "Yes", "logprob": number}, {"token": "No", "logprob": -1}]
    return {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}


def test_log_probability_of_minus_a_huge_number_is_the_lowest() -> None:
    answer = parse_answer(json.dumps(reply(7)).replace("7", "-1e999").encode())
    assert read_logprobs(answer) == {"Yes": -9999.0, "No": -1.0}


@pytest.mark.parametrize("name", [r"$\frac{$", "$x$", "a $ b", r"\$HOME$", "_hidden", "$\\nonsense$"])
def test_names_are_drawn_as_they_are(name: str) -> None:
    figure: Any = draw_cmc_curves({"market1501": {name: [0.5, 1.0]}})
    encode_png(figure)
    (text,) = figure.axes[0].get_legend().get_texts()
    assert text.get_text() == name and not text.get_parse_math()


@pytest.mark.parametrize(
    "address",
    [
        "http://h:99999/v1",
        "http://h:port/v1",
        "http://::1/v1",
        "http://[::1/v1",
        "http://[nonsense]:1",
        "http://h:0/v1",
    ]
    + ["http://a..b/v1", "http://" + "a" * 64 + "/v1"],
)
def test_addresses_without_a_possible_host_or_port_are_refused(address: str) -> None:
    with pytest.raises(ValidationError, match="is no address"):
        TypeAdapter(BaseUrl).validate_python(address)


@pytest.mark.parametrize(
    "address", ["http://[::1]:8000/v1", "https://h", "http://h:80{trial}/v1", "http://bücher.de/v1"]
)
def test_addresses_of_servers_are_taken(address: str) -> None:
    assert TypeAdapter(BaseUrl).validate_python(address) == address


def test_half_a_surrogate_pair_ends_in_no_traceback(make_settings: MakeSettings, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="name"):
        make_settings(Path("m.parquet"), name="odd \udce9 name")
    output = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(ValidationError, match=r"output_dir: .*caf\\udce9' is no UTF-8\. Rename the folder or file"):
        make_settings(Path("m.parquet"), output_dir=output)
    with pytest.raises(DataError, match=r"has half a character"):
        write_text(tmp_path / "page.html", "\ud800")
    record = ImageRecord("tiny/a", "tiny", "train", "a.png", "tiny:\ud800", "1", 2, 2)
    with pytest.raises(DataError, match="does not fit its column .*surrogates not allowed"):
        make_manifest_table([record])


def test_folder_to_write_into_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(DataError, match=r"taken.* Name a folder, then run again\.$"):
        write_text(tmp_path / "taken" / "comparison.html", "page")
    assert (tmp_path / "taken").read_text() == "mine"


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    """Return a function that changes keys of a JSON file of a folder."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))

    return change


def overwrite(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


def replace_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"junk")


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            overwrite("tokenizer.json", '{"model": {"type": "Nope"}}'),
            "the tokenizer or the image processor is damaged",
        ),
        (overwrite("tokenizer.json", "[]"), "the tokenizer or the image processor is damaged"),
        (overwrite("tokenizer_config.json", "[]"), "the tokenizer or the image processor is damaged"),
        (overwrite("config.json", "[]"), "the configuration is damaged"),
        (edit("config.json", vision_config=3), "cannot be loaded: "),
        (edit("config.json", quantization_config=[1]), "the configuration is damaged"),
        (edit("config.json", quantization_config={"quant_method": "awq"}), "cannot be loaded: .*gptqmodel"),
        (replace_weights, "the weights or the quantization_config is damaged"),
        (remove_tokenizer, r"its tokenizer does not know <\|image_pad\|>"),
    ],
)
def test_damaged_checkpoints_are_one_error(
    damage: Callable[[Path], None], message: str, checkpoint: Path, make_settings: MakeSettings, tmp_path: Path
) -> None:
    from chatreid_plugin.eval.backends.checkpoint import load_checkpoint

    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    settings = make_settings(tmp_path, backend="transformers", model_name_or_path=str(folder), device="cpu")
    with pytest.raises(ConfigError, match=message) as caught:
        load_checkpoint(settings.model)
    assert str(folder) in str(caught.value)
