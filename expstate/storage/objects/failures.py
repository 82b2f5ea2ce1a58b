"""What the libraries beneath the clients raise, as one of the errors of ``ObjectClient``: by what the server said, not by its class.

Gets an exception, what was being done, and the options that hold secrets; hands on an exception to raise, without these.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from expstate.errors import ExpstateError, NoSpaceError, StorageError, StoragePermissionError, from_os_error
from expstate.storage.objects.client import TransientError

if TYPE_CHECKING:
    from collections.abc import Iterator

_CREDENTIALS = "check the credentials, and that they may do this here"
_REGION = "check the region, the endpoint and the name of the bucket"
_CLOCK = "check the clock of this machine"

_SECRET_NAME = re.compile(r"key|secret|token|pass|pwd|cred|sas|auth|connection|signature", re.IGNORECASE)
_LEAST_SECRET = 6
"""Shorter texts are words that a message may hold by chance."""
_USERINFO = re.compile(r"(?<=://)[^/\s@\"']+@")
_QUERY = re.compile(r"(?<=://)([^\s\"'?]*)\?[^\s\"']*")
_MOST_SAID = 500

_THROTTLED = {429, 503}
_BUSY = {408, 409, 425, 499}
_DENIED = {401, 403, 407}
_MOVED = {301, 302, 307, 308}
_ENDLESS = {501, 505}
_CODES_THROTTLED = {
    "BandwidthLimitExceeded",
    "RequestLimitExceeded",
    "RequestThrottled",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
    "rateLimitExceeded",
    "userRateLimitExceeded",
}
_CODES_BUSY = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "InvalidDigest",
    "OperationAborted",
    "RequestTimeout",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_CODES_DENIED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "ExpiredTokenException"}
_CODES_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_CODES_CLOCK = {"RequestTimeTooSkewed", "RequestExpired"}
_CODES_FULL = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "quotaExceeded"}
_CODES_EXIST = {"BlobAlreadyExists", "PreconditionFailed"}

# Of libraries that need not be there, so by name; the first part is that of the package.
_FINAL = {
    "aiohttp.ClientSSLError",
    "aiohttp.InvalidURL",
    "botocore.SSLError",
    "paramiko.BadHostKeyException",
    "requests.SSLError",
    "ssl.SSLCertVerificationError",
}
_TRANSIENT = {
    "aiohttp.ClientConnectionError",
    "aiohttp.ClientPayloadError",
    "aiohttp.HttpProcessingError",
    "asyncio.TimeoutError",
    "azure.IncompleteReadError",
    "azure.ServiceRequestError",
    "azure.ServiceResponseError",
    "botocore.FlexibleChecksumError",
    "botocore.HTTPClientError",
    "botocore.IncompleteReadError",
    "botocore.ResponseParserError",
    "builtins.ConnectionError",
    "builtins.EOFError",
    "builtins.TimeoutError",
    "concurrent.TimeoutError",
    "gcsfs.ChecksumError",
    "google.TransportError",
    "http.HTTPException",
    "httpx.TransportError",
    "paramiko.NoValidConnectionsError",
    "paramiko.SSHException",
    "requests.ChunkedEncodingError",
    "requests.ConnectionError",
    "requests.Timeout",
    "socket.gaierror",
    "urllib3.HTTPError",
}
_NO_CREDENTIALS = {
    "azure.ClientAuthenticationError",
    "botocore.CredentialRetrievalError",
    "botocore.NoCredentialsError",
    "botocore.PartialCredentialsError",
    "botocore.ProfileNotFound",
    "botocore.SSOError",
    "botocore.TokenRetrievalError",
    "google.GoogleAuthError",
    "paramiko.AuthenticationException",
}
_CLOSED = "Socket is closed"
"""What paramiko says after a connection has broken, without a number."""
_TRANSIENT_NUMBERS = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
}


class RefusedError(Exception):
    """What a server has answered instead of doing what it was asked for.

    Attributes
    ----------
    status : int
        Of HTTP.
    code : str
        The server's short name for it, if there is one.
    message : str
        What it said.
    """

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(" ".join(filter(None, (str(status), f"{code}:" if code and message else code, message))))
        self.status = status
        self.code = code
        self.message = message


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, and what it came from; not what was being handled already when it was raised."""
    handled = sys.exc_info()[1]
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen and (now is error or now is not handled):
        seen.add(id(now))
        yield now
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)


