"""Laws of the data: round trips are identities, the seed fixes the split, bad input is named."""

import gzip
import json
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kakusan.errors import KakusanError, UsageError
from kakusan.training import data as kd
from kakusan.training.config import DataConfig
from kakusan.training.data import arrays, as_data, codec_from_json, hub, load
from kakusan.training.data.sources import draw_test_index
from kakusan.training.data.toys import TOYS

RNG = np.random.default_rng(0)


def find(source, seed=0, **options):
    return load(DataConfig(source=str(source), **options), seed)


def everything(part):
    return part.batch(torch.arange(len(part)))


def through_json(codec):
    return codec_from_json(json.loads(json.dumps(codec.to_json())))


# --- laws of the codecs -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, levels", [("uint8", 255), ("uint16", 65535), ("bool", 1)])
@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (3, 6, 5), (6, 5, 3), (6, 7, 4)])
def test_integer_images_survive_exactly(dtype, levels, shape):
    raw = RNG.integers(0, levels + 1, (12, *shape)).astype(dtype)
    if len(shape) == 3 and shape[0] > 4:
        expected = np.moveaxis(raw, -1, 1)
    else:
        expected = raw.reshape(12, -1, *shape[-2:])
    data = as_data(raw, test_fraction=0.25, seed=1)
    x, _ = everything(data.train)
    assert data.codec.kind == "images" and x.dtype == torch.float32
    assert x.shape[1:] == data.codec.shape and x.abs().max() <= 1
    train = np.setdiff1d(np.arange(12), data.test_index.numpy())
    assert (data.codec.decode(x) == expected[train]).all(), data.codec
    assert through_json(data.codec) == data.codec


def test_every_pixel_value_survives_and_samples_are_clipped():
    for levels in (1, 16, 255, 65535):
        codec = kd.PixelCodec((1, 1, levels + 1), levels)
        raw = np.arange(levels + 1).reshape(1, 1, 1, -1)
        x = codec.encode(raw)
        assert (codec.decode(x) == raw).all() and (x[..., 0] == -1).all() and x[..., -1] == 1
        assert (codec.decode(2 * x)[..., [0, -1]] == [0, levels]).all(), codec
    assert kd.PixelCodec((1, 1, 1), 16).pixels(torch.ones(1, 1, 1, 1)).item() == 255


@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (2, 3, 4, 5)])
def test_vectors_are_standardised_and_come_back(shape):
    raw = 1000 + 7 * RNG.standard_normal((40, *shape))
    data = as_data(raw, test_fraction=0.25, seed=0)
    x, _ = everything(data.train)
    assert data.codec.kind == "vectors" and data.codec.shape == (max(1, int(np.prod(shape))),)
    assert torch.allclose(x.mean(0), torch.zeros(()), atol=1e-5)
    assert torch.allclose(x.std(0, correction=0), torch.ones(()), atol=1e-5)
    back = data.codec.decode(data.codec.encode(raw))
    assert back.dtype == np.float32 and back.shape == raw.shape
    np.testing.assert_allclose(back, raw, rtol=1e-6)
    assert through_json(data.codec) == data.codec


def test_float_images_keep_their_shape_and_range():
    raw = RNG.uniform(-3, 9, (20, 8, 6, 3)).astype(np.float32)
    data = as_data(torch.from_numpy(raw), test_fraction=0.25, seed=0)
    x, _ = everything(data.train)
    assert data.codec.shape == (3, 8, 6) and (x.min(), x.max()) == (-1, 1)
    expected = data.train.rows.read(data.train.index)
    np.testing.assert_allclose(data.codec.decode(x), expected, rtol=0, atol=1e-6)
    assert through_json(data.codec) == data.codec


def test_a_constant_column_is_harmless():
    raw = np.stack([np.full(30, 0.1), np.arange(30.0)], 1)
    x, _ = everything(as_data(raw, test_fraction=0.2, seed=0).train)
    assert x[:, 0].abs().max() < 1e-6 and torch.isfinite(x).all()
    constant, _ = everything(as_data(np.full((9, 1, 5, 5), 7.0), test_fraction=0.2, seed=0).train)
    assert torch.isfinite(constant).all()


