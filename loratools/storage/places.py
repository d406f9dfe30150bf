"""Where a hub lies: a folder of this machine, or what a URL names; and what of a URL may be shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import unquote, urlsplit, urlunsplit

from loratools.errors import UsageError
from loratools.storage.atomic import printable, write_whole
from loratools.storage.header import quoted
from loratools.storage.remote import READ_ONLY, Remote

Place: TypeAlias = Path | Remote

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[^/]*)?://")
_LOCAL: Final = ("file", "local")
_BUCKETS: Final = ("s3", "s3a", "gs", "gcs")  # whose URLs have no place for a user


def parse_place(text: str) -> Place:
    """A path, or the place that a URL names; UsageError for a URL that nothing can be made of."""
    if not _URL.match(text):
        return Path(text)
    try:
        parts = urlsplit(text)
        shown = shown_url(text)
        if parts.scheme not in _BUCKETS:
            _ = parts.port  # ValueError: what follows the colon begins a password that a slash or the like cuts off
    except ValueError:
        raise UsageError(
            "this URL is malformed; write protocol://host/folder, and %2F and the like for characters of a password"
        ) from None
    if "::" in text.partition("://")[0]:
        raise UsageError(f"{quoted(parts.scheme)}: chained URLs are not read; name one place")
    if parts.scheme in _LOCAL:
        return Path(unquote(parts.path))
    if parts.scheme in _BUCKETS and _holds_keys(parts.netloc):
        raise UsageError(
            f"{parts.scheme}:// names a bucket, and keys do not belong into its URL; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile"
        )
    if not parts.netloc and parts.scheme != "memory":
        raise UsageError(f"{quoted(shown, 400)}: names no host or bucket; write {parts.scheme}://NAME/folder")
    return Remote(urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", "")), parts.query)


def _holds_keys(bucket: str) -> bool:
    """Whether there is more than the name of a bucket; a key with a slash in it ends there. ARNs name buckets too."""
    return "@" in bucket or (":" in bucket and not bucket.startswith("arn:"))


def shown_url(url: str) -> str:
    """The URL without all that may be a secret: user, password, query and fragment."""
    return str(Remote(url.partition("#")[0].partition("?")[0]))


def shown(place: Place) -> str:
    """The place for a message of one line."""
    return printable(place) if isinstance(place, Path) else str(place)


def check_output(place: Place) -> None:
    """UsageError for what is only read."""
    if isinstance(place, Remote) and place.protocol in READ_ONLY:
        raise UsageError(f"{place}: {place.protocol}:// is only read here; write to a folder or a bucket")


def put_whole(place: Place, data: bytes, via: Place, *, durable: bool = True) -> None:
    """Put `data` at `place`, whole or not at all; `via` is where it may lie meanwhile, if it grows in sight there.

    Of a file of this machine `durable` as `AtomicFile.commit`.
    """
    if isinstance(place, Path):
        write_whole(place, data, durable=durable)
    else:
        assert isinstance(via, Remote)
        place.put_bytes(data, via)
