"""Files elsewhere, through fsspec: listed, read in part, fetched within bounds, put whole, with no secret shown."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final
from urllib.parse import quote, unquote

from loratools.errors import InputError, LoratoolsError, MissingExtraError, OutputError, UsageError
from loratools.storage.header import quoted

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

HTTP: Final = ("http", "https")
READ_ONLY: Final = (*HTTP, "hf")
# An object appears when its upload is complete. Elsewhere a file grows in sight, and is moved into place.
_WHOLE: Final = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss")
_UNTOLD: Final = 1 << 30  # what is fetched at most where the server does not tell the size
_DEPTH: Final = 32  # of folders on a web server, which may link in circles
_FOLDERS: Final = 100_000
_USER: Final = re.compile(r"^([a-z0-9+.-]+://)[^/]*@", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """What a server tells of a file; 0 and an empty `etag` where it does not."""

    size: int | None
    mtime_ns: int = 0
    etag: str = ""


@final
@dataclass(frozen=True, repr=False)
class Remote:
    """A folder or a file at a URL. The URL may hold credentials: text of it shows none, and no error does."""

    url: str  # without a query, without a slash at the end
    query: str = ""

    def __str__(self) -> str:
        bare = _USER.sub(r"\1", self.url)
        return bare if bare.isprintable() else quoted(bare, 400)

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{quote(name) if self._is_http else name}", self.query)

    @property
    def protocol(self) -> str:
        return self.url.partition("://")[0].lower()

    @property
    def name(self) -> str:
        leaf = self.url.rpartition("/")[2]
        return unquote(leaf) if self._is_http else leaf

    @property
    def parent(self) -> Remote:
        return Remote(self.url.rpartition("/")[0], self.query)

    def within(self, other: Remote) -> str | None:
        """The name of this place in the folder `other`; None where it does not lie there."""
        return self.url[len(other.url) + 1 :] if self.url.startswith(f"{other.url}/") else None

    def listing(self) -> dict[str, Entry]:
        """Every file below this folder by its relative name, in order; empty where there is none. InputError."""
        with self._explained(InputError):
            if self._is_http:
                return dict(sorted(self._linked()))
            fs, root = self._opened()
            top = root.rstrip("/") + "/"
            found = fs.find(root, detail=True)
        return {
            name.removeprefix(top): _entry(info)
            for name, info in sorted(found.items())
            if info.get("type") == "file" and name.startswith(top)
        }

    def stat(self) -> Entry | None:
        """What is told of this file; None where there is none. InputError where the server does not answer."""
        try:
            with self._explained(InputError, absent=FileNotFoundError):
                fs, path = self._opened()
                info = fs.info(path)
        except FileNotFoundError:
            return None
        return _entry(info) if info.get("type") == "file" else None

    def head(self, size: int) -> bytes:
        """The first `size` bytes, or all where there are fewer."""
        with self._explained(InputError):
            fs, path = self._opened()
            if not self._is_http:
                return bytes(fs.cat_file(path, start=0, end=size)) if size else b""
            # Streamed, for a server without ranges would send all; size=1 only spares asking for it.
            headers = {"Range": f"bytes=0-{size - 1}"}
            with fs.open(path, "rb", block_size=0, size=1, headers=headers) as stream:
                data = b""
                while len(data) < size and (chunk := stream.read(size - len(data))):
                    data += chunk
                return data[:size]

    def span(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`."""
        if self._is_http:  # which may know no ranges
            return self.head(end)[start:]
        with self._explained(InputError):
            fs, path = self._opened()
            return bytes(fs.cat_file(path, start=start, end=end))

    def read(self, limit: int) -> bytes:
        """All of a small file; InputError for one above `limit`."""
        data = self.head(limit + 1)
        if len(data) > limit:
            raise InputError(f"{self}: is larger than {limit} bytes; this is no such file")
        return data

    def read_many(self, names: list[str], limit: int) -> Iterator[bytes | None]:
        """Small files of this folder, many at a time; None for one that is missing or too large."""
        with self._explained(InputError):
            fs, _ = self._opened()
            paths = [(self / name)._opened()[1] for name in names]
            found = fs.cat_ranges(paths, [0] * len(paths), [limit + 1] * len(paths), on_error="return")
        for data in found:
            yield bytes(data) if isinstance(data, bytes) and len(data) <= limit else None

    def fetch(self, to: Path, told: Entry | None) -> Entry:
        """Copy it to the local file `to`: what it was while it was copied. InputError where it changes or lies.

        `told` is what a listing said of it, if any.
        """
        for _ in range(3):
            before = told if told is not None and told.size is not None else self.stat()
            if before is None:
                raise InputError(f"{self}: is gone; list the hub again")
            limit = _UNTOLD if before.size is None else before.size
            to.parent.mkdir(parents=True, exist_ok=True)
            with self._explained(InputError):
                fs, path = self._opened()
                fs.get_file(path, str(to), callback=_bounded(limit, str(self)))
            if to.stat().st_size > limit:
                raise _oversize(limit, str(self))
            after = self.stat()
            if after is not None and after == before and before.size in (None, to.stat().st_size):
                return after
            told = None  # it was replaced meanwhile, or since it was listed
        raise InputError(f"{self}: changes while it is fetched, or is shorter than its server says; try again later")

    def put(self, file: Path, via: Remote) -> Entry:
        """Upload a local file: whole or not at all; by way of `via` where a file would grow in sight. OutputError."""
        self._put(lambda fs, path: fs.put_file(str(file), path), via)
        entry = self.stat()
        if entry is None or entry.size not in (None, file.stat().st_size):
            raise OutputError(f"{self}: is not what was uploaded; check the server and try again")
        return entry

    def put_bytes(self, data: bytes, via: Remote) -> None:
        """The same with a small text."""
        self._put(lambda fs, path: fs.pipe_file(path, data), via)

    def delete(self) -> None:
        """Remove the file, if there is one; OutputError where that is not allowed."""
        with contextlib.suppress(FileNotFoundError), self._explained(OutputError, absent=FileNotFoundError):
            fs, path = self._opened()
            if self.protocol in _WHOLE or fs.exists(path):
                fs.rm_file(path)

    def abort_uploads(self, is_stale: Callable[[str], bool]) -> None:
        """Forget uploads to files of this folder that were begun and not finished, where the server keeps such."""
        if self.protocol not in ("s3", "s3a"):
            return
        with self._explained(OutputError, absent=FileNotFoundError), contextlib.suppress(FileNotFoundError):
            fs, path = self._opened()
            bucket, key, _ = fs.split_path(path)
            top = f"{key}/" if key else ""
            listed = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=top)
            for upload in listed.get("Uploads") or ():
                if is_stale(upload["Key"].removeprefix(top)):
                    fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def files(self) -> list[str]:
        """Names of the files that lie in this very folder; empty where there is no such folder."""
        try:
            with self._explained(OutputError, absent=FileNotFoundError):
                fs, path = self._opened()
                return [info["name"].rpartition("/")[2] for info in fs.ls(path, detail=True) if info["type"] == "file"]
        except FileNotFoundError:
            return []

    @property
    def has_whole_puts(self) -> bool:
        """Whether an upload appears only when it is complete."""
        return self.protocol in _WHOLE

    def _put(self, write: Callable[[AbstractFileSystem, str], object], via: Remote) -> None:
        with self._explained(OutputError):
            fs, path = self._opened()
            if self.has_whole_puts:
                write(fs, path)
                return
            _, meanwhile = via._opened()
            for folder in {path.rpartition("/")[0], meanwhile.rpartition("/")[0]}:
                fs.makedirs(folder, exist_ok=True)
            try:
                write(fs, meanwhile)
                _move(fs, meanwhile, path)
            except BaseException:
                with contextlib.suppress(Exception):  # the next run removes it
                    fs.rm_file(meanwhile)
                raise

    @property
    def _is_http(self) -> bool:
        return self.protocol in HTTP

    def _opened(self) -> tuple[AbstractFileSystem, str]:
        try:
            import fsspec
        except ImportError:
            raise MissingExtraError(f"{self.protocol}:// needs fsspec: pip install 'loratools[hub]'") from None
        try:
            kind = fsspec.get_filesystem_class(self.protocol)
        except ImportError:
            raise MissingExtraError(f"{self.protocol}:// needs {_package(self.protocol)}") from None
        except ValueError:
            known = "try s3, hf or https"
            raise UsageError(f"{self}: {self.protocol}:// is no protocol that fsspec knows; {known}") from None
        whole = f"{self.url}?{self.query}" if self.query else self.url
        # Not fsspec.core.url_to_fs: there a name with "::" in it would chain to any other file.
        options = {"use_listings_cache": False} if self.protocol in (*_WHOLE, *HTTP) else {}
        return kind(**kind._get_kwargs_from_urls(whole), **options), kind._strip_protocol(whole)

    def _linked(self) -> Iterator[tuple[str, Entry]]:
        """What the pages of a web server link to below this one. Sizes are not told there."""
        fs, _ = self._opened()
        seen, waiting = {""}, [""]
        while waiting:
            folder = waiting.pop()
            at = self / folder.rstrip("/") if folder else self
            for info in fs.ls(f"{at.url}/" + (f"?{self.query}" if self.query else ""), detail=True):
                rest = folder + at._below(info["name"])
                if rest in seen or rest.count("/") > _DEPTH:
                    continue
                seen.add(rest)
                if not rest.endswith("/"):
                    yield rest, Entry(None)
                elif len(seen) < _FOLDERS:
                    waiting.append(rest)

    def _below(self, link: str) -> str:
        """What a link of the page of this folder names in it; nothing where it leads elsewhere."""
        for top in (f"{self.url}/?{self.query}/", f"{self.url}/"):
            if link.startswith(top) and not any(mark in link[len(top) :] for mark in "?#"):
                rest = unquote(link[len(top) :])
                return "" if {"..", "."} & set(rest.split("/")) else rest
        return ""

    @contextlib.contextmanager
    def _explained(self, kind: type[LoratoolsError], absent: type[Exception] | None = None) -> Iterator[None]:
        """Turn whatever a protocol's library raises into an error of `kind`, in words of our own: theirs hold URLs."""
        try:
            yield
        except LoratoolsError:
            raise
        except Exception as error:  # noqa: BLE001 - every protocol's library has errors of its own
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(error.errno, os.strerror(error.errno)) from None
            found = list(_chain(error))
            if absent is not None and _is_absence(found):
                raise absent from None
            raise kind(f"{self}: {_reason(found)}") from None