def refusal(error: BaseException) -> RefusedError | None:
    """What the server said, if this exception or one that it came from tells.

    Examples
    --------
    >>> print(refusal(RefusedError(404, "NoSuchKey", "no such key")))
    404 NoSuchKey: no such key
    >>> refusal(TimeoutError()) is None
    True
    """
    for link in chain(error):
        if isinstance(link, RefusedError):
            return link
        response = getattr(link, "response", None)
        if isinstance(response, Mapping):  # of botocore
            said = response.get("Error", {})
            code = str(said.get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") or (int(code) if code.isdecimal() else 0)
            if status:
                return RefusedError(status, "" if code.isdecimal() else code, str(said.get("Message", "")))
        # Of aiohttp, of azure, of gcsfs. What others call a code is not always the server's: to aiohttp, all that it cannot read is a 400.
        names = ("status", "status_code", *(("code",) if type(link).__module__.startswith("gcsfs.") else ()))
        for status in (str(getattr(link, name, None)) for name in names):
            if re.fullmatch("[3-5][0-9][0-9]", status):
                return RefusedError(int(status), str(getattr(link, "error_code", None) or ""), str(getattr(link, "message", "") or link))
    return None


def explain(error: Exception, what: str, options: Mapping[str, Any]) -> Exception:
    """The error to raise instead, which has the one that there is as its cause unless that shows a secret.

    Parameters
    ----------
    error : Exception
        What a library has raised.
    what : str
        What was being done, with the key: ``"writing 's3://bucket/key'"``.
    options : mapping
        Those of the file system. What looks like a secret in them is masked wherever it is met.

    Notes
    -----
    To be called when the exception is not being handled any more: what is being handled then is not what it came from.
    """
    if isinstance(error, (ExpstateError, MemoryError)):
        return error
    answer = refusal(error)
    if answer is not None:
        failure = _refused(answer, what, masked(str(answer), options).rstrip("."))
    else:
        failure = _failed(error, what, masked(_said(error), options).rstrip("."))
    is_clean = all(str(link) == _without_secrets(str(link), options) for link in chain(error))
    failure.__cause__ = error if is_clean else None
    return failure


def _refused(answer: RefusedError, what: str, said: str) -> Exception:  # noqa: PLR0911 - one for each thing that a server can mean
    status, code = answer.status, answer.code
    message = f"{what} failed: {said}"
    if status in _THROTTLED or code in _CODES_THROTTLED:
        return TransientError(message, throttled=True)
    if status == HTTPStatus.INSUFFICIENT_STORAGE or code in _CODES_FULL:
        return NoSpaceError(f"{message}; free some room and try again", errno.ENOSPC)
    if status == HTTPStatus.PRECONDITION_FAILED or code in _CODES_EXIST:
        return FileExistsError(message)
    if code in _CODES_CLOCK:
        return StoragePermissionError(f"{message}; {_CLOCK}", errno.EACCES)
    if code in _CODES_REGION or status in _MOVED:
        return StoragePermissionError(f"{message}; {_REGION}", errno.EACCES)
    if status in _DENIED or code in _CODES_DENIED:
        return StoragePermissionError(f"{message}; {_CREDENTIALS}", errno.EACCES)
    if status == HTTPStatus.NOT_FOUND:
        return FileNotFoundError(message)
    if status in _BUSY or code in _CODES_BUSY or (status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _ENDLESS):
        return TransientError(message)
    return StorageError(message)


def _failed(error: Exception, what: str, said: str) -> Exception:  # noqa: PLR0911 - one for each kind of failure
    """For an exception that no server's answer stands behind."""
    links = list(chain(error))
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for link in links for kind in type(link).__mro__}
    numbers = {link.errno for link in links if isinstance(link, OSError)}
    message = f"{what} failed: {said}"
    if names & _FINAL:
        return StorageError(message)
    if names & _NO_CREDENTIALS and "google.TransportError" not in names:
        return StoragePermissionError(f"{message}; {_CREDENTIALS}", errno.EACCES)
    if names & _TRANSIENT or numbers & _TRANSIENT_NUMBERS or str(error) == _CLOSED:
        return TransientError(message)
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return FileNotFoundError(f"{what} failed: there is no such file")
    if isinstance(error, FileExistsError):
        return FileExistsError(f"{what} failed: there is such a file")
    if isinstance(error, PermissionError):
        return StoragePermissionError(f"{message}; {_CREDENTIALS}", error.errno)
    if isinstance(error, OSError):
        return from_os_error(OSError(error.errno, said), what)
    return StorageError(message)


def _said(error: BaseException) -> str:
    """Its words, and those of what it came from in the end, if these are others."""
    texts = [f"{type(link).__name__}: {link}" if str(link) else type(link).__name__ for link in chain(error)]
    return texts[0] if str(list(chain(error))[-1]) in texts[0] else f"{texts[0]} ({texts[-1]})"


def masked(text: str, options: Mapping[str, Any]) -> str:
    r"""A text on one line, without secrets.

    Examples
    --------
    >>> masked("no http://me:pw@host/x?sig=1 for\nSECRETSECRET", {"secret": "SECRETSECRET"})
    'no http://host/x for ***'
    """
    text = " ".join(_without_secrets(text, options).split())
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}..."


def _without_secrets(text: str, options: Mapping[str, Any]) -> str:
    text = _QUERY.sub(r"\1", _USERINFO.sub("", text))
    for secret in sorted(set(_secrets(options)), key=len, reverse=True):
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", "***", text)
    return text


def _secrets(value: object, *, is_secret: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _secrets(part, is_secret=is_secret or bool(_SECRET_NAME.search(str(name))))
    elif isinstance(value, (str, bytes)):
        text = value if isinstance(value, str) else value.decode(errors="replace")
        if is_secret and len(text) >= _LEAST_SECRET:
            yield text
    elif isinstance(value, Sequence):
        for part in value:
            yield from _secrets(part, is_secret=is_secret)
    elif is_secret and isinstance(token := getattr(value, "token", None), str):
        yield from _secrets(token, is_secret=True)  # of credentials of google-auth