def test_statistics_come_from_the_training_part_alone():
    raw = RNG.standard_normal((50, 2))
    first = as_data(raw, test_fraction=0.2, seed=3)
    raw[first.test_index.numpy()] += 100
    assert as_data(raw, test_fraction=0.2, seed=3).codec == first.codec


# --- laws of the split --------------------------------------------------------------------------


@pytest.mark.parametrize("n, fraction", [(2, 0.01), (2, 0.99), (7, 0.3), (1000, 0.15)])
def test_the_split_is_a_function_of_the_seed_and_disjoint(n, fraction):
    one = draw_test_index(n, fraction, 5)
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(one, draw_test_index(n, fraction, 5))
    assert 1 <= len(one) <= n - 1 and (one.diff() > 0).all()
    data = as_data(np.arange(float(n)), test_fraction=fraction, seed=5)
    assert torch.equal(data.test_index, one)
    both = np.concatenate([data.train.index, data.test.index])
    assert (np.sort(both) == np.arange(n)).all()
    assert n < 10 or not torch.equal(one, draw_test_index(n, fraction, 6))


def test_a_stored_split_and_codec_are_used_again(tmp_path):
    np.save(tmp_path / "a.npy", RNG.standard_normal((30, 2)))
    config = DataConfig(source=str(tmp_path / "a.npy"))
    old = load(config, 1)
    new = load(config, 2, old.test_index, through_json(old.codec))
    assert torch.equal(new.test_index, old.test_index) and new.codec == old.codec
    assert torch.equal(everything(new.train)[0], everything(old.train)[0])
    with pytest.raises(KakusanError, match=r"the run was trained on images .* holds vectors"):
        load(config, 1, old.test_index, kd.PixelCodec((1, 8, 8)))
    np.save(tmp_path / "a.npy", RNG.standard_normal((5, 2)))
    with pytest.raises(KakusanError, match=r"held out 4 rows up to row \d+, but .* now holds 5"):
        load(config, 1, old.test_index, old.codec)


def test_limit_keeps_the_first(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(30.0))
    data = find(tmp_path / "a.npy", limit=10)
    assert len(data.train) + len(data.test) == 10 and data.train.index.max() < 10


# --- what is in the box -------------------------------------------------------------------------


def test_digits():
    data = find("digits")
    x, labels = everything(data.test)
    assert (data.codec.shape, data.codec.levels, len(data.classes)) == ((1, 8, 8), 16, 10)
    assert (x.min(), x.max()) == (-1, 1) and set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize("name", TOYS)
def test_toys_follow_from_the_seed(name):
    data, again, other = find(name), find(name), find(name, seed=1)
    x, labels = everything(data.train)
    assert labels is None and len(data.train) + len(data.test) == 20_000
    assert torch.equal(x, everything(again.train)[0])
    assert not torch.equal(x, everything(other.train)[0])
    assert (x.mean(0).abs() < 1e-5).all()


# --- arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", ">f4", "float64", "float16"])
def test_mapped_batches_equal_held_ones(tmp_path, monkeypatch, dtype):
    raw = (RNG.random((300, 8, 8, 3)) * 255).astype(dtype)
    np.save(tmp_path / "a.npy", raw)
    held = find(tmp_path / "a.npy")
    monkeypatch.setattr(arrays, "HELD_BYTES", 0)
    mapped = find(tmp_path / "a.npy")
    assert isinstance(mapped.train.rows, arrays.MappedRows)
    assert isinstance(mapped.train.rows.array, np.memmap)
    assert mapped.codec == held.codec
    assert torch.equal(everything(mapped.train)[0], everything(held.train)[0])


def test_a_mapped_file_is_never_read_as_a_whole(tmp_path):
    shape = (500_000_000, 8)  # 16 GB of holes
    np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float32, shape)[5] = 1.0
    rows = arrays.MappedRows(arrays.open_npy(tmp_path / "big.npy"), "big")
    codec = rows.fit(np.arange(100_000))
    assert rows.encode(np.array([5, 499_999_999]), codec).shape == (2, 8)


def test_a_bad_row_of_a_mapped_file_is_named_when_met(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "HELD_BYTES", 0)
    raw = RNG.standard_normal((200, 3))
    index = draw_test_index(200, 0.15, 0)
    raw[index[4]] = np.nan  # the statistics do not see the test part
    np.save(tmp_path / "a.npy", raw)
    data = find(tmp_path / "a.npy")
    with pytest.raises(KakusanError, match=rf"a\.npy holds the value nan in row {index[4]} "):
        data.test.batch(torch.tensor([0, 4]))


