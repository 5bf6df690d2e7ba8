"""What small objects cost in a store: put, get and create of 300 bytes, by one thread and by eight.

    python benchmarks/stores.py [--store URL] [--with s3fs]

Without a URL an S3 server of moto is started on this machine, and takes most of each request; the client's CPU time is
its own. `--with s3fs` does the same through fsspec's library for S3, which has to be installed (`pip install s3fs`).
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moepress.runs.store.store import open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import s3_server

COUNT, DATA = 300, b"x" * 300


def of_moepress(url: str) -> dict[str, Callable[[str], object]]:
    store = open_store(url)
    return {
        "put": lambda name: store.put(name, DATA),
        "get": store.get,
        "create": lambda name: store.create(f"new/{name}", DATA),
    }


def of_s3fs(url: str) -> dict[str, Callable[[str], object]]:
    import s3fs

    place = url.removeprefix("s3://")
    files: Any = s3fs.S3FileSystem(endpoint_url=os.environ.get("AWS_ENDPOINT_URL"), use_listings_cache=False)
    return {
        "put": lambda name: files.pipe_file(f"{place}/{name}", DATA),
        "get": lambda name: files.cat_file(f"{place}/{name}"),
        "create": lambda name: files.pipe_file(f"{place}/new/{name}", DATA, mode="create"),
    }


def measure(act: Callable[[str], object], threads: int) -> tuple[float, float, float]:
    """Requests per second, the median's milliseconds, and CPU milliseconds of this process for each."""
    taken: list[float] = []

    def one(number: int) -> None:
        begin = time.perf_counter()
        act(f"{threads}-{number}")
        taken.append(time.perf_counter() - begin)

    begin, used = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(COUNT)))
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    return COUNT / seconds, 1e3 * statistics.median(taken), 1e3 * used / COUNT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="a folder or a URL; credentials from the environment")
    parser.add_argument("--with", dest="other", choices=["s3fs"], help="measure another library")
    given = parser.parse_args()
    with ExitStack() as stack:
        url = given.store
        if url is None:
            address = stack.enter_context(s3_server.running())
            os.environ.update(s3_server.environment(address))
            url = s3_server.new_bucket(address)
        begin = time.perf_counter()
        acts = (of_s3fs if given.other else of_moepress)(f"{url}/{os.getpid()}")
        acts["put"]("first")
        acts["create"]("first")
        print(f"opened, with a first put and create, in {time.perf_counter() - begin:.2f} s")
        for name, act in acts.items():
            for threads in (1, 8):
                rate, median, used = measure(act, threads)
                print(f"{name:6} {threads} threads  {rate:5.0f}/s  median {median:5.2f} ms  CPU {used:4.2f} ms")


if __name__ == "__main__":
    main()
