"""Files of rows: written in turns, read by rows or whole, by others too, and never half of one."""

import json
import os
import pickle
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from oracles import normal
from stf_diffusers.stored_rows import RowReader, RowWriter, raw_bytes

LAYOUT = {"mean": (torch.float32, (7, 2, 3)), "std": (torch.float32, (7, 2, 3)), "index": (torch.int64, (7,))}


def tensors():
    return {"mean": normal(7, 2, 3), "std": normal(7, 2, 3, seed=1), "index": torch.arange(7)}


def written(path, metadata_bytes=500):
    """All tensors in turns, three rows at a time; the metadata are known at the end."""
    checksums = dict.fromkeys(LAYOUT, 0)
    with RowWriter(path, LAYOUT, metadata_bytes) as file:
        for start in range(0, 7, 3):
            for name, tensor in tensors().items():
                rows = tensor[start : start + 3]
                file.write(name, rows)
                checksums[name] = zlib.crc32(raw_bytes(rows), checksums[name])
        file.finish({"crc32": json.dumps(checksums), "origin": "größer"})
    return path


def test_written_in_turns_and_read_by_rows_and_whole(tmp_path):
    path = written(tmp_path / "new" / "rows.safetensors")
    reader = RowReader(path)
    assert reader.names == tuple(LAYOUT) and reader.metadata["origin"] == "größer"
    checksums = json.loads(reader.metadata["crc32"])
    for name, tensor in tensors().items():
        rows = reader.rows(name)
        assert rows.shape == tensor.shape and rows.dtype == tensor.dtype
        for part in (slice(0, 1), slice(2, 5), slice(6, 99), slice(None), slice(4, 4)):
            assert torch.equal(rows[part], tensor[part])
        assert torch.equal(rows.part(range(2, 6))[1:3], tensor[3:5])
        assert torch.equal(reader.mapped(name), tensor)
        assert zlib.crc32(raw_bytes(reader.mapped(name))) == checksums[name]
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.safetensors"]


def test_others_read_what_is_written_here_and_the_reverse(tmp_path):
    path = written(tmp_path / "rows.safetensors")
    loaded = load_file(path)
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors().items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["origin"] == "größer"
        assert torch.equal(file.get_slice("mean")[2:4], tensors()["mean"][2:4])
    for metadata in (None, {"format": "pt"}):
        save_file(tensors(), tmp_path / "theirs.safetensors", metadata)
        reader = RowReader(tmp_path / "theirs.safetensors")
        assert reader.metadata == (metadata or {})
        assert all(torch.equal(reader.mapped(name), tensor) for name, tensor in tensors().items())


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]
)
def test_dtypes(dtype, tmp_path):
    values = torch.arange(40).reshape(5, 2, 4).to(dtype)
    with RowWriter(tmp_path / "rows.safetensors", {"values": (dtype, values.shape)}, 0) as file:
        file.write("values", values[:3].transpose(1, 2).contiguous().transpose(1, 2))
        file.write("values", values[3:])
        file.finish({})
    assert torch.equal(RowReader(tmp_path / "rows.safetensors").rows("values")[:], values)
    assert torch.equal(load_file(tmp_path / "rows.safetensors")["values"], values)


def test_writing_to_a_mapped_tensor_does_not_reach_the_file(tmp_path):
    path = written(tmp_path / "rows.safetensors")
    content = path.read_bytes()
    RowReader(path).mapped("mean").zero_()
    assert path.read_bytes() == content


def test_an_open_file_may_be_replaced_and_pickled(tmp_path):
    path = written(tmp_path / "rows.safetensors")
    rows, mapped = RowReader(path).rows("mean"), RowReader(path).mapped("mean")
    copy = pickle.loads(pickle.dumps(rows))  # noqa: S301
    content = pickle.dumps(rows)
    save_file({"mean": torch.zeros(7, 2, 3)}, tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(path)
    for found in (rows[:], copy[:], mapped):
        assert torch.equal(found, tensors()["mean"])
    with pytest.raises(ValueError, match="was replaced after it was opened"):
        pickle.loads(content)  # noqa: S301


def test_a_file_truncated_in_place_is_an_error(tmp_path):
    path = written(tmp_path / "rows.safetensors")
    rows = RowReader(path).rows("index")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)
    with pytest.raises(OSError, match="ended early"):
        rows[5:]