def test_npz_by_key_with_labels_and_with_a_test_set(tmp_path):
    x, y = RNG.standard_normal((20, 3)), np.arange(20) % 3
    np.savez(tmp_path / "a.npz", images=x, other=x, y=y, group=y[::-1])
    data = find(tmp_path / "a.npz")
    assert data.classes == ("0", "1", "2") and set(data.train.labels.tolist()) == {0, 1, 2}
    grouped = find(tmp_path / "a.npz", labels="group")
    assert (grouped.train.labels == torch.from_numpy(y[::-1].copy())[grouped.train.index]).all()
    np.savez(tmp_path / "b.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])
    own = find(tmp_path / "b.npz")
    assert own.test_index is None and (len(own.train), len(own.test)) == (20, 5)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    assert find(tmp_path / "x.npy", labels=str(tmp_path / "y.npy")).classes == ("0", "1", "2")


NAN = np.array([[1.0, 2.0], [3.0, np.nan]])
IMAGES = np.zeros((5, 8, 8), np.uint8)


@pytest.mark.parametrize(
    "x, labels, sentence",
    [
        (NAN, None, r"the value nan in row 1 \(counted from 0\)"),
        (-np.inf * np.ones((2, 2)), None, "the value -inf in row 0"),
        (np.ones((4, 2), complex), None, "type complex128: real numbers are needed"),
        (np.array(["a", "b"]), None, "real numbers are needed"),
        (np.array([{}, {}]), None, "Python objects"),
        (np.zeros((0, 3)), None, r"empty: its shape is \(0, 3\)"),
        (np.zeros((4, 8, 8), np.int64), None, "could mean images or vectors: cast it to uint8"),
        (np.zeros((1, 3)), None, "holds 1 sample: at least 2"),
        (np.array([[1e300], [-1e300]] * 5), None, "too large for float32"),
        ([1, 2, 3], None, "expected a tensor or numpy array, got list"),
        (IMAGES, [0, 1], "holds 5 samples but 2 labels"),
        (IMAGES, [0, 1, 2, -1, 0], "label of row 3 of the array is -1"),
        (IMAGES, [0, 1.5, 2, 1, 0], "label of row 1 of the array is 1.5"),
        (IMAGES, list("abcde"), "expected whole numbers from 0"),
        (IMAGES, np.zeros((5, 2)), r"have shape \(5, 2\)"),
    ],
)
def test_bad_arrays_get_a_sentence(x, labels, sentence):
    with pytest.raises(KakusanError, match=sentence):
        as_data(x, labels, test_fraction=0.2, seed=0)


def test_bad_batches_get_a_sentence():
    codec = kd.PixelCodec((1, 2, 2))
    with pytest.raises(KakusanError, match=r"shape \(3, 2, 2\) do not fit: expected \(B, 1, 2, 2"):
        codec.encode(np.zeros((3, 2, 2)))
    with pytest.raises(KakusanError, match="run from 0 to 256, expected 0 to 255"):
        codec.encode(np.array([[[[0, 256], [1, 1]]]]))
    with pytest.raises(KakusanError, match="the value nan in row 0"):
        codec.encode(np.full((1, 1, 2, 2), np.nan))
    with pytest.raises(KakusanError, match="data of type object do not fit"):
        codec.encode(np.array([None]))
    with pytest.raises(KakusanError, match="stored data codec is damaged"):
        codec_from_json({"form": "pickles"})


def test_bad_array_files_get_a_sentence(tmp_path):
    a = tmp_path / "a.npy"
    np.save(a, RNG.standard_normal((20, 3)))
    a.write_bytes(a.read_bytes()[:200])
    with pytest.raises(KakusanError, match=r"a\.npy is damaged or not a numpy file"):
        find(a)
    a.write_bytes(b"nothing of the kind")
    with pytest.raises(KakusanError, match=r"a\.npy is damaged or not a numpy file"):
        find(a)
    a.write_bytes(b"")
    with pytest.raises(KakusanError, match=r"a\.npy is empty: 0 bytes"):
        find(a)
    for name, save in (("o.npy", np.save), ("o.npz", np.savez)):
        save(tmp_path / name, np.array([{}, 1]))
        with pytest.raises(KakusanError, match=f"{name} holds Python objects, which only pickle"):
            find(tmp_path / name)
    np.savez(tmp_path / "b.npz", p=np.ones(3), q=np.ones(3))
    with pytest.raises(KakusanError, match="name the one to learn 'x', 'data' or 'images'"):
        find(tmp_path / "b.npz")
    with pytest.raises(UsageError, match="no array 'label'; did you mean 'labels'"):
        np.savez(tmp_path / "c.npz", x=np.ones(3), labels=np.ones(3))
        find(tmp_path / "c.npz", labels="label")
    cut = (tmp_path / "c.npz").read_bytes()[:-30]
    (tmp_path / "c.npz").write_bytes(cut)
    with pytest.raises(KakusanError, match=r"c\.npz is damaged"):
        find(tmp_path / "c.npz")


# --- IDX and CIFAR-10 ---------------------------------------------------------------------------


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def mnist_like(folder, n=20, zipped=True):
    images, labels = RNG.integers(0, 256, (n, 6, 7)), np.arange(n) % 4
    end, pack = (".gz", gzip.compress) if zipped else ("", bytes)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte{end}").write_bytes(pack(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels)))
    return images


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_with_their_own_test_set(tmp_path, zipped):
    images = mnist_like(tmp_path, zipped=zipped)
    data = find(tmp_path)
    x, labels = everything(data.train)
    assert (data.codec.decode(x)[:, 0] == images).all() and labels[:5].tolist() == [0, 1, 2, 3, 0]
    assert data.test_index is None and len(data.test) == 20
    for path in tmp_path.glob("t10k*"):
        path.unlink()
    assert len(find(tmp_path).test_index) == 3
    with pytest.raises(KakusanError, match=r"data\.size=9 does not apply to an IDX folder"):
        find(tmp_path, size=9)


def test_damaged_idx_files_are_named(tmp_path):
    mnist_like(tmp_path)
    train = tmp_path / "train-images-idx3-ubyte.gz"
    whole = train.read_bytes()
    train.write_bytes(whole[:-40])
    with pytest.raises(KakusanError, match=r"train-images-idx3-ubyte\.gz is damaged: Compressed"):
        find(tmp_path)
    train.write_bytes(gzip.compress(gzip.decompress(whole)[:-3]))
    with pytest.raises(
        KakusanError, match=r"header says \(20, 6, 7\), 840 values, but it holds 8"
    ):
        find(tmp_path)
    train.write_bytes(gzip.compress(b"\x89PNG and more"))
    with pytest.raises(KakusanError, match="no IDX file of unsigned bytes: it begins with 89 50"):
        find(tmp_path)
    train.write_bytes(whole)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(19))))
    with pytest.raises(KakusanError, match="holds 20 samples but 19 labels"):
        find(tmp_path)
    labels.write_bytes(gzip.compress(idx(np.zeros(20))))
    with pytest.raises(KakusanError, match="has the label 3, which no training sample has"):
        find(tmp_path)
    train.unlink()
    with pytest.raises(KakusanError, match="holds no train-images-idx3-ubyte"):
        find(tmp_path)