def _move(fs: AbstractFileSystem, source: str, target: str) -> None:
    from fsspec import AbstractFileSystem as Base

    if type(fs).mv is Base.mv:  # which takes names for patterns
        fs.cp_file(source, target)
        fs.rm_file(source)
    else:
        fs.mv(source, target)


def _bounded(limit: int, name: str) -> Any:
    """A callback of fsspec that stops a transfer at `limit` bytes."""
    from fsspec.callbacks import Callback

    class Bounded(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > limit:
                raise _oversize(limit, name)

    return Bounded()


def _oversize(limit: int, name: str) -> InputError:
    return InputError(f"{name}: has more than the {limit} bytes that its server told; list the hub again")


def _entry(info: Mapping[str, Any]) -> Entry:
    etag = next((str(info[k]) for k in ("ETag", "etag", "blob_id", "md5Hash", "content_md5") if info.get(k)), "")
    changed = next((info[k] for k in ("LastModified", "mtime", "last_modified", "created") if info.get(k)), None)
    if isinstance(changed, dt.datetime):
        changed = changed.timestamp()
    size = info.get("size")
    mtime = int(changed * 1e9) if isinstance(changed, int | float) else 0
    return Entry(size if isinstance(size, int) and size >= 0 else None, mtime, etag.strip('"'))


def _package(protocol: str) -> str:
    if protocol in ("s3", "s3a", *HTTP):
        return "s3fs: pip install 'loratools[hub]'" if protocol[0] == "s" else "aiohttp: pip install 'loratools[hub]'"
    if protocol == "hf":
        return "huggingface_hub: pip install huggingface_hub"
    from fsspec.registry import known_implementations

    module = str(known_implementations.get(protocol, {}).get("class", protocol)).partition(".")[0]
    return f"another package ({module}); see fsspec's documentation of this protocol"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from: libraries wrap what the server said."""
    at: BaseException | None = error
    for _ in range(8):
        if at is None:
            return
        yield at
        at = at.__cause__ or at.__context__


def _status(found: list[BaseException]) -> int | None:
    """The HTTP status that an error speaks of."""
    for error in found:
        response = getattr(error, "response", None)
        told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        for status in (getattr(error, "status", None), getattr(response, "status_code", None), told):
            if isinstance(status, int) and status >= 300:
                return status
    return None


_UNREACHED: Final = (
    "EndpointConnectionError",
    "ClientConnectorError",
    "ClientConnectorDNSError",
    "ConnectTimeoutError",
)


def _is_refused(error: BaseException) -> bool:
    return isinstance(error, ConnectionError) or type(error).__name__ in _UNREACHED


def _is_absence(found: list[BaseException]) -> bool:
    """Whether the server said that there is nothing: libraries say so too where it said something else, or nothing."""
    gone = isinstance(found[0], FileNotFoundError) and _status(found) in (404, None)
    return gone and not any(_is_refused(error) for error in found)


def _reason(found: list[BaseException]) -> str:
    """Why, without a word of the library's own message."""
    status, names = _status(found), {type(error).__name__ for error in found}
    if any(_is_refused(error) for error in found):
        return "cannot be reached (no connection to its server); check the address and the network"
    if names & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}:
        return "there are no credentials for it; set those of its protocol in the environment"
    if status in (401, 403) or any(isinstance(error, PermissionError) for error in found):
        return f"permission denied (HTTP {status or 403}); check the credentials and what they allow"
    if status == 404 or (status is None and any(isinstance(error, FileNotFoundError) for error in found)):
        return "there is nothing (no such bucket, folder or file); check the address"
    if any(isinstance(error, TimeoutError) for error in found) or any("Timeout" in name for name in names):
        return "its server does not answer in time; try again later"
    detail = f"HTTP {status}" if status else type(found[0]).__name__
    return f"its server or the library for it fails ({detail}); try again later"
