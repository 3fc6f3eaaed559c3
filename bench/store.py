"""MB/s into and out of the store, against plain s3fs on the same SeaweedFS server, in turns.

    python bench/store.py [--sizes 2 40 200] [--sites 5 16] [--repeats 5] [--json] [--write]

The store hashes everything it reads, s3fs nothing. Each size is put and got `--repeats` times by both, one after the
other; medians are shown. Server and client share this machine. The second table is a round's contributions, of
`--sites`, fetched and checked as an agent does: one site after the other, and all side by side. `--write` puts the
tables into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tables import replace_table

from swarmchain.certify import gather_many
from swarmchain.checkpoint import compute_size, encode_tensors
from swarmchain.layouts import contribution_layout
from swarmchain.protocol import Opening, RoundKey, compute_commitment, encode_canonical
from swarmchain.spec import Limits, RehearsalSpec
from swarmchain.spool import Spool
from swarmchain.store import Store

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from seaweed import BUCKET, Seaweed, start_seaweed


def open_s3fs(server: Seaweed) -> Any:
    import s3fs

    options = server.options()
    return s3fs.S3FileSystem(key=options["access_key_id"], secret=options["secret_access_key"],
                             client_kwargs={"endpoint_url": server.endpoint_url, "region_name": "us-east-1"},
                             use_listings_cache=False, skip_instance_cache=True)


def time_call(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(server: Seaweed, megabytes: int, repeats: int) -> dict[str, Any]:
    store, plain = Store(f"s3://{BUCKET}/ours", options=server.options()), open_s3fs(server)
    size = megabytes * 1_000_000
    room = memoryview(bytearray(size))
    seconds: dict[str, list[float]] = {name: [] for name in ("put", "get", "s3fs_put", "s3fs_get")}
    for turn in range(repeats + 1):
        data = Random(turn).randbytes(size)
        digest = hashlib.sha256(data).hexdigest()
        path = f"{BUCKET}/plain/{digest}"
        taken = {"put": time_call(lambda d=data: store.put_blob(d)),
                 "s3fs_put": time_call(lambda p=path, d=data: plain.pipe_file(p, d)),
                 "get": time_call(lambda d=digest: store.read_blob(d, room)),
                 "s3fs_get": time_call(lambda p=path: plain.cat_file(p))}
        if bytes(room) != data:
            sys.exit("the store gave back something else")
        store.remove("blobs", digest)
        plain.rm_file(path)
        if turn:  # the first one opens connections
            for name, value in taken.items():
                seconds[name].append(value)
    rates = {name: megabytes / statistics.median(values) for name, values in seconds.items()}
    return {"megabytes": megabytes, **{f"{name}_mb_s": round(rate, 1) for name, rate in rates.items()},
            "put_ratio": round(rates["put"] / rates["s3fs_put"], 2),
            "get_ratio": round(rates["get"] / rates["s3fs_get"], 2)}


def measure_round(server: Seaweed, sites: int, repeats: int) -> dict[str, Any]:
    """Seconds of a round's contributions, 2 MB each, in turns."""
    spec = RehearsalSpec(name="r", widths=(2000, 256, 10), limits=Limits(rounds=1, sites_to_start=sites))
    store, layout = Store(f"s3://{BUCKET}/round", options=server.options()), contribution_layout(spec)
    seconds: dict[str, list[float]] = {"one_by_one": [], "side_by_side": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats + 1):
            key, commitments = RoundKey(1, "0x" + "1" * 40, 1, turn + 1), {}
            for site in range(sites):
                generator = np.random.default_rng((turn, site))
                data = encode_tensors({name: generator.normal(size=shape).astype(dtype)
                                       for name, (dtype, shape) in layout.items()}, layout)
                opening = Opening(digest=store.put_blob(data), samples=1, nonce="12" * 32)
                commitments[site] = compute_commitment(key, site, opening)
                store.put_opening(commitments[site], encode_canonical(opening))
            for name, groups in (("one_by_one", [{site: c} for site, c in commitments.items()]),
                                 ("side_by_side", [commitments])):
                spool = Spool(Path(folder) / name)
                taken = time_call(lambda s=spool, g=groups, k=key: [
                    gather_many(store, s, group, layout, key=k) for group in g])
                if turn:
                    seconds[name].append(taken)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {"sites": sites, "megabytes": round(compute_size(layout) / 1e6, 1),
            **{f"{name}_s": round(value, 3) for name, value in middle.items()},
            "ratio": round(middle["one_by_one"] / middle["side_by_side"], 2)}


def format_rounds(rows: list[dict[str, Any]]) -> str:
    lines = ["| sites | MB each | one after the other, s | side by side, s | times as fast |",
             "|---:|---:|---:|---:|---:|"]
    lines += [f"| {r['sites']} | {r['megabytes']:.0f} | {r['one_by_one_s']:.3f} | {r['side_by_side_s']:.3f} "
              f"| {r['ratio']:.2f} |" for r in rows]
    return "\n".join(lines) + "\n"


def format_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| MB | put, MB/s | s3fs | ratio | get and hash, MB/s | s3fs, get alone | ratio |",
             "|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {r['megabytes']} | {r['put_mb_s']:.0f} | {r['s3fs_put_mb_s']:.0f} | {r['put_ratio']:.2f} | "
              f"{r['get_mb_s']:.0f} | {r['s3fs_get_mb_s']:.0f} | {r['get_ratio']:.2f} |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 40, 200], metavar="MB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sites", type=int, nargs="+", default=[5, 16])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swarmchain-bench-") as folder, start_seaweed(Path(folder)) as server:
        rows = [measure(server, megabytes, options.repeats) for megabytes in options.sizes]
        rounds = [measure_round(server, sites, options.repeats) for sites in options.sites]
    if options.json:
        print(json.dumps({"sizes": rows, "rounds": rounds}))
        return
    print(format_table(rows), format_rounds(rounds), sep="\n", end="")
    if options.write:
        replace_table("store", format_table(rows))
        replace_table("store-round", format_rounds(rounds))


if __name__ == "__main__":
    main()