def test_cifar_files(tmp_path):
    table = RNG.integers(0, 256, (6, 3073)).astype(np.uint8)
    table[:, 0] %= 10
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        (tmp_path / f"{name}.bin").write_bytes(table.tobytes())
    data = find(tmp_path)
    x, labels = everything(data.train)
    assert data.classes[3] == "cat" and (len(data.train), len(data.test)) == (12, 6)
    assert (data.codec.decode(x)[:6].reshape(6, -1) == table[:, 1:]).all()
    assert labels[:6].tolist() == table[:, 0].tolist()
    (tmp_path / "data_batch_2.bin").write_bytes(table.tobytes()[:-1])
    with pytest.raises(KakusanError, match=r"data_batch_2\.bin is damaged: 18437 bytes"):
        find(tmp_path)
    table[2, 0] = 11
    (tmp_path / "data_batch_2.bin").write_bytes(table.tobytes())
    with pytest.raises(KakusanError, match="record 2 has the label 11"):
        find(tmp_path)


# --- pictures -----------------------------------------------------------------------------------


def picture(path, mode="RGB", size=(9, 7)):
    path.parent.mkdir(exist_ok=True, parents=True)
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    pixels = RNG.integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_pictures_survive_exactly_held_or_not(tmp_path, monkeypatch, mode):
    raw = [picture(tmp_path / "xy"[k % 2] / "deep" / f"{k}.png", mode) for k in range(6)]
    expected = np.stack(raw[0::2] + raw[1::2]).reshape(6, 7, 9, len(mode)).transpose(0, 3, 1, 2)
    held = find(tmp_path)
    monkeypatch.setattr(arrays, "HELD_BYTES", 0)
    lazy = find(tmp_path)
    for data in (held, lazy):
        x, labels = everything(data.train)
        assert (data.codec.decode(x) == expected[data.train.index]).all(), data.train.rows
        assert data.classes == ("x", "y")
        assert (labels.numpy() == (data.train.index >= 3)).all()


