"""The lower rooms, each with its rules and its refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
from conftest import make_signers, write_cells

from swarmchain.checkpoint import compute_size, decode_tensors, encode_tensors
from swarmchain.config import DataConfig, read_site_config
from swarmchain.data import read_cells
from swarmchain.errors import (
    BlobMissing,
    CheckpointError,
    ConfigError,
    DataError,
    KeystoreError,
    OpeningError,
    SpecError,
    StoreError,
    StoreUnreachable,
)
from swarmchain.keys import create_keystore, open_keystore
from swarmchain.normalization import normalize
from swarmchain.protocol import Opening, RoundKey, encode_canonical, parse_opening
from swarmchain.selection import choose_validation
from swarmchain.site_text import render_site_toml
from swarmchain.spec import Normalization, parse_spec
from swarmchain.store import Store

LAYOUT = {"a": ("float32", (3, 2)), "b": ("int64", (4,))}
ZERO = "0" * 64

# -- checkpoint


def make_tensors() -> dict[str, np.ndarray]:
    return {"b": np.arange(4), "a": np.arange(6, dtype=np.float32).reshape(3, 2)}


def test_checkpoint_round_trip_and_any_safetensors_reader() -> None:
    from safetensors.numpy import load

    data = encode_tensors(make_tensors(), LAYOUT)
    assert len(data) == compute_size(LAYOUT)
    for name, value in make_tensors().items():
        assert np.array_equal(decode_tensors(data, LAYOUT)[name], value)
        assert np.array_equal(load(data)[name], value)


@pytest.mark.parametrize("spoil", ["truncated", "longer", "header", "nan"])
def test_invalid_checkpoint(spoil: str) -> None:
    data = bytearray(encode_tensors(make_tensors(), LAYOUT))
    start = len(data) - 6 * 4 - 4 * 8
    if spoil == "nan":
        data[start : start + 4] = np.float32("nan").tobytes()
    changed = {"truncated": data[:-1], "longer": data + b"\0", "header": bytes(8) + data[8:], "nan": data}[spoil]
    with pytest.raises(CheckpointError):
        decode_tensors(bytes(changed), LAYOUT)


# -- store


def test_store_round_trip(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    digest = store.put_blob(b"hello")
    assert store.get_blob(digest, bytes_max=5) == b"hello"
    assert not list(tmp_path.rglob("*.tmp"))


def test_invalid_store_blob(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    digest = store.put_blob(b"hello")
    with pytest.raises(BlobMissing):
        store.get_blob(ZERO, bytes_max=5)
    with pytest.raises(StoreError, match="longer than"):
        store.get_blob(digest, bytes_max=4)
    next(tmp_path.rglob(digest)).write_bytes(b"jello")
    with pytest.raises(StoreError, match="not what its name says"):
        store.get_blob(digest, bytes_max=5)
    with pytest.raises(StoreError, match="no digest"):
        store.has_blob("../../etc/passwd")


def test_store_puts_right_what_somebody_put_in_the_place_of_an_opening_or_a_blob(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    digest = store.put_blob(b"hello")
    next(tmp_path.rglob(digest)).write_bytes(b"garbage")
    store.put_opening(ZERO, b"squatter")
    assert store.restore_blob(b"hello") == digest
    store.put_opening(ZERO, b"mine")
    assert store.get_blob(digest, bytes_max=5) == b"hello"
    assert store.get_opening(ZERO) == b"mine"


def test_invalid_store_that_was_unmounted(tmp_path: Path) -> None:
    """An empty mount point must not look like a store whose blobs are missing, nor be written to."""
    (tmp_path / "store").mkdir()
    store = Store(str(tmp_path / "store"))
    digest = store.put_blob(b"hello")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    for mounted in (False, True):
        if mounted:
            (tmp_path / "store").mkdir()
        for act in (lambda: store.get_blob(digest, bytes_max=5), lambda: store.put_blob(b"x"),
                    lambda: store.has_opening(ZERO)):
            with pytest.raises(StoreUnreachable, match="is gone"):
                act()
    (tmp_path / "store").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    assert store.get_blob(digest, bytes_max=5) == b"hello"


def test_invalid_store_that_is_full_or_read_only() -> None:
    with pytest.raises(StoreError, match="is no folder"):
        Store("/nowhere/at/all")
    if Path("/proc/self").is_dir():  # a folder that nobody may write to, root included
        with pytest.raises(StoreError, match="cannot write"):
            Store("/proc/self").require_writable()


def test_invalid_store_on_a_full_disk(tmp_path: Path) -> None:
    """A file-size limit makes the kernel refuse a write half-way, as a full disk does; nothing half-written stays."""
    script = (
        "import resource, sys\nfrom swarmchain.store import Store\nfrom swarmchain.errors import StoreFull\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    Store(sys.argv[1]).put_blob(bytes(5000))\nexcept StoreFull as exc:\n    print(exc.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert "cannot write blob" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


KEY = RoundKey(31337, "0x" + "1" * 40, 1, 1)

# -- data


def test_validation_cells_do_not_depend_on_their_order() -> None:
    names = np.array([f"c{i}" for i in range(50)])
    y = np.arange(50) % 3
    chosen = set(names[choose_validation(names, y, share=0.2)])
    back = names[::-1]
    assert set(back[choose_validation(back, y[::-1], share=0.2)]) == chosen


def test_counts_become_what_scanpy_makes_of_them() -> None:
    import scanpy

    x = np.random.default_rng(0).poisson(3.0, size=(20, 30)).astype(np.float32)
    reference = anndata.AnnData(x.copy())
    scanpy.pp.normalize_total(reference, target_sum=1e4)
    scanpy.pp.log1p(reference)
    assert np.allclose(normalize(x, "auto", Normalization(), source="x"), reference.X, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "NaN or infinity"), (-3.0, "negative values"), (99.5, "neither")]
)
def test_invalid_values_in_x(value: float, words: str) -> None:
    x = np.ones((3, 4), np.float32)
    x[1, 2] = value
    with pytest.raises(DataError, match=words):
        normalize(x, "auto", Normalization(), source="site.h5ad")


def test_invalid_data_file(tmp_path: Path) -> None:
    settings = DataConfig(path="x", label_column="cell_type")
    with pytest.raises(DataError, match="does not exist"):
        read_cells(tmp_path / "none.h5ad", settings, Normalization())
    (tmp_path / "bad.h5ad").write_bytes(b"no hdf5")
    with pytest.raises(DataError, match="cannot read"):
        read_cells(tmp_path / "bad.h5ad", settings, Normalization())
    path = write_cells(tmp_path / "a.h5ad")
    with pytest.raises(DataError, match="no column 'kind'"):
        read_cells(path, DataConfig(path="x", label_column="kind"), Normalization())


# -- config, keys, protocol, spec


def test_site_toml_round_trip_and_example(tmp_path: Path) -> None:
    text = render_site_toml(name='Sankt "Anna"', rpc_url="http://h:1", deployment="d.json", store="store",
                            data="x.h5ad", label_column="cell_type", label_map={"B": "B cell"})
    (tmp_path / "site.toml").write_text(text)
    config = read_site_config(tmp_path / "site.toml")
    assert (config.name, config.data.label_map) == ('Sankt "Anna"', {"B": "B cell"})
    assert config.store_url == str(tmp_path / "store")


def test_invalid_site_toml(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    with pytest.raises(ConfigError, match="cannot read"):
        read_site_config(path)
    text = render_site_toml(name="A", rpc_url="http://h:1", deployment="d", store="s", data="x", label_column="c")
    path.write_text(text.replace("poll_s", "pol_s"))
    with pytest.raises(ConfigError, match="pol_s"):
        read_site_config(path)


def test_keystore_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "keystore.json"
    address = create_keystore(path, "secret", work_log2=4)
    assert open_keystore(path, "secret").address == address
    with pytest.raises(KeystoreError, match="wrong password"):
        open_keystore(path, "Secret")
    with pytest.raises(KeystoreError, match="exists already"):
        create_keystore(path, "secret", work_log2=4)
    path.chmod(0o644)
    with pytest.raises(KeystoreError, match="readable by others"):
        open_keystore(path, "secret")


def test_salt_is_secret_and_repeatable() -> None:
    a, b = make_signers(2)
    assert a.derive_salt(KEY, ZERO) == a.derive_salt(KEY, ZERO) != b.derive_salt(KEY, ZERO)
    assert "0101" not in repr(a)


def test_opening_round_trip_and_refusals() -> None:
    opening = Opening(digest=ZERO, samples=1, nonce=ZERO)
    data = encode_canonical(opening)
    assert parse_opening(data) == opening
    unknown, empty = data.replace(b"{", b'{"x":1,', 1), data.replace(b'"samples":1', b'"samples":0')
    for bad in (b"", b"[]", empty, unknown, b" " * 20_000):
        with pytest.raises(OpeningError):
            parse_opening(bad)


def test_invalid_spec_names_the_field() -> None:
    with pytest.raises(SpecError, match="task"):
        parse_spec(b"{}")
