"""Bytes of the Hugging Face hub: no more than were announced, and never without end.

huggingface_hub names files of its cache by headers of the answers, and reads answers, redirects and
errors of any length. Here a server decides neither a name nor a size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from typing import IO, Any

from moec.errors import SetupError, UsageError

_SLOWEST = 1000  # bytes a second, on the average of an answer that takes longer than _PATIENCE
_PATIENCE = 60.0  # seconds
_TRIES = 5  # that bring less than _STEP
_STEP = 1 << 16  # bytes
_REDIRECTS = 10
_LONGEST_ERROR = 1 << 20  # bytes


def fetch(url: str, file: IO[bytes], most: int, bar: Any = None) -> None:
    """Writes what is at `url` to `file`, which is empty; what is cut goes on where it ended.

    Raises UsageError for more than `most` bytes and for an answer that hardly comes, and the errors
    of huggingface_hub and its client.
    """
    best, tries = 0, _TRIES
    while True:
        try:
            with closing(_answer(url, file.tell(), most)) as response:
                if file.tell() and response.status_code != 206:  # the whole file again
                    _show(bar, -file.tell())
                    file.seek(0)
                    file.truncate()
                for chunk in response.iter_bytes():
                    file.write(chunk)
                    _show(bar, len(chunk))
            return
        except (OSError, UsageError):  # of the disk; the answers that huggingface_hub explains
            raise
        except Exception:
            tries = _TRIES if file.tell() >= best + _STEP else tries - 1
            best = max(best, file.tell())
            if not tries:
                raise
            time.sleep(1)


def _answer(url: str, start: int, most: int) -> Any:
    """The answer of the hub, or of where it leads, from the byte `start`."""
    from huggingface_hub import constants, get_session

    session: Any = get_session()
    utils = import_module("huggingface_hub.utils")
    headers = {**utils.build_hf_headers(), "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    request = session.build_request("GET", url, headers=headers, timeout=timeout)
    for _ in range(_REDIRECTS):
        response = session.send(request, stream=True, follow_redirects=False)
        try:
            if not response.has_redirect_location:
                status = response.status_code
                rest = most - start if status == 206 else most
                _limit(response, url, rest if status < 400 else _LONGEST_ERROR)
                utils.hf_raise_for_status(response)  # which reads the whole answer of an error
                return response
        except BaseException:
            response.close()
            raise
        response.close()
        request = response.next_request
        if request is None or (url.startswith("https:") and request.url.scheme != "https"):
            raise SetupError(f"{url} leads to an address that is not https")
    raise SetupError(f"{url} leads on and on, more than {_REDIRECTS} times")


def _limit(response: Any, url: str, most: int) -> None:
    """Reading the answer is an error after `most` bytes, and where it hardly comes.

    Raises UsageError where it is compressed, which could be of any size.
    """
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise SetupError(f"{url} answers with compressed bytes, which were not asked for")
    read, start = response.iter_raw, time.monotonic()

    def iter_raw(chunk_size: int | None = None) -> Iterator[bytes]:
        size = 0
        for chunk in read(chunk_size):
            size, seconds = size + len(chunk), time.monotonic() - start
            if size > most:
                raise SetupError(f"{url} sends more than the {most:,} bytes that were announced")
            if seconds > _PATIENCE and size < seconds * _SLOWEST:
                raise SetupError(f"{url} sent {size:,} bytes in {seconds:.0f} s, which never ends")
            yield chunk

    response.iter_raw = iter_raw


def _show(bar: Any, size: int) -> None:
    if bar is not None:
        bar.update(size)