def test_pictures_of_different_sizes_need_a_choice(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(20, 30))
    with pytest.raises(
        KakusanError, match=r"a\.png is 9x7 pixels but .*b\.png is 20x30.*fit=crop"
    ):
        find(tmp_path)
    with pytest.raises(KakusanError, match=r"a\.png is 9x7 pixels, but data\.size asks for 8x8"):
        find(tmp_path, size=8)
    with pytest.raises(UsageError, match=r"data\.fit=crop needs data\.size"):
        find(tmp_path, fit="crop")
    for fit in ("crop", "resize", "pad"):
        assert find(tmp_path, size=8, fit=fit).codec.shape == (3, 8, 8)


def test_pad_and_crop_do_what_they_say(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 16), 200).save(tmp_path / name)
    for fit, borders in (("pad", 0), ("crop", 200), ("resize", 200)):
        data = find(tmp_path, size=16, fit=fit)
        raw = data.codec.decode(everything(data.train)[0])
        assert (raw[..., [0, -1]] == borders).all() and (raw[..., 8] == 200).all(), fit


def test_channels_are_converted_by_choice(tmp_path):
    Image.new("RGBA", (5, 5), (10, 20, 30, 0)).save(tmp_path / "a.png")
    Image.new("L", (5, 5), 255).save(tmp_path / "b.png")
    Image.new("P", (5, 5)).save(tmp_path / "c.gif")
    with pytest.raises(KakusanError, match=r"a\.png has 4 channels but .*b\.png has 1: give data"):
        find(tmp_path)
    for channels in (1, 2, 3, 4):
        data = find(tmp_path, channels=channels)
        assert data.codec.shape == (channels, 5, 5)
        raw = data.train.rows.read(np.array([0]))
        # colours under transparent pixels mean nothing: without alpha they are white
        assert channels in (2, 4) or (raw == 255).all()