INCOMPLETE = {
    "an error": (lambda file: 1 / 0, ZeroDivisionError, "division"),
    "missing rows": (lambda file: file.finish({}), ValueError, r"rows of \['mean', 'std', 'index'\] were not written"),
    "too many rows": (lambda file: file.write("index", torch.arange(8)), ValueError, "has room for 7 rows"),
    "shape": (lambda file: file.write("mean", torch.zeros(1, 3, 2)), ValueError, r"'mean' are F32 \(2, 3\); got .*\(3, 2\)"),
    "dtype": (lambda file: file.write("mean", torch.zeros(1, 2, 3).double()), ValueError, "got torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPLETE)
@pytest.mark.parametrize("earlier", [False, True])
def test_an_incomplete_file_leaves_what_was_there(case, earlier, tmp_path):
    act, error, message = INCOMPLETE[case]
    path = tmp_path / "rows.safetensors"
    if earlier:
        written(path)
    before = path.read_bytes() if earlier else None
    with pytest.raises(error, match=message), RowWriter(path, LAYOUT, 0) as file:
        act(file)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([before] if earlier else [])


def test_left_without_finish_there_is_no_file(tmp_path):
    with RowWriter(tmp_path / "rows.safetensors", LAYOUT, 0) as file:
        file.write("index", torch.arange(7))
    assert not list(tmp_path.iterdir())


def test_metadata_need_their_room(tmp_path):
    with pytest.raises(ValueError, match=r"bytes more\. Raise metadata_bytes"):
        written(tmp_path / "rows.safetensors", metadata_bytes=10)
    assert not list(tmp_path.iterdir())


def rewritten(change):
    """Of a file's content: with another header, the tensors' bytes as they are."""

    def damage(content):
        length = int.from_bytes(content[:8], "little")
        header = change(json.loads(content[8 : 8 + length]))
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + length :]

    return damage


def entry(**changes):
    """`index` with some of its entry changed; None removes."""

    def change(header):
        header["index"] = {key: value for key, value in (header["index"] | changes).items() if value is not None}
        return header

    return rewritten(change)


def shifted(header):
    """Each tensor has the right size, and `std` begins a row into `mean`."""
    begin, end = header["std"]["data_offsets"]
    header["std"]["data_offsets"] = [begin - 24, end - 24]
    return header


def later(header):
    header["index"]["data_offsets"] = [offset + 8 for offset in header["index"]["data_offsets"]]
    return header


def twice(header):
    return json.dumps(header)[:-1] + ', "index": ' + json.dumps(header["index"]) + "}"


DAMAGED = {
    "empty": (lambda content: b"", "not a safetensors file"),
    "other": (lambda content: b"not one at all", "not a safetensors file"),
    "truncated": (lambda content: content[:-5], "its size is not what its header says"),
    "longer": (lambda content: content + b"x", "its size is not what its header says"),
    "header": (lambda content: content.replace(b'"F32"', b'"Q32"'), "its header cannot be read"),
    "offsets": (lambda content: content.replace(b"[7, 2, 3]", b"[7, 2, 4]"), "another size than its shape says"),
    "json": (lambda content: content.replace(b"{", b"[", 1), "its header cannot be read"),
    "overlapping": (rewritten(shifted), "'std' does not begin where the tensor before it ends"),
    "a hole": (lambda content: rewritten(later)(content) + bytes(8), "'index' does not begin where"),
    "negative offsets": (entry(data_offsets=[-56, 0]), "its header cannot be read"),
    "fractional offsets": (entry(data_offsets=[336.0, 392.0]), "its header cannot be read"),
    "three offsets": (entry(data_offsets=[336, 392, 392]), "its header cannot be read"),
    "negative shape": (entry(shape=[-7, -1]), "its header cannot be read"),
    "fractional shape": (entry(shape=[7.0]), "its header cannot be read"),
    "boolean shape": (entry(shape=[7, True]), "its header cannot be read"),
    "no array": (entry(shape=[], dtype="U8", data_offsets=[336, 337]), "its size is not what its header says"),
    "huge shape": (entry(shape=[2**70, 2**70]), "its header cannot be read"),
    "shape of words": (entry(shape="7"), "its header cannot be read"),
    "no dtype": (entry(dtype=None), "its header cannot be read"),
    "unhashable dtype": (entry(dtype=["I64"]), "its header cannot be read"),
    "no shape": (entry(shape=None), "its header cannot be read"),
    "no offsets": (entry(data_offsets=None), "its header cannot be read"),
    "no entry": (rewritten(lambda header: header | {"index": 3}), "its header cannot be read"),
    "names twice": (rewritten(twice), "'index' is there twice"),
    "a list": (rewritten(lambda header: [header]), "its header cannot be read"),
    "nested": (rewritten(lambda header: "[" * 100_000 + "]" * 100_000), "its header cannot be read"),
    "metadata": (rewritten(lambda header: header | {"__metadata__": ["x"]}), "its metadata are not strings by name"),
    "numbers in metadata": (rewritten(lambda header: header | {"__metadata__": {"x": 1}}), "are not strings by name"),
    "no text": (lambda content: content.replace(b'"F32"', b'"\xff32"'), "its header cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case, tmp_path):
    damage, message = DAMAGED[case]
    path = written(tmp_path / "rows.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        RowReader(path)
    assert str(path) in str(caught.value)


def test_tensors_may_lie_in_another_order_than_their_names(tmp_path):
    path = written(tmp_path / "rows.safetensors")
    reverse = rewritten(lambda header: dict(reversed(header.items())))
    path.write_bytes(reverse(path.read_bytes()))
    reader = RowReader(path)
    assert all(torch.equal(reader.mapped(name), tensor) for name, tensor in tensors().items())


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_a_file_has_the_mode_of_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        path = written(tmp_path / "rows.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