def test_rotation_marks_are_obeyed(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        image = Image.new("L", (6, 10))
        mark = image.getexif()
        mark[0x0112] = 6
        image.save(tmp_path / name, exif=mark)
    assert find(tmp_path).codec.shape == (1, 6, 10)


def test_a_folder_with_its_own_test_set(tmp_path):
    for part, n in (("train", 5), ("test", 2)):
        for k in range(n):
            picture(tmp_path / part / "cat" / f"{k}.png")
            picture(tmp_path / part / "dog" / f"{k}.png")
    data = find(tmp_path)
    assert (len(data.train), len(data.test), data.test_index) == (10, 4, None)
    assert data.classes == ("cat", "dog") and data.test.labels.tolist() == [0, 0, 1, 1]


def test_bad_pictures_are_named(tmp_path, monkeypatch):
    with pytest.raises(KakusanError, match="holds nothing that can be learned: pictures"):
        find(tmp_path)
    picture(tmp_path / "a.png", size=(40, 40))
    picture(tmp_path / "b.png", size=(40, 40))
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(KakusanError, match=r"b\.png is damaged or no picture"):
        find(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(KakusanError, match=r"b\.png is damaged or no picture"):
        find(tmp_path)
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(KakusanError, match=r"b\.png has pixels of mode I;16, pictures of 8 bits"):
        find(tmp_path)
    (tmp_path / "b.png").unlink()
    picture(tmp_path / "x" / "c.png")
    picture(tmp_path / "y" / "c.png")
    with pytest.raises(KakusanError, match=r"a\.png lies beside the sub-folders x, y"):
        find(tmp_path)


# --- tables -------------------------------------------------------------------------------------


def mixed(n=30):
    colours = [("red", "green", "blue")[k % 3] for k in range(n)]
    return pa.table(
        {
            "id": pa.array(range(n), pa.uint8()),
            "colour": pa.array(colours).dictionary_encode(),
            "weight": pa.array(RNG.standard_normal(n).astype(np.float32)),
            "kind": pa.array([k % 4 for k in range(n)], pa.int64()),
            "name": pa.array(colours[::-1], pa.large_string()),
            "alive": pa.array([k % 2 == 0 for k in range(n)]),
        }
    )


@pytest.mark.parametrize("labels", [None, "kind", "colour", "alive"])
def test_tables_come_back_with_their_columns_and_types(tmp_path, labels):
    table = mixed()
    pq.write_table(table, tmp_path / "a.parquet")
    data = find(tmp_path / "a.parquet", labels=labels)
    x, classes = everything(data.train)
    assert x.shape[1:] == data.codec.shape and data.codec.kind == "table"
    back = data.codec.decode(x)
    if labels is not None:
        back = data.codec.with_labels(back, classes)
    assert back.schema.equals(table.schema), (back.schema, table.schema)
    expected = table.take(data.train.index)
    for name in table.column_names:
        if name == "weight":
            np.testing.assert_allclose(back[name].to_numpy(), expected[name].to_numpy(), atol=1e-6)
        else:
            assert back[name].to_pylist() == expected[name].to_pylist(), name
    assert torch.equal(data.codec.encode(back), x)
    assert through_json(data.codec) == data.codec


def test_whole_numbers_stay_within_their_type():
    for kind in ("uint8", "int8", "int64", "uint64"):
        column = kd.TableCodec.from_fields(
            {"columns": [{"name": "a", "type": kind, "std": 1e30}], "label": None, "place": 0}
        )
        low, high = column.decode(torch.tensor([[-1.0], [1.0]]))["a"].to_pylist()
        info = np.iinfo(kind)
        assert low == info.min and info.max * 0.999 < high <= info.max, kind


def test_columns_are_chosen_in_the_given_order(tmp_path):
    (tmp_path / "a.csv").write_text("a,b,c\n" + "1,2.5,x\n3,4.5,y\n" * 5)
    data = find(tmp_path / "a.csv", columns=["c", "a"])
    assert data.codec.decode(everything(data.test)[0]).column_names == ["c", "a"]
    with pytest.raises(UsageError, match="has no column 'bb', did you mean 'b'"):
        find(tmp_path / "a.csv", columns=["bb"])
    with pytest.raises(UsageError, match="no column of .* is left to learn"):
        find(tmp_path / "a.csv", columns=["a"], labels="a")


def test_missing_values_are_refused_dropped_or_imputed(tmp_path):
    path = tmp_path / "a.csv.gz"
    text = "w,n,s\n1.5,1,u\nNA,2,u\n3.5,,v\n9.5,7,NaN\n4.5,3,u\n"
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(
        KakusanError, match=r"a\.csv\.gz has 1 missing values in column 'w', .*row 1"
    ):
        find(path)
    assert len(find(path, missing="drop").train.rows) == 2
    imputed = find(path, missing="impute").train.rows.read(np.arange(5)).to_pydict()
    assert imputed["w"] == [1.5, 4.0, 3.5, 9.5, 4.5]
    assert imputed["n"] == [1, 2, 2, 7, 3] and imputed["s"] == ["u", "u", "v", "u", "u"]
    with pytest.raises(KakusanError, match="in column 's', .* give data.missing=drop$"):
        find(path, missing="impute", labels="s")


def test_nan_in_parquet_is_missing_and_infinity_refused(tmp_path):
    pq.write_table(pa.table({"a": [1.0, float("nan"), None, 2.0]}), tmp_path / "a.parquet")
    with pytest.raises(KakusanError, match="2 missing values in column 'a', the first in row 1"):
        find(tmp_path / "a.parquet")
    assert len(find(tmp_path / "a.parquet", missing="drop").train.rows) == 2
    pq.write_table(pa.table({"a": [1.0, float("-inf"), 2.0]}), tmp_path / "a.parquet")
    with pytest.raises(KakusanError, match="the value -inf in column 'a', row 1"):
        find(tmp_path / "a.parquet", missing="impute")


@pytest.mark.parametrize(
    "text, options, sentence",
    [
        ("a,b\n1,2\n3\n", {}, r"a\.csv is damaged or no table: CSV parse error: Expected 2"),
        ("", {}, r"a\.csv is damaged or no table: Empty"),
        ("a,b\n", {}, r"a\.csv is empty: it has no rows"),
        ("a,a\n1,2\n", {}, "more than one column 'a'"),
        ("a\n" + "".join(f"k{k}\n" for k in range(101)), {}, "'a' .* has 101 different values"),
        ("d\n2020-01-01\n2020-01-02\n", {}, "column 'd' of .* has type date32"),
        ("a,b\n1,\n2,\n", {"missing": "drop"}, "holds no row without missing values"),
        ("a,b\n1,\n2,\n", {"missing": "impute"}, "column 'b' of .* holds no values"),
        ("a,b\n1,0.5\n2,1.5\n", {"labels": "b"}, "label column 'b' of .* has type double"),
        ("a\n1\n2\n", {"size": 8}, r"data\.size=8 does not apply to a table, only to an image"),
    ],
)
def test_bad_tables_get_a_sentence(tmp_path, text, options, sentence):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(KakusanError, match=sentence):
        find(tmp_path / "a.csv", **options)


def test_a_level_never_seen_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("a\nu\nv\nu\n")
    codec = find(tmp_path / "a.csv").codec
    with pytest.raises(KakusanError, match="row 1 of column 'a' holds 'w'"):
        codec.encode(pa.table({"a": ["u", "w"]}))
    with pytest.raises(KakusanError, match="lacks the column 'a'"):
        codec.encode(pa.table({"b": ["u"]}))


# --- the hub ------------------------------------------------------------------------------------


class FakeIterable:
    """As much of `datasets.IterableDataset` as is used; counts what is fetched."""

    def __init__(self, rows, fetched, order=None, first=0, stop=None):
        self.rows, self.fetched = rows, fetched
        self.order = list(range(len(rows))) if order is None else order
        self.first, self.stop = first, stop
        self.features = {}

    def __iter__(self):
        for k in self.order[self.first : self.stop]:
            self.fetched.append(k)
            yield self.rows[k]

    def _part(self, order):
        return FakeIterable(self.rows, self.fetched, order)

    def take(self, n):
        return self._part(self.order[:n])

    def skip(self, n):
        return self._part(self.order[n:])

    def shuffle(self, seed, buffer_size):
        return self._part(list(np.random.default_rng(seed).permutation(self.order)))


class FakeTable(list):
    """As much of `datasets.Dataset` as is used."""

    features = {"label": types.SimpleNamespace(names=["cat", "dog"])}

    def __getitem__(self, key):
        if isinstance(key, str):
            return [row[key] for row in self]
        if isinstance(key, list):
            return {name: [list.__getitem__(self, k)[name] for k in key] for name in self.features}
        return super().__getitem__(key)

    def select(self, numbers):
        return FakeTable(list(self)[k] for k in numbers)


@pytest.fixture
def fake(monkeypatch):
    rows = [
        {"image": Image.new("L", (6, 5), k), "label": k % 2, "values": [float(k), 2.0 * k]}
        for k in range(60)
    ]
    module = types.ModuleType("datasets")
    module.fetched = []
    FakeTable.features = dict.fromkeys(rows[0]) | FakeTable.features

    def load_dataset(name, configuration, split, streaming):
        if name != "zoo":
            raise ConnectionError(f"cannot reach {name}\nand more")
        part = rows if split == "train" else rows[:10]
        return FakeIterable(part, module.fetched) if streaming else FakeTable(part)

    module.load_dataset = load_dataset
    module.get_dataset_split_names = lambda name, configuration: ["train", "test"]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hub_pictures_and_numbers(fake):
    data = find("hub:zoo")
    assert (data.codec.shape, len(data.train), len(data.test)) == ((1, 5, 6), 60, 10)
    assert data.classes == ("cat", "dog") and data.test_index is None
    x, labels = data.train.batch(torch.tensor([7, 3]))
    assert (data.codec.decode(x)[:, 0, 0, 0] == [7, 3]).all() and labels.tolist() == [1, 1]
    vectors = find("hub:zoo", column="values", split="all", limit=8)
    assert vectors.codec.shape == (2,) and len(vectors.train) + len(vectors.test) == 8
    bigger = find("hub:zoo", size=4, fit="crop", channels=3)
    assert bigger.train.batch(torch.tensor([0]))[0].shape == (1, 3, 4, 4)


def taken(stream, size, start, count):
    batches = stream.batches(size, start)
    return torch.cat([next(batches)[0] for _ in range(count)])


def test_a_stream_is_seekable_seeded_and_lazy(fake, monkeypatch):
    monkeypatch.setattr(hub, "HELD_OUT", 10)
    data = find("hub:zoo", streaming=True, column="values")
    assert len(fake.fetched) == 10 and torch.equal(data.test_index, torch.arange(10))
    assert isinstance(data.train, kd.Stream) and data.classes == ("0", "1")
    whole = taken(data.train, 5, 0, 30)  # three epochs of 50
    for start in (0, 7, 50, 55, 120):
        again = find("hub:zoo", streaming=True, column="values").train
        assert torch.equal(taken(again, 3, start, 5), whole[start : start + 15]), start
    epochs = data.codec.decode(whole).reshape(3, 50, 2)[..., 0]
    assert all(sorted(e.round().astype(int)) == list(range(10, 60)) for e in epochs)
    assert (epochs[0] != epochs[1]).any()
    other = find("hub:zoo", seed=1, streaming=True, column="values").train
    assert not torch.equal(taken(other, 5, 0, 10), whole[:50])
    stored = load(
        DataConfig(source="hub:zoo", streaming=True, column="values"),
        0,
        data.test_index,
        through_json(data.codec),
    )
    assert torch.equal(taken(stored.train, 5, 0, 30), whole)


def test_a_streamed_picture_of_another_size_is_refused(fake):
    data = find("hub:zoo", streaming=True, limit=20)
    assert len(data.test) == 2 and next(data.train.batches(4, 0))[0].shape == (4, 1, 5, 6)
    data.train.table.rows[4]["image"] = Image.new("L", (9, 9))
    with pytest.raises(KakusanError, match="a picture of hub:zoo is 9x9 pixels, expected 6x5"):
        taken(data.train, 4, 0, 10)


def test_bad_hub_requests_get_a_sentence(fake, monkeypatch):
    with pytest.raises(KakusanError, match="hub:zoom could not be read: cannot reach zoom$"):
        find("hub:zoom")
    with pytest.raises(UsageError, match="no column 'imag', did you mean 'image'"):
        find("hub:zoo", column="imag")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(KakusanError, match=r'pip install "kakusan\[data\]"'):
        find("hub:zoo")


# --- the door -----------------------------------------------------------------------------------


def test_unknown_sources_name_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="no data source 'digit'; did you mean 'digits'"):
        find("digit")
    with pytest.raises(UsageError, match="did you mean 'two-moons'"):
        find("two_moons")
    (tmp_path / "table.csv").write_text("a\n1\n")
    with pytest.raises(
        KakusanError, match=r"no file or folder .*tabel\.csv; did you mean .*table"
    ):
        find(tmp_path / "tabel.csv")
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(UsageError, match=r"a\.xyz is no kind of file that can be read"):
        find(tmp_path / "a.xyz")
    with pytest.raises(UsageError, match="missing=drop does not apply to 'digits', only to a tab"):
        find("digits", missing="drop")


def test_a_streamed_label_beyond_the_known_classes_is_refused():
    class Table(list):
        def shuffle(self, seed, buffer_size):
            return self

        def skip(self, n):
            return self[n:]

    rows = Table({"x": [float(i), 0.0], "y": i % 4} for i in range(8))
    codec = kd.VectorCodec((2,), mean=(0.0, 0.0), std=(1.0, 1.0))
    fitting = hub.HubStream(rows, ("x", "y"), codec, None, "hub:zoo", 0, classes=4)
    assert next(fitting.batches(4, 0))[1].tolist() == [0, 1, 2, 3]
    short = hub.HubStream(rows, ("x", "y"), codec, None, "hub:zoo", 0, classes=3)
    with pytest.raises(KakusanError, match="hub:zoo holds the label 3, but the 3 classes"):
        next(short.batches(4, 0))
